// What the host tells the CUDA kernel: tiles in device memory, and for every launch a block of parameters. Plain C++.
// Written by cuda_table.cpp, read by sgd_cuda.cuh.
#pragma once

#include <cstdint>
#include <string>

#include "update/sgd_update.h"

namespace wd_fused {

inline constexpr int kCudaThreads = 256;  // of a block
inline constexpr int kCudaWarp = 32;
inline constexpr int kCudaWarps = kCudaThreads / kCudaWarp;

// A full tile has as many bytes of each operand: 4 rounds of a block's threads with two 16-byte accesses each. Larger
// tiles leave multiprocessors idle at the end of a ResNet-50's step (25.6 M elements are 3,124 of these).
inline constexpr int64_t kCudaTileBytes = 32768;
inline constexpr int32_t cuda_tile_elements(Storage storage) {
  return static_cast<int32_t>(kCudaTileBytes / bytes_of(storage));
}
// Tiles up to this size are a warp's work, eight of them a block's: most tensors of a model are that small.
inline constexpr int32_t kWarpTileElements = 1024;

// Elements [piece * cuda_tile_elements, + count) of a row, with all that a block must know to begin: looked up in one
// access instead of a chain of them.
struct alignas(16) CudaTile {
  void* param;  // of the tile's first element; of the row's where the row is strided
  void* momentum_buffer;
  int32_t piece;
  int32_t row;     // its gradient's word in the parameter block
  int32_t layout;  // where in the table of layouts; -1: flat
  uint16_t count;
  uint16_t group;  // in the parameter block
};
static_assert(sizeof(CudaTile) == 32, "read as two 16-byte accesses");

// A hyperparameter's value, or where on the device it is read.
enum class ScalarKind : uint8_t { value, float32, float64, float16, bfloat16 };
inline constexpr ScalarKind read_as(Storage storage) { return static_cast<ScalarKind>(1 + static_cast<int>(storage)); }
static_assert(read_as(Storage::float32) == ScalarKind::float32 && read_as(Storage::float64) == ScalarKind::float64 &&
              read_as(Storage::float16) == ScalarKind::float16 && read_as(Storage::bfloat16) == ScalarKind::bfloat16);

// A group's hyperparameters for rows of one storage. Numbers are the bits of opmath.
struct CudaGroup {
  uint64_t lr;  // value: minus lr; else the address of lr
  uint64_t weight_decay;
  uint64_t momentum;
  uint64_t one_minus_dampening;
  ScalarKind lr_kind;
  ScalarKind weight_decay_kind;
  Storage storage;
  uint8_t has_momentum : 1, decays : 1, nesterov : 1, maximize : 1;
};
static_assert(sizeof(CudaGroup) == 40, "five words of a parameter block");
inline constexpr int kWordsOfGroup = sizeof(CudaGroup) / sizeof(uint64_t);

struct CudaHeader {
  const CudaTile* tiles;    // this launch's
  const int64_t* layouts;   // dims, sizes, strides of parameter, gradient and momentum buffer; one after another
  const float* grad_scale;  // null: the gradients are not scaled
  const float* found_inf;   // null, or not 0 where the step must do nothing
  int32_t block_tiles;      // the first tiles, each a block's work; the others are a warp's
  int32_t tiles_in_launch;
  int32_t rows;  // words before the groups
  int32_t unused;
};

// All of a launch's parameters: the header; for each row a word, its gradient's address (null: the row is not stepped)
// with bit 0 set on the row's first step with momentum; then the groups.
inline constexpr uint64_t kFirstStep = 1;
inline constexpr int kSmallParameters = 4096;   // what every CUDA has taken; 501 tensors of one group
inline constexpr int kLargeParameters = 32760;  // 32,764 is the most that CUDA 12.1 and later take
template <int kBytes>
struct CudaParameters {
  CudaHeader header;
  uint64_t words[(kBytes - sizeof(CudaHeader)) / sizeof(uint64_t)];
};
static_assert(sizeof(CudaParameters<kSmallParameters>) == kSmallParameters);
static_assert(sizeof(CudaParameters<kLargeParameters>) == kLargeParameters);

// Which of the compiled kernels a launch takes. tail, norm: those of options_cuda.cuh, for rows with a tail.
enum class KernelKind : uint8_t { sgd, tail, norm };
// What a tail's kernel is compiled for: rows with everything in float32, rows whose opmath is float, any rows.
enum class TailRows : uint8_t { float32, opmath_float, any };
struct CudaKernel {
  bool mixed;       // of sgd: rows of several storages; else
  Storage storage;  // of all rows
  Numerics numerics;
  int parameter_bytes;  // kSmallParameters or kLargeParameters
  KernelKind kind = KernelKind::sgd;
  TailRows tail_rows = TailRows::float32;
};
std::string name_of(const CudaKernel& kernel);  // in cuda_table.cpp

}  // namespace wd_fused
