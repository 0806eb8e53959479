// A step of Python's objects: checked, then done. The optimizer itself is read in python_reader.cpp.
#include "python/python_plan.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <iterator>

#include "python/hosted_step.h"

namespace wd_fused {
namespace {

// Elements from which a step, then of some tenths of a millisecond, gives other Python threads a turn: for that, every
// tensor must be held, which costs a model of many small ones more than the turn is worth.
constexpr int64_t kReleaseGil = int64_t{1} << 20;

void fetch(const void* object, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(object) + at);
}
void fetch_tensor(const c10::TensorImpl* tensor) { fetch(tensor, sizeof(c10::TensorImpl)); }
void fetch_storage(const c10::TensorImpl* tensor) {
  if (const auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl(); storage != nullptr)
    fetch(storage, sizeof(c10::StorageImpl));
}

// wd_fused/options/spec.py's RowOptions: weights, stochastic, momentum_dtype, extra, momentum_scale, ema, averages,
// clips, zeroes, place.
void read_row_options(const py::handle value, PlannedParameter& parameter) {
  if (value.is_none()) return;
  const auto fields = value.cast<py::tuple>();
  RowOptions& options = parameter.options;
  options.is_used = true;
  const auto name = fields[0].cast<std::string>();
  const auto known = std::find(std::begin(kWeightsNames), std::end(kWeightsNames), name);
  if (known == std::end(kWeightsNames)) throw py::value_error("weights=" + name);
  options.weights = static_cast<Weights>(known - std::begin(kWeightsNames));
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
  if (fields[9].is_none()) return;
  const auto place = fields[9].cast<std::vector<int64_t>>();
  options.first_index = place.front();
  parameter.place.assign(place.begin() + 1, place.end());
}

}  // namespace

PythonPlan::PythonPlan(const py::list& parameters, const py::list& groups, const py::dict& state,
                       const std::string& numerics, const std::string& target, const py::object& make_host)
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

int64_t PythonPlan::prepare(const py::handle groups, const py::handle state, const py::handle options) {
  was_skipped_ = false;
  const int64_t result = check(groups, state, {}, options);
  if (result >= 0) hold_memory();
  return result;
}

bool PythonPlan::keep_off(const std::vector<std::pair<uintptr_t, uintptr_t>>& others) {
  std::vector<Extent> extents;
  for (const auto& [begin, end] : others) extents.push_back({begin, end, -1});
  return plan_.keep_off(std::move(extents));
}

std::vector<at::Tensor> PythonPlan::sums(const py::handle grad_scale) {
  if (!grad_scale.is_none()) plan_.set_grad_scale(tensor_or_none(grad_scale, "grad_scale"));
  std::vector<at::Tensor> result;
  while_others_run([&] { result = plan_.sums(); });
  return result;
}

py::list PythonPlan::launch(const py::handle coefficients, const py::handle grad_scale) {
  if (!grad_scale.is_none()) plan_.set_grad_scale(tensor_or_none(grad_scale, "grad_scale"));
  if (!coefficients.is_none()) {
    const bool is_tensor = THPVariable_Check(coefficients.ptr());
    plan_.set_coefficients(
        (is_tensor ? py::object(coefficients.attr("tolist")()) : py::reinterpret_borrow<py::object>(coefficients))
            .cast<std::vector<double>>());
  }
  return run();
}

std::optional<at::Tensor> PythonPlan::grad_norm() const {
  const at::Tensor norm = plan_.grad_norm();
  return norm.defined() ? std::optional(norm) : std::nullopt;
}

py::list PythonPlan::run() {
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

py::object PythonPlan::step(const py::handle groups, const py::handle state, const py::handle grad_scale,
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

py::list PythonPlan::launches() const {
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

py::list PythonPlan::tables() const {
  py::list result;
  for (const std::vector<std::byte>& table : plan_.tables())
    result.append(py::bytes(reinterpret_cast<const char*>(table.data()), table.size()));
  return result;
}

int64_t PythonPlan::check(const py::handle groups, const py::handle state, const Amp& amp, const py::handle options) {
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

py::object PythonPlan::skipped() {
  plan_.abandon();
  was_skipped_ = true;
  return py::list();
}

bool PythonPlan::point_anew() {
  if (any_sharded_) return false;
  for (size_t r = 0; r < rows_.size(); ++r)
    if (!plan_.point_anew(static_cast<int64_t>(r), param_of(r), buffers_[r],
                          plan_.has_options() ? option_tensors_[r].data() : nullptr))
      return false;
  return plan_.overlaps_as_before();
}

// What rows further on will be asked for, a link of the chain at a time: after forward and backward pass, or with
// thousands of tensors, each link is a cache miss, and the processor cannot foresee it.
void PythonPlan::fetch_ahead(size_t row) const {
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

int64_t PythonPlan::check_all(const py::handle groups, const py::handle state, const Amp& amp,
                              const py::handle options) {
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

bool PythonPlan::takes_long() const { return plan_.target() == Target::cpu && plan_.elements() > kReleaseGil; }

bool PythonPlan::can_read(const Amp& amp) const {
  if (plan_.target() == Target::cpu && !plan_.is_only_options()) return false;
  for (const at::Tensor* tensor : {&amp.grad_scale, &amp.found_inf})
    if (tensor->defined() && !(plan_.can_read(*tensor) && tensor->scalar_type() == at::kFloat)) return false;
  return true;
}

int64_t PythonPlan::leave_all(const std::string& reason) {
  left_.clear();
  for (size_t r = 0; r < rows_.size(); ++r) left_.emplace_back(static_cast<int64_t>(r), reason);
  plan_.abandon();
  return static_cast<int64_t>(left_.size());
}

void PythonPlan::hold_memory() {
  for (size_t r = 0; r < rows_.size(); ++r)
    if (!is_sharded_[r] || has_gradient_of_its_placement(r))
      plan_.hold_memory(static_cast<int64_t>(r), param_of(r), gradient_of(r));
}

std::vector<PlannedParameter> PythonPlan::planned(const py::list& parameters) {
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

}  // namespace wd_fused
