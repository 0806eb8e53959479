// The CUDA kernel: walks tiles on the GPU. Device code only, so that a test can compile it for the CPU under a header
// that stands for CUDA's builtins. Launched by sgd_cuda.cu.
#pragma once

#include "plan/cuda_launch.h"

namespace wd_fused {

#define WD_FUSED_DEVICE __device__ __forceinline__

// Sixteen bytes, the widest access of a thread.
template <class T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T elements[kWidth];
};

template <int kWidth, class T>
struct Access;
template <class T>
struct Access<1, T> {
  using Unit = T;
  static WD_FUSED_DEVICE T read(const T* from) { return *from; }
  static WD_FUSED_DEVICE T read_once(const T* from) { return *from; }
  static WD_FUSED_DEVICE void write(T* to, T value) { *to = value; }
  static WD_FUSED_DEVICE T& element(T& unit, int) { return unit; }
};
template <class T>
struct Access<Vector<T>::kWidth, T> {
  using Unit = Vector<T>;
  static WD_FUSED_DEVICE Unit read(const T* from) { return bits_as<Unit>(*reinterpret_cast<const uint4*>(from)); }
  // Evicted first: nobody reads a gradient again.
  static WD_FUSED_DEVICE Unit read_once(const T* from) {
    return bits_as<Unit>(__ldcs(reinterpret_cast<const uint4*>(from)));
  }
  static WD_FUSED_DEVICE void write(T* to, const Unit& value) { *reinterpret_cast<uint4*>(to) = bits_as<uint4>(value); }
  static WD_FUSED_DEVICE T& element(Unit& unit, int i) { return unit.elements[i]; }
};

// An address that came out of a table could be of any memory: without this the compiler takes generic accesses.
template <class T>
WD_FUSED_DEVICE T* in_global_memory(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// What is the same for all elements of a tile.
template <class Op>
struct TileScalars {
  Scalars<Op> update;
  Op inverse_grad_scale;
  bool unscales;
};

template <class T, Numerics kNumerics, Momentum kMomentum>
WD_FUSED_DEVICE void update_element(T& p, T g, T& b, const TileScalars<typename OpMath<T>::type>& scalars) {
  using Op = typename OpMath<T>::type;
  Op p_op = load(p);
  Op g_op = load(g);
  Op b_op = kMomentum == Momentum::running ? load(b) : Op{};
  if (scalars.unscales) g_op = unscaled<T, kNumerics>(g_op, scalars.inverse_grad_scale);
  sgd_update<T, kNumerics, true, kMomentum>(p_op, g_op, b_op, scalars.update);
  p = pack<T>(p_op);
  if (kMomentum != Momentum::none) b = pack<T>(b_op);
}

// Steps kUnroll units of kWidth elements, `threads` units apart: all loads are under way before the first use. A
// gradient may be the parameter itself: every element is read before it is written.
template <class T, Numerics kNumerics, Momentum kMomentum, int kWidth, int kUnroll>
WD_FUSED_DEVICE void update_units(T* p, const T* g, T* b, int first, int threads,
                                  const TileScalars<typename OpMath<T>::type>& scalars) {
  using At = Access<kWidth, T>;
  typename At::Unit p_units[kUnroll], g_units[kUnroll], b_units[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (first + u * threads) * kWidth;
    g_units[u] = At::read_once(g + at);
    p_units[u] = At::read(p + at);
    if (kMomentum == Momentum::running) b_units[u] = At::read(b + at);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (first + u * threads) * kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      update_element<T, kNumerics, kMomentum>(At::element(p_units[u], i), At::element(g_units[u], i),
                                              At::element(b_units[u], i), scalars);
    At::write(p + at, p_units[u]);
    if (kMomentum != Momentum::none) At::write(b + at, b_units[u]);
  }
}

// Steps all of `units` units with `threads` threads, of which this is number `thread`.
template <class T, Numerics kNumerics, Momentum kMomentum, int kWidth>
WD_FUSED_DEVICE void update_all_units(T* p, const T* g, T* b, int units, int thread, int threads,
                                      const TileScalars<typename OpMath<T>::type>& scalars) {
  constexpr int kUnroll = kWidth == 1 ? 4 : 2;
  int first = thread;
  for (; first + (kUnroll - 1) * threads < units; first += kUnroll * threads)
    update_units<T, kNumerics, kMomentum, kWidth, kUnroll>(p, g, b, first, threads, scalars);
#pragma unroll 1
  for (; first < units; first += threads)
    update_units<T, kNumerics, kMomentum, kWidth, 1>(p, g, b, first, threads, scalars);
}

WD_FUSED_DEVICE int misalignment(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % sizeof(uint4));
}

