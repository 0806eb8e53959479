// The Python binding of StepPlan: reads parameter groups, state and gradients from Python's objects, a step in two
// calls. Used by wd_fused/backends, which keeps alive the parameters that a plan points to.
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "plan/step_plan.h"
#include "python/choice.h"
#include "python/hosted_step.h"
#include "python/ops.h"

namespace py = pybind11;

namespace wd_fused {
namespace {

// Elements from which a step, then of some tenths of a millisecond, gives other Python threads a turn: for that, every
// tensor must be held, which costs a model of many small ones more than the turn is worth.
constexpr int64_t kReleaseGil = int64_t{1} << 20;

PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (string == nullptr) throw py::error_already_set();
  return string;  // lives as long as the process
}

struct Keys {
  PyObject* params = interned("params");
  PyObject* lr = interned("lr");
  PyObject* momentum = interned("momentum");
  PyObject* dampening = interned("dampening");
  PyObject* weight_decay = interned("weight_decay");
  PyObject* nesterov = interned("nesterov");
  PyObject* maximize = interned("maximize");
  PyObject* differentiable = interned("differentiable");
  PyObject* momentum_buffer = interned("momentum_buffer");
  // Of a options: the first three stand for one of OptionTensors' places, since a row has but one of them.
  PyObject* master = interned("master");
  PyObject* remainder = interned("remainder");
  PyObject* compensation = interned("compensation");
  PyObject* momentum_scale = interned("momentum_scale");
  PyObject* ema = interned("ema");
  // Of a DTensor and its spec.
  PyObject* local_tensor = interned("_local_tensor");
  PyObject* spec = interned("_spec");
  PyObject* placements = interned("placements");
  PyObject* mesh = interned("mesh");
};
const Keys& keys() {
  static const Keys all;
  return all;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return value;
}

// state[param]["momentum_buffer"] or null. It is nearly always the only entry, under the interned key.
PyObject* momentum_buffer_in(PyObject* state_of_param) {
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  if (PyDict_Next(state_of_param, &position, &key, &value) != 0 && key == keys().momentum_buffer) return value;
  value = PyDict_GetItemWithError(state_of_param, keys().momentum_buffer);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Where a key of a parameter's state has its place: in OptionTensors, or elsewhere. Keys out of a checkpoint need not
// be the interned ones.
constexpr int kMomentumBuffer = -1;
constexpr int kNowhere = -2;
int place_in_state(PyObject* key) {
  static const std::array<std::pair<PyObject*, int>, 6> places = {{{keys().momentum_buffer, kMomentumBuffer},
                                                                   {keys().ema, 2},
                                                                   {keys().master, 0},
                                                                   {keys().remainder, 0},
                                                                   {keys().compensation, 0},
                                                                   {keys().momentum_scale, 1}}};
  for (const auto& [known, place] : places)
    if (key == known) return place;
  if (!PyUnicode_CheckExact(key) || PyUnicode_CHECK_INTERNED(key)) return kNowhere;
  for (const auto& [known, place] : places)
    if (PyUnicode_Compare(key, known) == 0) return place;
  return kNowhere;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

// A hyperparameter of a group. What is no number is a TypeError that names it.
double number(PyObject* value, PyObject* name, size_t g) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  try {
    return number(value);
  } catch (py::error_already_set& error) {
    const bool is_no_number = error.matches(PyExc_TypeError);
    const std::string what =
        error.matches(PyExc_OverflowError) ? "a number of hundreds of digits" : py::repr(value).cast<std::string>();
    const std::string message = "group " + std::to_string(g) + ": " + py::str(name).cast<std::string>() + "=" + what +
                                ": " + py::str(error.value()).cast<std::string>();
    py::raise_from(error, is_no_number ? PyExc_TypeError : PyExc_RuntimeError, message.c_str());
    throw py::error_already_set();
  }
}

// As torch forms it: in the type of what was given, which may round, as NumPy's float16 and a float32 Tensor do.
double one_minus(PyObject* value, PyObject* name, size_t g) {
  const double given = number(value, name, g);
  if (PyFloat_CheckExact(value) || PyLong_CheckExact(value)) return 1 - given;
  const auto difference = py::reinterpret_steal<py::object>(PyNumber_Subtract(py::int_(1).ptr(), value));
  if (!difference) throw py::error_already_set();
  return number(difference.ptr());
}

bool truth(PyObject* value) {
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

at::Tensor tensor_or_none(const py::handle value, const char* name) {
  if (value.is_none()) return {};
  if (!THPVariable_Check(value.ptr()))
    throw py::type_error(std::string(name) + " must be a Tensor or None, as torch.amp.GradScaler sets it");
  return THPVariable_Unpack(value.ptr());
}

at::Tensor tensor_or_undefined(const py::handle value) {
  return value.is_none() ? at::Tensor() : value.cast<at::Tensor>();
}

// --- DTensors: what is stepped of one is the tensor that it has in this process

bool is_dtensor(const py::handle tensor) {
  return THPVariable_Check(tensor.ptr()) && THPVariable_Unpack(tensor.ptr()).key_set().has(c10::DispatchKey::Python) &&
         PyObject_HasAttr(tensor.ptr(), keys().local_tensor) != 0;
}
// An attribute that the object keeps: borrowed.
PyObject* attribute_of(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  Py_DECREF(value);
  return value;
}
PyObject* local_of(PyObject* dtensor) {
  PyObject* local = attribute_of(dtensor, keys().local_tensor);
  if (!THPVariable_Check(local)) throw py::type_error("the local tensor of a DTensor is not a Tensor");
  return local;
}
// Of any tensor, or None.
at::Tensor local_or_undefined(const py::handle value) {
  return is_dtensor(value) ? THPVariable_Unpack(local_of(value.ptr())) : tensor_or_undefined(value);
}

// wd_fused/options/spec.py's RowOptions: weights, stochastic, momentum_dtype, extra, momentum_scale, ema, averages,
// clips, zeroes.
void read_row_options(const py::handle value, PlannedParameter& parameter) {
  if (value.is_none()) return;
  const auto fields = value.cast<py::tuple>();
  RowOptions& options = parameter.options;
  options.is_used = true;
  constexpr std::array<const char*, 5> kNames = {"parameter", "full", "split", "split24", "kahan"};
  const auto name = fields[0].cast<std::string>();
  const auto place = std::find(kNames.begin(), kNames.end(), name);
  if (place == kNames.end()) throw py::value_error("weights=" + name);
  options.weights = static_cast<Weights>(place - kNames.begin());
  options.stochastic = fields[1].cast<bool>();
  const auto momentum = storage_of_buffer(caffe2::TypeMeta::fromScalarType(fields[2].cast<at::ScalarType>()));
  if (!momentum) throw py::value_error("a momentum buffer of another dtype than the plan knows");
  options.momentum = *momentum;
  parameter.option_tensors.extra() = local_or_undefined(fields[3]);
  parameter.option_tensors.momentum_scale() = local_or_undefined(fields[4]);
  parameter.option_tensors.average() = local_or_undefined(fields[5]);
  options.averages = fields[6].cast<bool>();
  options.clips = fields[7].cast<bool>();
  options.zeroes = fields[8].cast<bool>();
}

bool wants_autograd(PyObject* value) {
  return !PyFloat_CheckExact(value) && THPVariable_Check(value) && THPVariable_Unpack(value).requires_grad();
}

Numerics numerics_named(const std::string& name) { return name == "opmath" ? Numerics::opmath : Numerics::torch; }

Target target_named(const std::string& name) {
  if (name == "cpu") return Target::cpu;
  if (name == "cuda") return Target::cuda;
  if (name == "hosted") return Target::hosted;
  throw py::value_error("target=" + name + ": choose cpu, cuda or hosted");
}

// All a step needs of Python's side: parameter lists, hyperparameters, state, gradients.
class PythonPlan {
 public:
  // parameters: (parameter, momentum buffer or None, group, index) of each row. groups: the parameters of every group,
  // planned or not: a change there is noticed. The caller keeps both alive: only addresses are kept here, since owning
  // references would close a cycle that Python's garbage collector cannot see.
  // make_host(device): for a hosted target, what HostedStep calls.
  PythonPlan(const py::list& parameters, const py::list& groups, const py::dict& state, const std::string& numerics,
             const std::string& target, const py::object& make_host)
      : plan_(
            planned(parameters), numerics_named(numerics), target_named(target),
            [&](c10::Device device, std::vector<Row> rows, std::vector<bool> serial) {
              hosts_.push_back(make_host(device));
              return std::make_unique<HostedStep>(device, std::move(rows), std::move(serial), numerics_named(numerics),
                                                  hosts_.back());
            },
            groups.size()) {
    for (const py::handle group : groups) {
      auto& params = groups_.emplace_back();
      for (const py::handle param : group) params.push_back(param.ptr());
    }
    group_used_.resize(groups_.size());
    for (const py::handle parameter : parameters) {
      const auto tuple = parameter.cast<py::tuple>();
      row_of_.emplace(tuple[0].ptr(), static_cast<int64_t>(rows_.size()));
      rows_.push_back(tuple[0].ptr());
      is_sharded_.push_back(is_dtensor(tuple[0]));
      any_sharded_ |= is_sharded_.back();
      group_used_.at(tuple[2].cast<size_t>()) = true;
    }
    gradient_specs_.resize(rows_.size());
    hyperparameters_.resize(groups_.size());
    keys_of_groups_.resize(groups_.size());
    read_state(state);
  }

  // Takes the optimizer's state as it is now for what the plan was built on. Called when this step's own momentum
  // buffers have been put there.
  void read_state(const py::dict& state) {
    entries_.clear();
    for (const auto& [key, value] : state) {
      const auto row = row_of_.find(key.ptr());
      entries_.push_back({key.ptr(), row == row_of_.end() ? -1 : row->second, {}});
    }
  }

  // Checks everything and writes nothing. -1: the plan no longer holds, build another. Else the number of rows that it
  // leaves to others this time; left() tells which. What it read stays in memory until launch().
  int64_t prepare(const py::handle groups, const py::handle state, const py::handle options) {
    was_skipped_ = false;
    const int64_t result = check(groups, state, {}, options);
    if (result >= 0) hold_memory();
    return result;
  }

  const std::vector<std::pair<int64_t, std::string>>& left() const { return left_; }

  // The memory that torch's code writes beside this plan, [begin, end): whether a row of it lies there.
  bool keep_off(const std::vector<std::pair<uintptr_t, uintptr_t>>& others) {
    std::vector<Extent> extents;
    for (const auto& [begin, end] : others) extents.push_back({begin, end, -1});
    return plan_.keep_off(std::move(extents));
  }

  // Forgets what prepare() read, and the memory that it holds: launch() will not come.
  void abandon() { plan_.abandon(); }

  // Between prepare() and launch(), on each device: the groups' sums of squared gradients, float64 [groups].
  std::vector<at::Tensor> sums(const py::handle grad_scale) {
    if (!grad_scale.is_none()) plan_.set_grad_scale(tensor_or_none(grad_scale, "grad_scale"));
    std::vector<at::Tensor> result;
    while_others_run([&] { result = plan_.sums(); });
    return result;
  }

  // Does what prepare() checked. The momentum buffers that it made, with their rows. coefficients: of the norm, one a
  // group.
  py::list launch(const py::handle coefficients, const py::handle grad_scale) {
    if (!grad_scale.is_none()) plan_.set_grad_scale(tensor_or_none(grad_scale, "grad_scale"));
    if (!coefficients.is_none()) {
      const bool is_tensor = THPVariable_Check(coefficients.ptr());
      plan_.set_coefficients(
          (is_tensor ? py::object(coefficients.attr("tolist")()) : py::reinterpret_borrow<py::object>(coefficients))
              .cast<std::vector<double>>());
    }
    return run();
  }

  std::optional<at::Tensor> grad_norm() const {
    const at::Tensor norm = plan_.grad_norm();
    return norm.defined() ? std::optional(norm) : std::nullopt;
  }
  bool was_skipped() const { return was_skipped_; }

  py::list run() {
    has_stepped_ = plan_.elements() != 0;
    try {
      if (takes_long() || plan_.target() != Target::cpu)
        while_others_run([this] { plan_.run(); });
      else
        plan_.run();
    } catch (...) {
      plan_.abandon();
      throw;
    }
    // What is written of a DTensor is its local tensor, of which the DTensor's own version counter does not know.
    if (has_stepped_)
      for (const size_t r : sharded_written_) THPVariable_Unpack(rows_[r]).unsafeGetTensorImpl()->bump_version();
    sharded_written_.clear();
    py::list made;
    for (const int64_t row : plan_.fresh_rows()) made.append(py::make_tuple(row, plan_.momentum_buffer(row)));
    return made;
  }

  // prepare() and launch() in one, if that is all there is to do: None if it is not, and then nothing is done. Nothing
  // else runs in between, so that a short step need not hold its memory. grad_scale and found_inf, of
  // torch.amp.GradScaler, are for a plan that can read them on its device; not for a step that makes momentum buffers,
  // since only the device knows whether it will fill them.
  py::object step(const py::handle groups, const py::handle state, const py::handle grad_scale,
                  const py::handle found_inf, const py::handle options) {
    was_skipped_ = false;
    if (c10::impl::dispatch_mode_enabled()) return py::none();  // which sees what goes through torch's dispatcher
    Amp amp{tensor_or_none(grad_scale, "grad_scale"), tensor_or_none(found_inf, "found_inf")};
    const bool has_amp = amp.is_used();
    const bool skips_if_not_finite = amp.grad_scale.defined() && !amp.found_inf.defined();
    if (has_amp && !can_read(amp)) return py::none();
    if (plan_.target() == Target::cpu && amp.found_inf.defined()) {
      if (*amp.found_inf.const_data_ptr<float>() != 0) return skipped();
      amp.found_inf.reset();
    }
    if (check(groups, state, amp, options) != 0 || (norm_.is_used && plan_.devices() > 1)) {
      plan_.abandon();
      return py::none();
    }
    if (takes_long() || plan_.target() == Target::hosted || norm_.error_if_nonfinite) hold_memory();
    if (norm_.is_used && (plan_.target() == Target::cpu || norm_.error_if_nonfinite)) {
      bool is_finite = true;
      const auto form = [&] { is_finite = plan_.form_coefficients(); };
      if (takes_long() || plan_.target() != Target::cpu)
        while_others_run(form);
      else
        form();
      if (!is_finite && skips_if_not_finite) return skipped();
      if (!is_finite && norm_.error_if_nonfinite) {
        plan_.abandon();
        throw std::runtime_error(
            "The total norm for gradients is non-finite, so it cannot be clipped (error_if_nonfinite=True); nothing "
            "has "
            "been written");
      }
    }
    return run();
  }

  // What the last step launched on GPUs: for tests and measurements.
  py::list launches() const {
    py::list result;
    if (!has_stepped_) return result;
    for (const py::object& host : hosts_) result += host.attr("launches")();
    for (const CudaPlan::Launch* launch : plan_.launched()) {
      py::dict entry;
      entry["kernel"] = name_of(launch->kernel);
      entry["tensors"] = launch->tensors;
      entry["blocks"] = launch->blocks;
      entry["tiles"] = launch->tiles;
      entry["parameter_bytes"] = launch->kernel.parameter_bytes;
      result.append(entry);
    }
    return result;
  }
  // The bytes that lie in each device's memory.
  py::list tables() const {
    py::list result;
    for (const std::vector<std::byte>& table : plan_.tables())
      result.append(py::bytes(reinterpret_cast<const char*>(table.data()), table.size()));
    return result;
  }

 private:
  // Nothing of a step that failed stays behind, such as momentum buffers for which there was memory at first.
  int64_t check(const py::handle groups, const py::handle state, const Amp& amp, const py::handle options) {
    if (is_void_) return -1;
    try {
      int64_t result = check_all(groups, state, amp, options);
      if (result == kStale) {
        is_void_ = true;
        is_void_ = !point_anew();
        result = is_void_ || (amp.is_used() && !can_read(amp)) ? -1 : check_all(groups, state, amp, options);
      }
      return std::max(result, int64_t{-1});
    } catch (...) {
      plan_.abandon();
      throw;
    }
  }

  // A step that GradScaler, or we in its place, skip.
  py::object skipped() {
    plan_.abandon();
    was_skipped_ = true;
    return py::list();
  }

  // wd_fused/options/spec.py's StepOptions: groups (each None or max_norm, l1, decoupled, l2, average_weight,
  // random_key, average_varies), norm_per_group, error_if_nonfinite, norm_dtype, clips. False: it is not for this plan.
  bool read_options(const py::handle options) {
    norm_ = {};
    if (options.is_none()) return !plan_.has_options();
    PyObject* groups = PyTuple_GET_ITEM(options.ptr(), 0);
    if (PyTuple_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* step = PyTuple_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
      GroupStep& own = hyperparameters_[g].options;
      own = {};
      if (step == Py_None) continue;
      own.max_norm = number(PyTuple_GET_ITEM(step, 0));
      own.l1 = number(PyTuple_GET_ITEM(step, 1));
      own.decoupled = number(PyTuple_GET_ITEM(step, 2));
      own.l2 = truth(PyTuple_GET_ITEM(step, 3));
      own.average_weight = number(PyTuple_GET_ITEM(step, 4));
      own.random_key = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(step, 5));
      own.average_varies = truth(PyTuple_GET_ITEM(step, 6));
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    norm_.per_group = truth(PyTuple_GET_ITEM(options.ptr(), 1));
    norm_.error_if_nonfinite = truth(PyTuple_GET_ITEM(options.ptr(), 2));
    norm_.in_double = PyTuple_GET_ITEM(options.ptr(), 3) == double_dtype();
    norm_.is_used = truth(PyTuple_GET_ITEM(options.ptr(), 4));
    return true;
  }
  static PyObject* double_dtype() {
    static PyObject* dtype = py::cast(at::kDouble).release().ptr();
    return dtype;
  }

  // What programs do that replace p.data or the optimizer's state at every step. A DTensor's placements would have to
  // be looked at as well.
  bool point_anew() {
    if (any_sharded_) return false;
    for (size_t r = 0; r < rows_.size(); ++r)
      if (!plan_.point_anew(static_cast<int64_t>(r), param_of(r), buffers_[r],
                            plan_.has_options() ? option_tensors_[r].data() : nullptr))
        return false;
    return plan_.overlaps_as_before();
  }

  static constexpr int64_t kStale = -2;
  int64_t check_all(const py::handle groups, const py::handle state, const Amp& amp, const py::handle options) {
    left_.clear();
    const bool has_amp = amp.is_used();
    if (!PyList_Check(groups.ptr()) || !PyDict_Check(state.ptr())) return -1;
    if (!same_groups(groups.ptr()) || !read_hyperparameters(groups.ptr()) || !read_buffers(state)) return -1;
    if (!read_options(options)) return -1;
    plan_.begin(hyperparameters_, amp, norm_);
    for (Hyperparameters& h : hyperparameters_) h.tensors = {};  // the plan keeps them for as long as it must
    std::string why_all;  // unless a later row is stale: then it was of memory that is no longer the plan's
    const bool has_options = plan_.has_options();
    sharded_written_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) {
      fetch_ahead(r);
      const auto row = static_cast<int64_t>(r);
      const bool is_placed = !is_sharded_[r] || has_gradient_of_its_placement(r);
      const auto reading = !is_placed    ? StepPlan::Reading::left
                           : has_options ? plan_.read_with_options(row, param_of(r), gradient_of(r), buffers_[r],
                                                                   option_tensors_[r].data())
                                         : plan_.read(row, param_of(r), gradient_of(r), buffers_[r]);
      const auto why_left = [&] {
        return is_placed ? plan_.why_left() : "its gradient is not a DTensor of its mesh and placements";
      };
      if (is_sharded_[r] && reading == StepPlan::Reading::taken) sharded_written_.push_back(r);
      switch (reading) {
        case StepPlan::Reading::stale:
          return kStale;
        case StepPlan::Reading::left:
          if (!plan_.is_serial(row))
            left_.emplace_back(row, why_left());
          else if (why_all.empty())
            why_all = why_left() + ", and it shares memory with another parameter";
          break;
        case StepPlan::Reading::entangled:
          if (why_all.empty()) why_all = plan_.why_left();
          break;
        case StepPlan::Reading::taken:
        case StepPlan::Reading::no_gradient:
          break;
      }
    }
    if (!why_all.empty()) return leave_all(why_all);
    if (plan_.zeroes_what_others_read())
      return leave_all("zero_grads=True sets a gradient to zero that shares memory with another parameter's");
    // A plan with GradScaler's tensors has come through step(), which must not make momentum buffers, unless the step
    // is known to happen.
    if (has_amp && !plan_.fresh_rows().empty() && plan_.target() != Target::cpu) return -1;
    if (!plan_.is_ready()) {
      hold_memory();
      while_others_run([this] { plan_.make_ready(); });
    }
    return static_cast<int64_t>(left_.size());
  }

  // Without the GIL: what waits for a GPU with it would wait for ever, if the GPU waits for another that is driven by
  // another Python thread. A launch waits when a thousand others are queued before it.
  template <class Work>
  void while_others_run(const Work& work) {
    const py::gil_scoped_release others_may_run;
    work();
  }

  bool takes_long() const { return plan_.target() == Target::cpu && plan_.elements() > kReleaseGil; }

  // On the CPU only options unscale gradients as they go.
  bool can_read(const Amp& amp) const {
    if (plan_.target() == Target::cpu && !plan_.is_only_options()) return false;
    for (const at::Tensor* tensor : {&amp.grad_scale, &amp.found_inf})
      if (tensor->defined() && !(plan_.can_read(*tensor) && tensor->scalar_type() == at::kFloat)) return false;
    return true;
  }

  // Leaves every row to others, for one reason; launch() then does nothing.
  int64_t leave_all(const std::string& reason) {
    left_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) left_.emplace_back(static_cast<int64_t>(r), reason);
    plan_.abandon();
    return static_cast<int64_t>(left_.size());
  }

  void hold_memory() {
    for (size_t r = 0; r < rows_.size(); ++r)
      if (!is_sharded_[r] || has_gradient_of_its_placement(r))
        plan_.hold_memory(static_cast<int64_t>(r), param_of(r), gradient_of(r));
  }

  static std::vector<PlannedParameter> planned(const py::list& parameters) {
    std::vector<PlannedParameter> result;
    result.reserve(parameters.size());
    for (const py::handle parameter : parameters) {
      const auto tuple = parameter.cast<py::tuple>();
      result.push_back({local_or_undefined(tuple[0]),
                        local_or_undefined(tuple[1]),
                        tuple[2].cast<int64_t>(),
                        tuple[3].cast<int64_t>(),
                        {},
                        {}});
      if (tuple.size() > 4) read_row_options(tuple[4], result.back());
    }
    return result;
  }

  // --- DTensors

  const at::Tensor& param_of(size_t row) const {
    return THPVariable_Unpack(is_sharded_[row] ? local_of(rows_[row]) : rows_[row]);
  }
  const at::Tensor& gradient_of(size_t row) const {
    const at::Tensor& gradient = THPVariable_Unpack(rows_[row]).unsafeGetTensorImpl()->grad();
    if (!is_sharded_[row] || !gradient.defined()) return gradient;
    return THPVariable_Unpack(local_of(py::reinterpret_steal<py::object>(THPVariable_Wrap(gradient)).ptr()));
  }
  // Or none. One of another placement is left: FusedSGD redistributes it and comes again, or torch's code refuses it.
  bool has_gradient_of_its_placement(size_t row) {
    const at::Tensor& outer = THPVariable_Unpack(rows_[row]).unsafeGetTensorImpl()->grad();
    if (!outer.defined()) return true;
    const auto gradient = py::reinterpret_steal<py::object>(THPVariable_Wrap(outer));
    if (Py_TYPE(gradient.ptr()) != Py_TYPE(rows_[row]) && !is_dtensor(gradient)) return false;
    PyObject* spec = attribute_of(gradient.ptr(), keys().spec);
    if (spec == gradient_specs_[row].ptr()) return true;
    PyObject* own = attribute_of(rows_[row], keys().spec);
    for (PyObject* name : {keys().placements, keys().mesh}) {
      const int equal = PyObject_RichCompareBool(attribute_of(spec, name), attribute_of(own, name), Py_EQ);
      if (equal < 0) throw py::error_already_set();
      if (equal == 0) return false;
    }
    gradient_specs_[row] = py::reinterpret_borrow<py::object>(spec);
    return true;
  }

  // What rows further on will be asked for, a link of the chain at a time: after forward and backward pass, or with
  // thousands of tensors, each link is a cache miss, and the processor cannot foresee it.
  void fetch_ahead(size_t row) const {
    if (any_sharded_) return;
    const auto impl = [this](size_t r) { return THPVariable_Unpack(rows_[r]).unsafeGetTensorImpl(); };
    if (row + 16 < rows_.size()) __builtin_prefetch(rows_[row + 16]);
    if (row + 12 < rows_.size()) {
      fetch_tensor(impl(row + 12));
      if (buffers_[row + 12] != nullptr) fetch_tensor(buffers_[row + 12]);
    }
    if (row + 8 < rows_.size()) {
      __builtin_prefetch(impl(row + 8)->autograd_meta());
      fetch_storage(impl(row + 8));
      if (buffers_[row + 8] != nullptr) fetch_storage(buffers_[row + 8]);
    }
    if (row + 6 < rows_.size())
      if (const at::Tensor& gradient = impl(row + 6)->grad(); gradient.defined())
        fetch_tensor(gradient.unsafeGetTensorImpl());
    if (row + 3 < rows_.size())
      if (const at::Tensor& gradient = impl(row + 3)->grad(); gradient.defined())
        fetch_storage(gradient.unsafeGetTensorImpl());
  }
  static void fetch_tensor(const c10::TensorImpl* tensor) { fetch(tensor, sizeof(c10::TensorImpl)); }
  static void fetch_storage(const c10::TensorImpl* tensor) {
    if (const auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl(); storage != nullptr)
      fetch(storage, sizeof(c10::StorageImpl));
  }
  static void fetch(const void* object, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(object) + at);
  }

