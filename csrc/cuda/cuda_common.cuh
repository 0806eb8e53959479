// What all CUDA kernels share: accesses to memory, a tile's hyperparameters. Device code only.
#pragma once

#include <type_traits>

#include "cuda/cuda_launch.h"

namespace wd_fused {

#define WD_FUSED_DEVICE __device__ __forceinline__

inline constexpr unsigned kAllLanes = 0xffffffffu;

// An address that came out of a table could be of any memory: without this the compiler takes generic accesses.
template <class T>
WD_FUSED_DEVICE T* in_global_memory(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}
WD_FUSED_DEVICE bool is_aligned_to(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

// Sixteen bytes of a table. Volatile: a block's first loads are under way before anything is asked of them.
WD_FUSED_DEVICE uint4 table_word(const void* at) {
  uint4 word;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(at)));
  return word;
}
template <class T>
WD_FUSED_DEVICE T in_table(const T* at) {
  struct Words {
    uint4 words[sizeof(T) / sizeof(uint4)];
  } words;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(uint4); ++i)
    words.words[i] = table_word(reinterpret_cast<const uint4*>(at) + i);
  return bits_as<T>(words);
}

// The place of a row's first element in the whole parameter, by a tile's layout, as PackedLayouts has it.
WD_FUSED_DEVICE int64_t first_index(const int64_t* layouts, int layout) {
  const int at = layout < 0 ? ~layout : layout;
  return at == 0 ? 0 : in_global_memory(layouts)[at - 1];
}

// Which tile a thread works on, and with how many others; none: index < 0.
struct TileOfThread {
  int index;
  int thread;
  int threads;
};
WD_FUSED_DEVICE TileOfThread tile_of_thread(int small_tiles, int tiles, bool backwards) {
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int small_blocks = (small_tiles + kCudaWarps - 1) / kCudaWarps;
  if (block >= small_blocks) {
    const int large = block - small_blocks;
    return {backwards ? tiles - 1 - large : small_tiles + large, thread, kCudaThreads};
  }
  const int index = block * kCudaWarps + thread / kCudaWarp;
  return {index < small_tiles ? index : -1, thread % kCudaWarp, kCudaWarp};
}

// --- hyperparameters

// A hyperparameter in opmath, wherever it is.
template <class Op>
WD_FUSED_DEVICE Op scalar(uint64_t word, ScalarKind kind) {
  switch (kind) {
    case ScalarKind::float32:
      return *reinterpret_cast<const float*>(word);
    case ScalarKind::float64:
      return to_opmath<Op>(*reinterpret_cast<const uint64_t*>(word));
    case ScalarKind::float16:
      return load(*reinterpret_cast<const Float16*>(word));
    case ScalarKind::bfloat16:
      return load(*reinterpret_cast<const BFloat16*>(word));
    default:
      return from_word<Op>(word);
  }
}

// Whether a hyperparameter is 0 in the dtype that the user gave it: in opmath it may be.
template <class Op>
WD_FUSED_DEVICE bool is_zero(uint64_t word, ScalarKind kind) {
  if (kind == ScalarKind::float64) return *reinterpret_cast<const uint64_t*>(word) << 1 == 0;
  return scalar<Op>(word, kind) == Op{0};
}

template <class Op>
WD_FUSED_DEVICE Scalars<Op> update_scalars(const CudaGroup& group) {
  Scalars<Op> result;
  const Op lr = scalar<Op>(group.lr, group.lr_kind);
  result.minus_lr = group.lr_kind == ScalarKind::value ? lr : -lr;
  result.weight_decay = scalar<Op>(group.weight_decay, group.weight_decay_kind);
  result.momentum = from_word<Op>(group.momentum);
  result.one_minus_dampening = from_word<Op>(group.one_minus_dampening);
  result.decays = group.weight_decay_kind == ScalarKind::value
                      ? group.decays
                      : !is_zero<Op>(group.weight_decay, group.weight_decay_kind);
  result.nesterov = group.nesterov;
  result.maximize = group.maximize;
  return result;
}

// The numbers of the options that sgd_update reads: what gradients are multiplied with has been by then.
template <class Op, bool kPenalties>
struct TileOptions {
  static constexpr bool kIsUsed = true;
  static constexpr bool kScales = false;
  static constexpr bool kHasPenalties = kPenalties;
  Op l1;
  Op keep;
  bool penalizes;
  bool shrinks;
};

// What is the same for all elements of a tile.
template <class Op, bool kOptions>
struct TileScalars {
  Scalars<Op> update;
  TileOptions<Op, kOptions> options;
  Op inverse_grad_scale;
  Op clip;
  Op average_weight;
  bool unscales;
  bool clips;
};

// kDoubles: whether the kernel may be asked for a norm in double.
template <class Op, bool kDoubles>
WD_FUSED_DEVICE Op clip_of(const CudaGroupOptions& group, const CudaHeader& header) {
  if (group.norm < 0) return from_word<Op>(group.clip);
  if constexpr (kDoubles) {
    if (header.norm_in_double)
      return static_cast<Op>(
          clip_coefficient(static_cast<const double*>(header.norms)[group.norm], from_word<double>(group.clip)));
  }
  return clip_coefficient(static_cast<const float*>(header.norms)[group.norm], from_word<float>(group.clip));
}

template <class Op, bool kOptions, bool kDoubles = sizeof(Op) == 8>
WD_FUSED_DEVICE TileScalars<Op, kOptions> tile_scalars(const CudaGroupOptions& group, const CudaHeader& header) {
  TileScalars<Op, kOptions> result{};
  result.update = update_scalars<Op>(group.sgd);
  result.unscales = header.grad_scale != nullptr;
  result.inverse_grad_scale = result.unscales ? reciprocal(*header.grad_scale) : 1.0f;
  if constexpr (kOptions) {
    result.clips = group.clips;
    result.clip = group.clips ? clip_of<Op, kDoubles>(group, header) : Op{1};
    result.options.penalizes = group.penalizes;
    result.options.l1 = from_word<Op>(group.l1);
    result.options.shrinks = group.shrinks;
    result.options.keep = from_word<Op>(group.keep);
    if (group.shrinks && group.sgd.lr_kind != ScalarKind::value)
      result.options.keep = multiply_add<true>(result.update.minus_lr, result.options.keep, Op{1});
    result.average_weight = from_word<Op>(group.average_weight);
  }
  return result;
}

// Whether a step must write nothing.
WD_FUSED_DEVICE bool is_skipped(const CudaHeader& header) {
  return (header.found_inf != nullptr && *header.found_inf != 0) ||
         (header.is_nonfinite != nullptr && *header.is_nonfinite != 0);
}

}  // namespace wd_fused