// Operands that lie alike with respect to 16 bytes are stepped in vectors, but for the first and last few elements.
template <class T, Numerics kNumerics, Momentum kMomentum>
WD_FUSED_DEVICE void update_flat(T* p, const T* g, T* b, int count, int thread, int threads,
                                 const TileScalars<typename OpMath<T>::type>& scalars) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int off = misalignment(p);
  const bool alike = misalignment(g) == off && (kMomentum == Momentum::none || misalignment(b) == off);
  const int to_aligned = off == 0 ? 0 : static_cast<int>((sizeof(uint4) - off) / sizeof(T));
  const int head = alike && to_aligned < count ? to_aligned : count;
  const int vectors = (count - head) / kWidth;
  const int tail = head + vectors * kWidth;
  if (head != 0) update_all_units<T, kNumerics, kMomentum, 1>(p, g, b, head, thread, threads, scalars);
  update_all_units<T, kNumerics, kMomentum, kWidth>(p + head, g + head, kMomentum == Momentum::none ? b : b + head,
                                                    vectors, thread, threads, scalars);
  if (tail + thread < count) {
    T unused{};
    update_element<T, kNumerics, kMomentum>(p[tail + thread], g[tail + thread],
                                            kMomentum == Momentum::none ? unused : b[tail + thread], scalars);
  }
}

// Any strides: an element at a time, its index divided by the sizes from the innermost out.
template <class T, Numerics kNumerics, Momentum kMomentum>
WD_FUSED_DEVICE void update_strided(T* p, const T* g, T* b, const int64_t* layout, int64_t begin, int count, int thread,
                                    int threads, const TileScalars<typename OpMath<T>::type>& scalars) {
  const int dims = static_cast<int>(layout[0]);
  const int64_t* sizes = layout + 1;
#pragma unroll 1
  for (int i = thread; i < count; i += threads) {
    int64_t index = begin + i;
    int64_t p_at = 0, g_at = 0, b_at = 0;
#pragma unroll 1  // few dimensions, and a slow path: its registers must not be everybody's
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t at = index % sizes[d];
      index /= sizes[d];
      p_at += at * sizes[dims + d];
      g_at += at * sizes[2 * dims + d];
      b_at += at * sizes[3 * dims + d];
    }
    T unused{};
    update_element<T, kNumerics, kMomentum>(p[p_at], g[g_at], kMomentum == Momentum::none ? unused : b[b_at], scalars);
  }
}

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

template <class Op>
WD_FUSED_DEVICE TileScalars<Op> tile_scalars(const CudaGroup& group, const CudaHeader& header) {
  TileScalars<Op> result;
  result.update = update_scalars<Op>(group);
  result.unscales = header.grad_scale != nullptr;
  result.inverse_grad_scale = result.unscales ? reciprocal(*header.grad_scale) : 1.0f;
  return result;
}

