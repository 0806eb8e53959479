// The compiled module: what Python sees of it.
#include <ATen/record_function.h>

#include "python/choice.h"
#include "python/hosted_step.h"
#include "python/ops.h"
#include "python/python_plan.h"

namespace wd_fused {
namespace {

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