  bool same_groups(PyObject* groups) {
    if (PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* group = PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
      if (!PyDict_Check(group)) return false;
      PyObject* params = item(group, keys().params);
      if (!PyList_Check(params) && !PyTuple_Check(params)) return false;
      if (PySequence_Fast_GET_SIZE(params) != static_cast<Py_ssize_t>(groups_[g].size())) return false;
      PyObject** items = PySequence_Fast_ITEMS(params);
      if (!std::equal(groups_[g].begin(), groups_[g].end(), items)) return false;
      if (!plan_.has_options() && !same_keys(group, keys_of_groups_[g])) return false;
    }
    return true;
  }

  // Whether the group's keys are those that it had when this was first asked: an option is a key more.
  static bool same_keys(PyObject* group, std::vector<py::object>& seen) {
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    if (seen.empty())
      while (PyDict_Next(group, &position, &key, nullptr) != 0) seen.push_back(py::reinterpret_borrow<py::object>(key));
    if (PyDict_GET_SIZE(group) != static_cast<Py_ssize_t>(seen.size())) return false;
    position = 0;
    for (size_t k = 0; PyDict_Next(group, &position, &key, nullptr) != 0; ++k)
      if (key != seen[k].ptr() && !seen[k].equal(py::handle(key))) return false;
    return true;
  }

