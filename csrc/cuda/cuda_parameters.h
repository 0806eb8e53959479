// A device's rows as the CUDA kernels take them: which kernels, the table, the parameter block of each launch of a
// step. Plain C++: no torch, no CUDA. Built and asked by cuda_step.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/cuda_launch.h"

namespace wd_fused {

class CudaPlan {
 public:
  struct Launch {
    CudaKernel kernel;
    int blocks;
    size_t tensors;
    int32_t tiles;
    // The parameter block, kernel.parameter_bytes, good until the next step is asked for.
    std::vector<uint64_t> parameters;
  };

  // As Table's; groups: of the plan.
  CudaPlan(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options, const std::vector<bool>& serial,
           const std::vector<const StridedLayout*>& layouts, size_t groups, Numerics numerics);

  const Table& table() const { return table_; }
  bool is_empty() const { return launches_.empty(); }
  bool has_norm() const { return !norm_launches_.empty(); }
  size_t sums_at() const { return sums_at_; }    // in the table's bytes: float64 [groups]
  size_t norms_at() const { return norms_at_; }  // float32 or float64, one or [groups]
  // Every kernel that a step may take.
  std::vector<CudaKernel> kernels() const;

  // The launches of a step, by which those that form a norm come first; on_device: where the table lies.
  const std::vector<Launch>& norms(const void* on_device, const StepOptionsInput& step);
  std::vector<const Launch*> updates(const void* on_device, const StepOptionsInput& step);

 private:
  Table table_;
  NormTiles norm_tiles_;
  std::vector<Launch> launches_;  // the table's
  std::vector<Launch> norm_launches_;
  std::vector<Storage> storages_;         // of the rows
  std::vector<bool> takes_any_gradient_;  // a row with options: else its gradient is stored as it is
  bool has_options_;
  size_t norm_tiles_at_ = 0;
  size_t norm_groups_at_ = 0;
  size_t norm_state_at_ = 0;
  size_t sums_at_ = 0;
  size_t norms_at_ = 0;
  size_t partials_at_ = 0;
};

}  // namespace wd_fused
