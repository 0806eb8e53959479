// What is asked of Python's objects: numbers, tensors, DTensors. Used by python_plan.cpp and python_reader.cpp.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "plan/step_plan.h"

namespace wd_fused {

namespace py = pybind11;

inline PyObject* interned(const char* text) {
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
  // Of the options: the first three stand for one of OptionTensors' places, since a row has but one of them.
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
inline const Keys& keys() {
  static const Keys all;
  return all;
}

inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return value;
}

inline double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

// A hyperparameter of a group. What is no number is a TypeError that names it.
inline double number(PyObject* value, PyObject* name, size_t g) {
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
inline double one_minus(PyObject* value, PyObject* name, size_t g) {
  const double given = number(value, name, g);
  if (PyFloat_CheckExact(value) || PyLong_CheckExact(value)) return 1 - given;
  const auto difference = py::reinterpret_steal<py::object>(PyNumber_Subtract(py::int_(1).ptr(), value));
  if (!difference) throw py::error_already_set();
  return number(difference.ptr());
}

inline bool truth(PyObject* value) {
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

inline at::Tensor tensor_or_none(const py::handle value, const char* name) {
  if (value.is_none()) return {};
  if (!THPVariable_Check(value.ptr()))
    throw py::type_error(std::string(name) + " must be a Tensor or None, as torch.amp.GradScaler sets it");
  return THPVariable_Unpack(value.ptr());
}

inline at::Tensor tensor_or_undefined(const py::handle value) {
  return value.is_none() ? at::Tensor() : value.cast<at::Tensor>();
}

// --- DTensors: what is stepped of one is the tensor that it has in this process

inline bool is_dtensor(const py::handle tensor) {
  return THPVariable_Check(tensor.ptr()) && THPVariable_Unpack(tensor.ptr()).key_set().has(c10::DispatchKey::Python) &&
         PyObject_HasAttr(tensor.ptr(), keys().local_tensor) != 0;
}
// An attribute that the object keeps: borrowed.
inline PyObject* attribute_of(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  Py_DECREF(value);
  return value;
}
inline PyObject* local_of(PyObject* dtensor) {
  PyObject* local = attribute_of(dtensor, keys().local_tensor);
  if (!THPVariable_Check(local)) throw py::type_error("the local tensor of a DTensor is not a Tensor");
  return local;
}
// Of any tensor, or None.
inline at::Tensor local_or_undefined(const py::handle value) {
  return is_dtensor(value) ? THPVariable_Unpack(local_of(value.ptr())) : tensor_or_undefined(value);
}

inline bool wants_autograd(PyObject* value) {
  return !PyFloat_CheckExact(value) && THPVariable_Check(value) && THPVariable_Unpack(value).requires_grad();
}

inline Numerics numerics_named(const std::string& name) {
  return name == "opmath" ? Numerics::opmath : Numerics::torch;
}

inline Target target_named(const std::string& name) {
  if (name == "cpu") return Target::cpu;
  if (name == "cuda") return Target::cuda;
  if (name == "hosted") return Target::hosted;
  throw py::value_error("target=" + name + ": choose cpu, cuda or hosted");
}

}  // namespace wd_fused
