// What the host tells the CUDA kernels of rows with a tail (options.h): tiles in device memory, and for every launch a
// block of parameters. Plain C++. Written by options_table.cpp, read by options_cuda.cuh.
#pragma once

#include <cstdint>

#include "plan/cuda_launch.h"
#include "update/options.h"

namespace wd_fused {

// A warp steps a block of int8 momentum at a time, four elements a lane, and as many of every other storage. A full
// tile is 64 of these, whatever the storage: 32 KiB of each float32 operand.
inline constexpr int32_t kUnitElements = static_cast<int32_t>(kMomentumBlock);
inline constexpr int32_t kTailTileElements = 8192;
static_assert(kTailTileElements % kUnitElements == 0 && kWarpTileElements % kUnitElements == 0);

// Elements [piece * kTailTileElements, + count) of a row, with all that a block must know to begin.
struct alignas(16) CudaTailTile {
  void* param;  // these three and average: of the tile's first element; of the row's where the row is strided
  void* momentum_buffer;
  void* extra;
  void* average;          // null: none
  float* momentum_scale;  // of the tile's first block
  int32_t piece;
  int32_t row;     // its gradient's word in the parameter block
  int32_t layout;  // where in the table of layouts; -1: flat
  uint16_t count;
  uint16_t group;  // in the parameter block
  int32_t position;
  Storage storage;
  Storage momentum;
  Weights weights;
  uint8_t stochastic : 1, zeroes : 1, rounds : 1, averages_floats : 1;  // the last: whatever the parameter is
};
static_assert(sizeof(CudaTailTile) == 64, "read as four 16-byte accesses");

// A group's hyperparameters for rows of one storage. Numbers are the bits of opmath.
struct CudaTailGroup {
  CudaGroup sgd;
  uint64_t l1;
  uint64_t keep;  // where lr is read on the device: decoupled, c in 1 - lr c
  uint64_t average_weight;
  uint64_t clip;  // the coefficient; where it is formed on the device: the largest norm, in the bits of the norm's type
  uint32_t random_key[2];
  int32_t norm;  // which one the coefficient is formed of; -1: clip is the coefficient
  uint8_t clips, penalizes, shrinks, unused;
};
inline constexpr int kWordsOfTailGroup = sizeof(CudaTailGroup) / sizeof(uint64_t);
static_assert(sizeof(CudaTailGroup) == 88, "eleven words of a parameter block");

// A group's partial sums of squares: the slots [begin, end). Before begin where the group does not clip.
struct CudaNormGroup {
  int32_t begin;
  int32_t end;
};

// The norm's kernel has at most about so many blocks for full tiles: several rounds of the largest GPU's, and few
// enough that one of them adds up what all have left in a fraction of the time. Each sums so many tiles:
inline constexpr int32_t kNormBlocks = 8192;
inline constexpr int32_t tiles_of_norm_block(int32_t block_tiles) {
  return block_tiles <= kNormBlocks ? 1 : (block_tiles + kNormBlocks - 1) / kNormBlocks;
}

// What the norm is formed in: one a device. The host uploads it as zeros.
struct CudaNormState {
  uint32_t blocks_done;   // of the launch that finishes the norm; 0 between steps
  uint32_t is_nonfinite;  // some norm is
};

struct CudaTailHeader {
  const CudaTailTile* tiles;  // this launch's
  const int64_t* layouts;     // dims, sizes, strides of StridedLayout's operands; one after another
  const float* grad_scale;    // null: the gradients are not scaled
  const float* found_inf;     // null, or not 0 where the step must do nothing
  const int32_t* slots;       // of this launch's tiles: where in the partials; -1: the row counts in no norm
  double* partials;
  const CudaNormGroup* norm_groups;  // of all groups, clipping or not
  double* sums;                      // of squares, of all groups
  void* norms;                       // float or double: one, or one a group
  CudaNormState* norm_state;
  int32_t block_tiles;  // the first tiles, each a block's work; the others are a warp's
  int32_t tiles_in_launch;
  int32_t rows;                 // words before the groups
  int32_t group_count;          // of norm_groups
  int32_t tiles_of_norm_block;  // of those for blocks
  uint8_t norm_per_group : 1, norm_in_double : 1;
  uint8_t finishes_norm : 1;    // the last launch of the norm's kernel does
  uint8_t skips_nonfinite : 1;  // the update does nothing where a norm is not finite
  uint8_t backwards : 1;        // the update begins with the last tiles: the norm has left their gradients in the L2
  uint8_t unused[3];
};

// All of a launch's parameters, the same for the norm's kernel and the update's: the header; for each row a word; then
// the groups. A row's word: its gradient's address, above it the gradient's storage, below it whether this is the row's
// first step with momentum. kIsAveraged: a row without a gradient, of which only the average is updated. 0: not
// stepped.
inline constexpr int kGradientStorageBits = 60;  // above any address
inline constexpr uint64_t kIsAveraged = uint64_t{1} << 63;
inline constexpr uint64_t kGradientAddress = (uint64_t{1} << kGradientStorageBits) - 1 - kFirstStep;
template <int kBytes>
struct CudaTailParameters {
  CudaTailHeader header;
  uint64_t words[(kBytes - sizeof(CudaTailHeader)) / sizeof(uint64_t)];
};
static_assert(sizeof(CudaTailParameters<kSmallParameters>) == kSmallParameters);
static_assert(sizeof(CudaTailParameters<kLargeParameters>) == kLargeParameters);

}  // namespace wd_fused
