// A piece of a row in the cache: what the loops over rows with options, and over strided rows, are given. Used by
// walk.cpp, options_cpu.cpp and norm_cpu.cpp.
#pragma once

#include <cstdint>

#include "cpu/walk.h"

namespace wd_fused {

inline constexpr int64_t kChunk = 1024;  // elements; four operands of 4 KiB
static_assert(kChunk % kMomentumBlock == 0 && kTileElements % kChunk == 0);

// Elements of a row, flat in memory, and what is done with them.
struct Chunk {
  void* param;
  void* gradient;  // null: the row is only averaged
  void* momentum_buffer;
  void* extra;
  void* average;
  float* momentum_scale;
  int64_t count;
  uint64_t index;          // the first one's place in the whole parameter, of which the row is a shard
  const uint64_t* places;  // of each, where they do not follow one another; else null
  Storage storage;
  Storage gradient_storage;
  Momentum momentum;
  bool rounds;
  const RowOptions* options;
  const GroupScalars* group;
  const GroupOptions* of_options;
};

WD_FUSED_INLINE const Scalars<float>& scalars_of(const GroupScalars& group, float) { return group.in_float; }
WD_FUSED_INLINE const Scalars<double>& scalars_of(const GroupScalars& group, double) { return group.in_double; }
WD_FUSED_INLINE const OptionScalars<float>& scalars_of(const GroupOptions& group, float) { return group.in_float; }
WD_FUSED_INLINE const OptionScalars<double>& scalars_of(const GroupOptions& group, double) { return group.in_double; }

// Calls work(a null pointer to the type that a float storage has).
template <class Work>
WD_FUSED_INLINE void with_type_of(Storage storage, Work&& work) {
  switch (storage) {
    case Storage::float64:
      return work(static_cast<double*>(nullptr));
    case Storage::float16:
      return work(static_cast<Float16*>(nullptr));
    case Storage::bfloat16:
      return work(static_cast<BFloat16*>(nullptr));
    default:
      return work(static_cast<float*>(nullptr));
  }
}

// The step of rows with options, for the multiply-add that torch follows and this processor.
using StepChunk = void (*)(const Chunk&);
StepChunk options_step(bool fused_multiply_add);

// Adds the squares of a chunk's gradient, unscaled, to kSumLanes sums in double, where it begins at a multiple of
// kSumLanes in its row. The same bits from every instruction set.
inline constexpr int64_t kSumLanes = 32;
using AddSquares = void (*)(const Chunk&, double* lanes);
AddSquares square_sums();

}  // namespace wd_fused
