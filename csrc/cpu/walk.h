// Steps the tiles of a table on the CPU. Plain C++: threads and torch are the caller's (step_plan.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "plan/tensor_table.h"
#include "update/options.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define WD_FUSED_X86_TARGETS 1
#endif

namespace wd_fused {

struct CpuStep {
  const TensorTable& table;
  const std::vector<RowInput>& inputs;  // one a row
  const std::vector<GroupScalars>& groups;
  Numerics numerics;
  bool fused_multiply_add;                      // the rule that torch follows in this process
  const std::vector<RowOptions>& row_options;   // one a row; none where no row has one
  const std::vector<GroupOptions>& of_options;  // one a group
  bool backwards = false;                       // the last tiles first: their gradients are in the caches, after a norm
};

void sgd_cpu_tiles(const CpuStep& step, int64_t first_tile, int64_t last_tile);
void sgd_cpu_row(const CpuStep& step, int32_t row);
// The sum of the squares of the gradient's elements in each of these tiles, where the row counts in a norm.
void square_cpu_tiles(const CpuStep& step, int64_t first_tile, int64_t last_tile, double* sums);
double square_cpu_row(const CpuStep& step, int32_t row);

// Vector code: what this processor has at most, and what is in use; use_cpu_isa takes one that it has.
enum class CpuIsa : int8_t { baseline, avx2 };
CpuIsa best_cpu_isa();
CpuIsa cpu_isa();
void use_cpu_isa(CpuIsa isa);

}  // namespace wd_fused
