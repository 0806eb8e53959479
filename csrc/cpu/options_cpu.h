// Steps tiles of rows with a tail on the CPU, and sums the squares of gradients. Plain C++. Called by sgd_cpu.cpp and
// step_plan.cpp.
#pragma once

#include <vector>

#include "cpu/sgd_cpu.h"
#include "update/options.h"

namespace wd_fused {

// Elements [begin, begin + count) of a row; begin is a multiple of kMomentumBlock.
void tail_cpu_piece(const CpuStep& step, int32_t row, int64_t begin, int64_t count);

// The sum of the squares of a row's gradient, unscaled, in double; the same for every instruction set.
double squares_of_piece(const CpuStep& step, int32_t row, int64_t begin, int64_t count);

}  // namespace wd_fused
