// The operators torch.ops.wd_fused.*, for functional use and torch.compile: schema, CPU, CUDA and Meta. FusedSGD.step()
// does not come through here: a dispatched call with three lists of tensors costs more than a step of a small model.
#include "python/ops.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <stdexcept>

namespace wd_fused {
namespace {

void check_lists(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 const c10::List<bool>& first_steps, double momentum) {
  TORCH_CHECK_VALUE(params.size() == grads.size(), "sgd_: ", params.size(), " params but ", grads.size(), " grads");
  const size_t buffers = momentum == 0 ? 0 : params.size();
  TORCH_CHECK_VALUE(momentum_buffers.size() == buffers && first_steps.size() == buffers, "sgd_: momentum=", momentum,
                    " needs ", buffers, " momentum_buffers and first_steps, got ", momentum_buffers.size(), " and ",
                    first_steps.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_VALUE(params[i].sizes() == grads[i].sizes(), "sgd_: tensor ", i, ": param has shape ",
                      params[i].sizes(), ", grad ", grads[i].sizes());
    TORCH_CHECK_VALUE(buffers == 0 || params[i].sizes() == momentum_buffers[i].sizes(), "sgd_: tensor ", i,
                      ": param has shape ", params[i].sizes(), ", momentum buffer ", momentum_buffers[i].sizes());
  }
}

template <Target kTarget>
void sgd_of(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first_steps,
            double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
            bool opmath) {
  sgd(kTarget, {}, params, grads, momentum_buffers, first_steps,
      {lr, momentum, 1 - dampening, weight_decay, nesterov, maximize}, opmath ? Numerics::opmath : Numerics::torch);
}

// Shapes only: nothing is allocated and nothing returned.
void sgd_meta(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first_steps,
              double /*lr*/, double momentum, double /*dampening*/, double /*weight_decay*/, bool /*nesterov*/,
              bool /*maximize*/, bool /*opmath*/) {
  check_lists(params, grads, momentum_buffers, first_steps, momentum);
}

}  // namespace

void sgd(Target target, const MakeDeviceStep& make_step, at::TensorList params, at::TensorList grads,
         at::TensorList momentum_buffers, const c10::List<bool>& first_steps, const Hyperparameters& hyperparameters,
         Numerics numerics) {
  const bool has_momentum = hyperparameters.momentum != 0;
  check_lists(params, grads, momentum_buffers, first_steps, hyperparameters.momentum);
  std::vector<PlannedParameter> parameters;
  parameters.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i)
    parameters.push_back(
        {params[i], has_momentum ? momentum_buffers[i] : at::Tensor(), 0, static_cast<int64_t>(i), {}, {}});
  StepPlan plan(std::move(parameters), numerics, target, make_step);
  plan.begin({hyperparameters});
  for (size_t i = 0; i < params.size(); ++i) {
    const auto reading =
        plan.read(static_cast<int64_t>(i), params[i], grads[i],
                  has_momentum ? momentum_buffers[i].unsafeGetTensorImpl() : nullptr, has_momentum && first_steps[i]);
    TORCH_CHECK(reading == StepPlan::Reading::taken, "sgd_: tensor ", i, " cannot be stepped: ",
                reading == StepPlan::Reading::no_gradient ? "its grad is undefined" : plan.why_left());
  }
  plan.make_ready();
  plan.run();
}

TORCH_LIBRARY(wd_fused, library) {
  library.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first_steps, *, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool opmath=False) -> ()");
}
TORCH_LIBRARY_IMPL(wd_fused, CPU, library) { library.impl("sgd_", sgd_of<Target::cpu>); }
#if defined(WD_FUSED_CUDA)
TORCH_LIBRARY_IMPL(wd_fused, CUDA, library) { library.impl("sgd_", sgd_of<Target::cuda>); }
#endif
TORCH_LIBRARY_IMPL(wd_fused, Meta, library) { library.impl("sgd_", sgd_meta); }

}  // namespace wd_fused