  bool read_hyperparameters(PyObject* groups) {
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (!group_used_[g]) continue;
      PyObject* group = PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
      PyObject* lr = item(group, keys().lr);
      PyObject* weight_decay = item(group, keys().weight_decay);
      if (wants_autograd(lr) || wants_autograd(weight_decay) || truth(item(group, keys().differentiable))) return false;
      Hyperparameters& h = hyperparameters_[g];
      h.lr = number_or_tensor(lr, keys().lr, g, h.tensors.lr);
      h.momentum = number(item(group, keys().momentum), keys().momentum, g);
      h.one_minus_dampening = one_minus(item(group, keys().dampening), keys().dampening, g);
      h.weight_decay = number_or_tensor(weight_decay, keys().weight_decay, g, h.tensors.weight_decay);
      h.nesterov = truth(item(group, keys().nesterov));
      h.maximize = truth(item(group, keys().maximize));
    }
    return true;
  }

  // A tensor on the plan's own kind of device is read there, in the step; asking for its value now would wait for it.
  double number_or_tensor(PyObject* value, PyObject* name, size_t g, at::Tensor& tensor) const {
    if (plan_.target() == Target::cpu || PyFloat_CheckExact(value) || !THPVariable_Check(value))
      return number(value, name, g);
    const at::Tensor& given = THPVariable_Unpack(value);
    if (!plan_.can_read(given)) return number(value, name, g);
    tensor = given;
    return 0;
  }

  // Walks the state in its own order, so that no tensor need be hashed, and finds the momentum buffers of the rows.
  bool read_buffers(const py::handle state) {
    return walk_state(state.ptr()) || (replaced_state(state) && walk_state(state.ptr()));
  }
  // Other entries than before, or in another order, as load_state_dict() makes them. Not with what only options keep:
  // that may have to be converted first.
  bool replaced_state(const py::handle state) {
    if (plan_.has_options()) return false;
    read_state(py::reinterpret_borrow<py::dict>(state));
    Py_ssize_t position = 0;
    PyObject* value = nullptr;
    while (PyDict_Next(state.ptr(), &position, nullptr, &value) != 0)
      if (!PyDict_Check(value) || PyDict_GET_SIZE(value) > 1) return false;
    return true;
  }
  bool walk_state(PyObject* state) {
    if (PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(entries_.size())) return false;
    buffers_.assign(rows_.size(), nullptr);
    if (plan_.has_options()) option_tensors_.assign(rows_.size(), {});
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (size_t e = 0; PyDict_Next(state, &position, &key, &value) != 0; ++e) {
      if (key != entries_[e].key) return false;
      if (entries_[e].row < 0) continue;
      if (!PyDict_Check(value)) return false;
      if (e + 8 < entries_.size())
        for (const void* place : entries_[e + 8].places) __builtin_prefetch(place);
      entries_[e].places[0] = value;
      entries_[e].places[1] = reinterpret_cast<PyDictObject*>(value)->ma_keys;
      if (plan_.has_options()) {
        if (!read_option_state(value, static_cast<size_t>(entries_[e].row))) return false;
        continue;
      }
      PyObject* buffer = momentum_buffer_in(value);
      if (buffer == nullptr || buffer == Py_None) continue;
      if (!THPVariable_Check(buffer)) return false;
      entries_[e].places[2] = buffer;
      const auto row = static_cast<size_t>(entries_[e].row);
      if (is_sharded_[row]) {
        if (!is_dtensor(buffer)) return false;
        buffer = local_of(buffer);
      }
      buffers_[row] = THPVariable_Unpack(buffer).unsafeGetTensorImpl();
    }
    return true;
  }

  // All of a parameter's state that a plan with options looks at, in one walk.
  bool read_option_state(PyObject* state_of_param, size_t row) {
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    while (PyDict_Next(state_of_param, &position, &key, &value) != 0) {
      const int place = place_in_state(key);
      if (place == kNowhere || value == Py_None) continue;
      if (!THPVariable_Check(value)) return false;
      if (is_sharded_[row]) {
        if (!is_dtensor(value)) return false;
        value = local_of(value);
      }
      const c10::TensorImpl* tensor = THPVariable_Unpack(value).unsafeGetTensorImpl();
      (place == kMomentumBuffer ? buffers_[row] : option_tensors_[row][static_cast<size_t>(place)]) = tensor;
    }
    return true;
  }

  struct Entry {
    PyObject* key;
    int64_t row;  // -1: not a row of this plan
    // Where its dict, the dict's entries and its momentum buffer lay in the last step. Fetched ahead, never read: they
    // may be gone by now.
    std::array<const void*, 3> places{};
  };
  std::vector<py::object> hosts_;  // of a hosted target, one a device
  StepPlan plan_;
  std::vector<PyObject*> rows_;
  std::vector<bool> is_sharded_;  // of the rows: a DTensor
  bool any_sharded_ = false;
  std::vector<py::object> gradient_specs_;  // of DTensors: of the last gradient, which was found to be the parameter's
  std::vector<size_t> sharded_written_;     // rows of the step under way
  std::unordered_map<PyObject*, int64_t> row_of_;
  std::vector<std::vector<PyObject*>> groups_;
  std::vector<std::vector<py::object>> keys_of_groups_;  // strings, which close no cycle
  std::vector<bool> group_used_;
  std::vector<Entry> entries_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<const c10::TensorImpl*> buffers_;
  std::vector<std::array<const c10::TensorImpl*, kOptionTensors>> option_tensors_;  // if any row has options
  Norm norm_;
  std::vector<std::pair<int64_t, std::string>> left_;
  bool has_stepped_ = false;
  bool is_void_ = false;  // rows point to tensors of which it is not known how they overlap
  bool was_skipped_ = false;
};

