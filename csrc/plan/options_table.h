// A device's rows, of which some have a tail, as options_cuda.cuh wants them: cut into tiles, packed into as few
// launches as their parameters fit into, with the memory in which the norm of the gradients is formed. Plain C++. Built
// and asked by cuda_step.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "plan/cuda_table.h"
#include "plan/options_launch.h"

namespace wd_fused {

// All of a step that kernels of a tail must know.
struct TailStepInput {
  const std::vector<RowInput>& rows;
  const std::vector<GroupScalars>& scalars;
  const std::vector<CudaGroupInput>& groups;
  const std::vector<GroupTail>& tails;  // one a group
  const std::vector<GroupStep>& steps;  // the same before conversions
  const Norm& norm;
  const CudaAmp& amp;
};

// A group's numbers for rows of one storage, as kernels read them.
CudaTailGroup in_words(const PackedRows::Group& of, const TailStepInput& step);

class CudaTailTable {
 public:
  // What one launch of the update's kernel steps, and one of the norm's sums.
  struct Launch {
    CudaTable::Launch update;
    CudaTable::Launch norm;
    bool steps;  // in the step that parameters() was last asked for, the update has something to do,
    bool sums;   // and the norm
    bool any_float64;

   private:
    friend class CudaTailTable;
    bool has_norm;  // some row counts in one
    bool all_in_float32;
    std::vector<PackedRows::Group> groups;
    std::vector<uint64_t> parameters;
  };

  // serial, layouts: as CudaTable's. tails: one a row. groups: of the plan.
  CudaTailTable(const std::vector<Row>& rows, const std::vector<RowTail>& tails, const std::vector<bool>& serial,
                const std::vector<const StridedLayout*>& layouts, size_t groups, Numerics numerics);

  // What must lie in device memory, at an address of 16 bytes' alignment: what the kernels read, then what they write.
  const std::vector<std::byte>& bytes() const { return bytes_; }
  size_t sums_at() const { return sums_at_; }    // in bytes(): float64 [groups]
  size_t norms_at() const { return norms_at_; }  // float32 or float64, one or [groups]
  size_t groups() const { return groups_; }
  std::vector<Launch>& launches() { return launches_; }
  const std::vector<Launch>& launches() const { return launches_; }

  // Whether the step forms a norm, and coefficients from it, on the device.
  static bool forms_norm(const Norm& norm) { return norm.is_used && norm.coefficients.empty(); }

  // The parameter block of a launch, for both kernels: update.kernel.parameter_bytes bytes, good until the next call
  // for that launch. Settles which kernel the update takes.
  const void* parameters(size_t launch, const void* on_device, const TailStepInput& step);

 private:
  static void add_tiles(const std::vector<Row>& rows, const std::vector<RowTail>& tails,
                        const std::vector<int64_t>& layout_of, Numerics numerics, const PackedRows& of, Launch& launch,
                        std::vector<CudaTailTile>& tiles);
  // Where each tile's sum of squares goes: tiles of a group that one block sums share a place, and a group's places
  // follow one another.
  void add_slots(const std::vector<Row>& rows, const std::vector<RowTail>& tails,
                 const std::vector<CudaTailTile>& tiles);

  std::vector<Launch> launches_;
  std::vector<std::optional<Storage>> storages_;  // of the rows' gradients, where a row has no tail
  std::vector<int32_t> slots_;
  std::vector<CudaNormGroup> norm_groups_;
  size_t groups_;
  size_t partials_ = 0;
  std::vector<std::byte> bytes_;
  size_t layouts_at_ = 0;  // in bytes_
  size_t slots_at_ = 0;
  size_t norm_groups_at_ = 0;
  size_t norm_state_at_ = 0;
  size_t sums_at_ = 0;
  size_t norms_at_ = 0;
  size_t partials_at_ = 0;
};

}  // namespace wd_fused
