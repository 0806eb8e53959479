// What the host tells the CUDA kernels: for every launch a block of parameters, beside the tiles of table.h in device
// memory. Plain C++. Written by cuda_parameters.cpp, read by cuda_*.cuh.
#pragma once

#include <cstdint>
#include <string>

#include "plan/group_words.h"

namespace wd_fused {

inline constexpr int kCudaThreads = 256;  // of a block
inline constexpr int kCudaWarp = 32;
inline constexpr int kCudaWarps = kCudaThreads / kCudaWarp;

// A full tile has as many bytes of the parameter: 4 rounds of a block's threads with two 16-byte accesses each. Larger
// tiles leave multiprocessors idle at the end of a ResNet-50's step (25.6 M elements are 3,124 of these).
inline constexpr int64_t kCudaTileBytes = 32768;
// Tiles up to this size are a warp's work, eight of them a block's: most tensors of a model are that small.
inline constexpr int32_t kWarpTileElements = 1024;
inline constexpr int64_t kNormTileElements = 8192;  // at least

// --- which kernels there are

inline constexpr Kind plain_kind(Storage storage, bool rounds) {
  Kind kind;
  kind.param = kind.momentum = storage;
  kind.rounds = rounds;
  return kind;
}
inline constexpr Kind kPlainKinds[] = {
    plain_kind(Storage::float32, false), plain_kind(Storage::float64, false), plain_kind(Storage::float16, true),
    plain_kind(Storage::float16, false), plain_kind(Storage::bfloat16, true), plain_kind(Storage::bfloat16, false),
};

// With some option on; an average in `average`, int8 standing for none.
inline constexpr Kind kind_with(Storage param, Weights weights, Storage momentum, Storage average = Storage::int8,
                                bool stochastic = false) {
  Kind kind;
  kind.param = param;
  kind.weights = weights;
  kind.momentum = momentum;
  kind.averages = average != Storage::int8;
  if (kind.averages) kind.average = average;
  kind.stochastic = stochastic;
  kind.rounds = bytes_of(param) == 2 && weights == Weights::parameter && momentum == param && !stochastic;
  kind.options = true;
  return kind;
}
inline constexpr Kind kOptionKinds[] = {
    kind_with(Storage::float32, Weights::parameter, Storage::float32),
    kind_with(Storage::float32, Weights::parameter, Storage::float32, Storage::float32),
    kind_with(Storage::float32, Weights::parameter, Storage::bfloat16),
    kind_with(Storage::float32, Weights::parameter, Storage::int8),
    kind_with(Storage::float64, Weights::parameter, Storage::float64),
    kind_with(Storage::float64, Weights::parameter, Storage::float64, Storage::float64),
    kind_with(Storage::float16, Weights::parameter, Storage::float16),
    kind_with(Storage::float16, Weights::parameter, Storage::float16, Storage::float32),
    kind_with(Storage::float16, Weights::full, Storage::float32),
    kind_with(Storage::float16, Weights::full, Storage::float32, Storage::float32),
    kind_with(Storage::float16, Weights::kahan, Storage::float16),
    kind_with(Storage::bfloat16, Weights::parameter, Storage::bfloat16),
    kind_with(Storage::bfloat16, Weights::parameter, Storage::bfloat16, Storage::float32),
    kind_with(Storage::bfloat16, Weights::parameter, Storage::bfloat16, Storage::bfloat16),
    kind_with(Storage::bfloat16, Weights::full, Storage::float32),
    kind_with(Storage::bfloat16, Weights::full, Storage::float32, Storage::float32),
    kind_with(Storage::bfloat16, Weights::full, Storage::bfloat16),
    kind_with(Storage::bfloat16, Weights::full, Storage::int8),
    kind_with(Storage::bfloat16, Weights::split, Storage::float32),
    kind_with(Storage::bfloat16, Weights::split, Storage::float32, Storage::float32),
    kind_with(Storage::bfloat16, Weights::split, Storage::int8),
    kind_with(Storage::bfloat16, Weights::split24, Storage::float32),
    kind_with(Storage::bfloat16, Weights::split24, Storage::int8),
    kind_with(Storage::bfloat16, Weights::kahan, Storage::bfloat16),
    kind_with(Storage::bfloat16, Weights::parameter, Storage::bfloat16, Storage::int8, true),
    kind_with(Storage::bfloat16, Weights::parameter, Storage::float32, Storage::int8, true),
};
inline constexpr uint32_t kGeneralKernel = ~0u;
inline constexpr uint32_t kNormKernel = ~1u;

// id: the code of the kind that the kernel is compiled for, or one of the two above.
struct CudaKernel {
  uint32_t id;
  int parameter_bytes;  // kSmallParameters or kLargeParameters
};
std::string name_of(const CudaKernel& kernel);

// --- parameter blocks

// Of the kernels that step. Small tiles come first, eight of them a block's work; of the others each is one's.
struct CudaHeader {
  const void* tiles;             // this launch's: DeviceTiles, or OptionsTiles
  const int64_t* layouts;        // dims, sizes, strides of StridedLayout's operands; one after another
  const float* grad_scale;       // null: the gradients are not scaled
  const float* found_inf;        // null, or not 0 where the step must do nothing
  const void* norms;             // float or double
  const uint32_t* is_nonfinite;  // null, or not 0 where the step must do nothing
  int32_t small_tiles;
  int32_t tiles_in_launch;
  int32_t rows;  // words before the groups
  uint8_t norm_in_double;
  uint8_t backwards;  // large tiles from the last on: the norm has left their gradients in the L2
  uint8_t unused[2];
};
static_assert(sizeof(CudaHeader) == 64);

// A row's word: its gradient's address, above it the gradient's storage, below it whether this is the row's first step
// with momentum. kIsAveraged: a row without a gradient, of which only the average is updated. 0: not stepped.
inline constexpr uint64_t kFirstStep = 1;
inline constexpr int kGradientStorageBits = 60;  // above any address
inline constexpr uint64_t kIsAveraged = uint64_t{1} << 63;
inline constexpr uint64_t kGradientAddress = (uint64_t{1} << kGradientStorageBits) - 1 - kFirstStep;

inline constexpr int kSmallParameters = 4096;   // what every CUDA has taken; 493 tensors of one group
inline constexpr int kLargeParameters = 32760;  // 32,764 is the most that CUDA 12.1 and later take
// All of a launch's parameters: the header; for each row a word; then the groups, CudaGroupOptions.
template <int kBytes>
struct CudaParameters {
  CudaHeader header;
  uint64_t words[(kBytes - sizeof(CudaHeader)) / sizeof(uint64_t)];
};
static_assert(sizeof(CudaParameters<kSmallParameters>) == kSmallParameters);
static_assert(sizeof(CudaParameters<kLargeParameters>) == kLargeParameters);

// What the norm is formed in: one a device. The host uploads it as zeros.
struct CudaNormState {
  uint32_t blocks_done;   // of the launch that finishes the norm; 0 between steps
  uint32_t is_nonfinite;  // some norm is
};
struct CudaNormHeader {
  const NormTile* tiles;
  const int64_t* layouts;
  const float* grad_scale;
  double* partials;
  const NormGroup* groups;  // of the plan
  double* sums;             // of squares, of all groups
  void* norms;              // float or double: one, or one a group
  CudaNormState* state;
  int32_t small_tiles;
  int32_t tiles_in_launch;
  int32_t group_count;
  uint8_t per_group, in_double;
  uint8_t finishes;  // the last launch does
  uint8_t unused;
};
// Of the norm's kernel: the header, then the rows' words.
struct CudaNormParameters {
  CudaNormHeader header;
  uint64_t words[(kSmallParameters - sizeof(CudaNormHeader)) / sizeof(uint64_t)];
};
static_assert(sizeof(CudaNormParameters) == kSmallParameters);

}  // namespace wd_fused