// torch.ops.wd_fused.sgd_ by a host's kernels.
void hosted_sgd(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
                const std::vector<at::Tensor>& momentum_buffers, const std::vector<bool>& first_steps, double lr,
                double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                const std::string& numerics, const py::object& make_host) {
  c10::List<bool> firsts;
  for (const bool first : first_steps) firsts.push_back(first);
  const auto make_step = [&](c10::Device device, std::vector<Row> rows, std::vector<bool> serial) {
    return std::make_unique<HostedStep>(device, std::move(rows), std::move(serial), numerics_named(numerics),
                                        make_host(device));
  };
  sgd(Target::hosted, make_step, params, grads, momentum_buffers, firsts,
      {lr, momentum, 1 - dampening, weight_decay, nesterov, maximize}, numerics_named(numerics));
}

constexpr const char* kIsaNames[] = {"baseline", "avx2"};

void use_isa_named(const std::string& name) {
  for (int isa = 0; isa <= static_cast<int>(best_cpu_isa()); ++isa)
    if (name == kIsaNames[isa]) return use_cpu_isa(static_cast<CpuIsa>(isa));
  throw py::value_error("cpu_isa=" + name + ": this processor has " + kIsaNames[static_cast<size_t>(best_cpu_isa())] +
                        " at most");
}

