// Which parameters a plan surely takes, asked in one pass of Python's objects. Used by module.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "plan/step_plan.h"

namespace wd_fused {

// For each parameter its momentum buffer, or None where it has none; False where there is more to ask than this does:
// backends.py then tells who takes it, and why. For parameters whose group has no option.
pybind11::list surely_taken(const pybind11::list& params, const pybind11::dict& state, Target target);

}  // namespace wd_fused
