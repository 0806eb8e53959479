// What a plan reads of an optimizer: groups, hyperparameters, options, state. Called by python_plan.cpp.
#include <algorithm>

#include "python/python_plan.h"

namespace wd_fused {
namespace {

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

}  // namespace

void PythonPlan::read_state(const py::dict& state) {
  entries_.clear();
  for (const auto& [key, value] : state) {
    const auto row = row_of_.find(key.ptr());
    entries_.push_back({key.ptr(), row == row_of_.end() ? -1 : row->second, {}});
  }
}

bool PythonPlan::read_options(const py::handle options) {
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

PyObject* PythonPlan::double_dtype() {
  static PyObject* dtype = py::cast(at::kDouble).release().ptr();
  return dtype;
}

bool PythonPlan::has_gradient_of_its_placement(size_t row) {
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

bool PythonPlan::same_groups(PyObject* groups) {
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

bool PythonPlan::same_keys(PyObject* group, std::vector<py::object>& seen) {
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

bool PythonPlan::read_hyperparameters(PyObject* groups) {
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

double PythonPlan::number_or_tensor(PyObject* value, PyObject* name, size_t g, at::Tensor& tensor) const {
  if (plan_.target() == Target::cpu || PyFloat_CheckExact(value) || !THPVariable_Check(value))
    return number(value, name, g);
  const at::Tensor& given = THPVariable_Unpack(value);
  if (!plan_.can_read(given)) return number(value, name, g);
  tensor = given;
  return 0;
}

bool PythonPlan::read_buffers(const py::handle state) {
  return walk_state(state.ptr()) || (replaced_state(state) && walk_state(state.ptr()));
}

bool PythonPlan::replaced_state(const py::handle state) {
  if (plan_.has_options()) return false;
  read_state(py::reinterpret_borrow<py::dict>(state));
  Py_ssize_t position = 0;
  PyObject* value = nullptr;
  while (PyDict_Next(state.ptr(), &position, nullptr, &value) != 0)
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) > 1) return false;
  return true;
}

bool PythonPlan::walk_state(PyObject* state) {
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

bool PythonPlan::read_option_state(PyObject* state_of_param, size_t row) {
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

}  // namespace wd_fused
