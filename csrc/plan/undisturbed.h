// What a plan makes for itself is made of plain tensors, whatever the user is in the middle of. Used by step_plan.cpp
// and cuda_step.cpp.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace wd_fused {

// As long as it lives no mode (fake tensors, inference, a tracker of operators, a function transform) has a say in what
// torch makes for us.
class Undisturbed {
  c10::impl::ExcludeDispatchKeyGuard no_modes_{c10::python_ks |
                                               c10::DispatchKeySet({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                                                    c10::DispatchKey::FuncTorchDynamicLayerBackMode})};
  c10::InferenceMode lasting_{false};
};

}  // namespace wd_fused
