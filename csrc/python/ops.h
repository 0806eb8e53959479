// One step without an optimizer, as torch.ops.wd_fused.sgd_ does it. Called by ops.cpp and module.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "plan/step_plan.h"

namespace wd_fused {

// momentum_buffers, first_steps: none without momentum. make_step: for a hosted target.
void sgd(Target target, const MakeDeviceStep& make_step, at::TensorList params, at::TensorList grads,
         at::TensorList momentum_buffers, const c10::List<bool>& first_steps, const Hyperparameters& hyperparameters,
         Numerics numerics);

}  // namespace wd_fused