template <class T, Numerics kNumerics, Momentum kMomentum>
WD_FUSED_DEVICE void update_tile_with(const CudaTile& tile, const T* gradient, const int64_t* layouts, int thread,
                                      int threads, const TileScalars<typename OpMath<T>::type>& scalars) {
  T* p = in_global_memory(static_cast<T*>(tile.param));
  T* b = in_global_memory(static_cast<T*>(tile.momentum_buffer));
  gradient = in_global_memory(gradient);
  const int64_t begin = int64_t{tile.piece} * (kCudaTileBytes / sizeof(T));
  if (tile.layout < 0)
    update_flat<T, kNumerics, kMomentum>(p, gradient + begin, b, tile.count, thread, threads, scalars);
  else
    update_strided<T, kNumerics, kMomentum>(p, gradient, b, layouts + tile.layout, begin, tile.count, thread, threads,
                                            scalars);
}

template <class T, Numerics kNumerics>
WD_FUSED_DEVICE void update_tile(const CudaHeader& header, const CudaTile& tile, const CudaGroup& group, uint64_t word,
                                 int thread, int threads) {
  const auto scalars = tile_scalars<typename OpMath<T>::type>(group, header);
  const T* gradient = reinterpret_cast<const T*>(word & ~kFirstStep);
  if (!group.has_momentum)
    update_tile_with<T, kNumerics, Momentum::none>(tile, gradient, header.layouts, thread, threads, scalars);
  else if (word & kFirstStep)
    update_tile_with<T, kNumerics, Momentum::first>(tile, gradient, header.layouts, thread, threads, scalars);
  else
    update_tile_with<T, kNumerics, Momentum::running>(tile, gradient, header.layouts, thread, threads, scalars);
}

// Which storages a kernel is compiled for: one, known beforehand, or whichever the group says.
template <class T>
struct Only {
  template <Numerics kNumerics>
  static WD_FUSED_DEVICE void update(const CudaHeader& header, const CudaTile& tile, const CudaGroup& group,
                                     uint64_t word, int thread, int threads) {
    update_tile<T, kNumerics>(header, tile, group, word, thread, threads);
  }
};
struct Mixed {
  template <Numerics kNumerics>
  static WD_FUSED_DEVICE void update(const CudaHeader& header, const CudaTile& tile, const CudaGroup& group,
                                     uint64_t word, int thread, int threads) {
    switch (group.storage) {
      case Storage::float32:
        return update_tile<float, kNumerics>(header, tile, group, word, thread, threads);
      case Storage::float64:
        return update_tile<double, kNumerics>(header, tile, group, word, thread, threads);
      case Storage::float16:
        return update_tile<Float16, kNumerics>(header, tile, group, word, thread, threads);
      case Storage::bfloat16:
        return update_tile<BFloat16, kNumerics>(header, tile, group, word, thread, threads);
      case Storage::int8:  // a momentum buffer of a tail's
        return;
    }
  }
};

// Blocks on a multiprocessor, which bound a thread's registers: 80 with three.
template <class Storages, Numerics kNumerics>
inline constexpr int kBlocks = 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // where 80 bytes of a thread would not fit
template <>
inline constexpr int kBlocks<Only<Float16>, Numerics::torch> = 2;
#endif

// One SGD step of all tiles of a launch: the first blocks take a tile each, every warp of the others one.
template <class Storages, Numerics kNumerics, int kParameterBytes>
__global__ void __launch_bounds__(kCudaThreads, (kBlocks<Storages, kNumerics>))
    sgd_kernel(const __grid_constant__ CudaParameters<kParameterBytes> all) {
  const CudaHeader& header = all.header;
  if (header.found_inf != nullptr && *header.found_inf != 0) return;
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const bool for_block = block < header.block_tiles;
  const int index =
      for_block ? block : header.block_tiles + (block - header.block_tiles) * kCudaWarps + thread / kCudaWarp;
  if (index >= header.tiles_in_launch) return;
  const CudaTile tile = header.tiles[index];
  const uint64_t word = all.words[tile.row];
  if (word == 0) return;
  const CudaGroup& group = reinterpret_cast<const CudaGroup*>(all.words + header.rows)[tile.group];
  Storages::template update<kNumerics>(header, tile, group, word, for_block ? thread : thread % kCudaWarp,
                                       for_block ? kCudaThreads : kCudaWarp);
}

}  // namespace wd_fused
