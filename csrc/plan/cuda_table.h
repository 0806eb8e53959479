// A device's rows as the CUDA kernel wants them: cut into tiles, packed into as few launches as their parameters fit
// into. Plain C++: no torch, no CUDA. Built and asked by cuda_step.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/cuda_launch.h"
#include "plan/tensor_table.h"

namespace wd_fused {

// A hyperparameter that lies in device memory; kind `value`: it does not.
struct DeviceScalar {
  const void* address = nullptr;
  ScalarKind kind = ScalarKind::value;
};

// What a launch must know of a group, beyond what the CPU needs.
struct CudaGroupInput {
  DeviceScalar lr;
  DeviceScalar weight_decay;
  bool has_momentum;
};

// What torch.amp.GradScaler has the kernel read on the device; null where there is no such thing.
struct CudaAmp {
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
};

// A group's hyperparameters for rows of one storage, as kernels read them.
CudaGroup in_words(const GroupScalars& scalars, const CudaGroupInput& input, Storage storage);

// The rows that one launch steps, and the groups that they are of, each for one storage.
struct PackedRows {
  struct Group {
    int32_t group;
    Storage storage;
  };
  std::vector<int32_t> rows;
  std::vector<Group> groups;

  size_t words(size_t words_of_group) const { return rows.size() + groups.size() * words_of_group; }
  // Where a group is named.
  int32_t place_of(int32_t group, Storage storage) const;
};

// As few launches as rows fit into whose parameters have room for `words`: one for each row, words_of_group for each
// group. serial: rows that may share memory; they come last, in order, each in a launch of its own.
std::vector<PackedRows> packed(const std::vector<Row>& rows, const std::vector<bool>& serial, size_t words,
                               size_t words_of_group);

// Layouts as kernels read them: number of dimensions, sizes, then the strides of each operand.
struct PackedLayouts {
  std::vector<int64_t> words;
  std::vector<int64_t> at;  // where each row's begins; -1: its operands are flat
};
PackedLayouts packed(const std::vector<const StridedLayout*>& layouts);

class CudaTable {
 public:
  struct Launch {
    CudaKernel kernel;
    std::vector<int32_t> rows;  // of which it steps those with gradients
    int blocks;
    int64_t first_tile;
    int32_t block_tiles;
    int32_t tiles;

   private:
    friend class CudaTable;
    std::vector<PackedRows::Group> groups;
    std::vector<uint64_t> parameters;
  };

  // serial: rows that may share memory, and must run in order, each in a launch of its own. layouts: null where a row's
  // operands are flat.
  CudaTable(const std::vector<Row>& rows, const std::vector<bool>& serial,
            const std::vector<const StridedLayout*>& layouts, Numerics numerics);

  // What must lie in device memory, at an address of 16 bytes' alignment: tiles, then layouts.
  const std::vector<std::byte>& bytes() const { return bytes_; }
  const std::vector<Launch>& launches() const { return launches_; }

  // The parameter block of a launch: launch.kernel.parameter_bytes bytes, good until the next call for that launch.
  // Null where none of its rows has a gradient. on_device: where bytes() lies.
  const void* parameters(size_t launch, const void* on_device, const std::vector<RowInput>& inputs,
                         const std::vector<GroupScalars>& scalars, const std::vector<CudaGroupInput>& groups,
                         const CudaAmp& amp);

 private:
  static void add_tiles(const std::vector<Row>& rows, const std::vector<int64_t>& layout_of, const PackedRows& of,
                        Launch& launch, std::vector<CudaTile>& tiles);

  std::vector<std::byte> bytes_;
  size_t layouts_at_ = 0;  // in bytes_
  std::vector<Launch> launches_;
};

}  // namespace wd_fused