std::optional<std::string> unless_empty(std::string reason) {
  if (reason.empty()) return std::nullopt;
  return reason;
}

std::string rule_name() {
  switch (multiply_add_rule()) {
    case MultiplyAddRule::fused:
      return "fused";
    case MultiplyAddRule::separate:
      return "separate";
    default:
      return "mixed";
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const c10::OutOfMemoryError& e) {
      PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });
  module.def("why_not_planned", [](const at::Tensor& tensor, const std::string& target) {
    return unless_empty(why_not_planned(tensor, target_named(target)));
  });
  module.def("surely_taken", [](const py::list& params, const py::dict& state, const std::string& target) {
    return surely_taken(params, state, target_named(target));
  });
  module.def("cuda_architectures", cuda_architectures);
  module.def("why_not_cuda", [](int device) {
    return unless_empty(why_not_on(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))));
  });
  module.def("multiply_add_rule", rule_name);
  // Whether anybody (profiler, NVTX, execution trace) listens to torch.autograd.profiler.record_function.
  module.def("is_observed", [] { return at::hasCallbacks(); });
  module.def("cpu_isa", [] { return kIsaNames[static_cast<size_t>(cpu_isa())]; });
  module.def("use_cpu_isa", use_isa_named);
  module.def("hosted_sgd", hosted_sgd, py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"),
             py::arg("first_steps"), py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
             py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), py::arg("numerics"),
             py::arg("make_host"));
  py::class_<PythonPlan>(module, "StepPlan", py::module_local())
      .def(py::init<const py::list&, const py::list&, const py::dict&, const std::string&, const std::string&,
                    const py::object&>(),
           py::arg("parameters"), py::arg("groups"), py::arg("state"), py::arg("numerics"), py::arg("target"),
           py::arg("make_host") = py::none())
      .def("prepare", &PythonPlan::prepare, py::arg("groups"), py::arg("state"), py::arg("options") = py::none())
      .def("left", &PythonPlan::left)
      .def("keep_off", &PythonPlan::keep_off)
      .def("abandon", &PythonPlan::abandon)
      .def("sums", &PythonPlan::sums, py::arg("grad_scale") = py::none())
      .def("launch", &PythonPlan::launch, py::arg("coefficients") = py::none(), py::arg("grad_scale") = py::none())
      .def("step", &PythonPlan::step, py::arg("groups"), py::arg("state"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("options") = py::none())
      .def("grad_norm", &PythonPlan::grad_norm)
      .def("was_skipped", &PythonPlan::was_skipped)
      .def("launches", &PythonPlan::launches)
      .def("tables", &PythonPlan::tables)
      .def("read_state", &PythonPlan::read_state);
}

}  // namespace wd_fused
