// The usual parameter in a fraction of a microsecond, where asking backends.py takes tens. Called by module.cpp.
#include "python/choice.h"

#include <torch/csrc/autograd/python_variable.h>

#include <unordered_map>

#include "plan/plan_tensors.h"

namespace py = pybind11;

namespace wd_fused {
namespace {

// Not of a class that may have a __torch_function__ of its own, nor a DTensor.
bool is_of_torchs_classes(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

bool is_taken_buffer(PyObject* buffer, const at::Tensor& param, Target target) {
  if (!is_of_torchs_classes(buffer)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(buffer);
  if (tensor.dtype() != param.dtype() || tensor.device() != param.device() || tensor.sizes() != param.sizes() ||
      !why_not_planned(tensor, target).empty())
    return false;
  const Extent own = extent_of(*tensor.unsafeGetTensorImpl(), 0);
  const Extent of_param = extent_of(*param.unsafeGetTensorImpl(), 0);
  return std::max(own.begin, of_param.begin) >= std::min(own.end, of_param.end);
}

}  // namespace

py::list surely_taken(const py::list& params, const py::dict& state, Target target) {
  // By address, as the state is walked: to hash a tensor takes a call of a function in Python.
  std::unordered_map<PyObject*, PyObject*> entries;
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  while (PyDict_Next(state.ptr(), &position, &key, &value) != 0) entries.emplace(key, value);
  const auto momentum_buffer = py::str("momentum_buffer");
  const auto answer = [&](PyObject* object) -> PyObject* {
    if (!is_of_torchs_classes(object)) return Py_False;
    const at::Tensor& param = THPVariable_Unpack(object);
    if (!why_not_planned(param, target).empty()) return Py_False;
    const auto entry = entries.find(object);
    if (entry == entries.end()) return Py_None;
    if (!PyDict_Check(entry->second)) return Py_False;
    PyObject* buffer = PyDict_GetItemWithError(entry->second, momentum_buffer.ptr());
    if (buffer == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (buffer == nullptr || buffer == Py_None) return Py_None;
    return is_taken_buffer(buffer, param, target) ? buffer : Py_False;
  };
  py::list result(params.size());
  for (size_t i = 0; i < params.size(); ++i) result[i] = py::reinterpret_borrow<py::object>(answer(params[i].ptr()));
  return result;
}

}  // namespace wd_fused
