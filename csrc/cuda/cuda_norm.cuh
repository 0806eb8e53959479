// The CUDA kernel that forms the norms of the gradients, before the update. Device code only. Launched by sgd_cuda.cu.
//
// Sums whose order never changes: each thread's own, then pairs of lanes, then warps, then tiles in their order.
// Squares are summed in double, where that of a float32 number is exact.
#pragma once

#include "cuda/cuda_general.cuh"

namespace wd_fused {

WD_FUSED_DEVICE double sum_of_warp(double sum) {
#pragma unroll
  for (int distance = kCudaWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}
// In thread 0.
WD_FUSED_DEVICE double sum_of_block(double sum) {
  __shared__ double of_warp[kCudaWarps];
  const int thread = static_cast<int>(threadIdx.x);
  sum = sum_of_warp(sum);
  if (thread % kCudaWarp == 0) of_warp[thread / kCudaWarp] = sum;
  __syncthreads();
  double all = 0;
  if (thread == 0)
    for (int warp = 0; warp < kCudaWarps; ++warp) all += of_warp[warp];
  return all;
}

// What becomes of a gradient before it is squared, as the update unscales it.
struct Unscaling {
  float inverse_scale;
  bool unscales;
  bool in_double;  // the parameter is float64
  bool rounds;     // to T, what both are stored as
};
template <class T>
WD_FUSED_DEVICE double plus_square(double sum, T element, const Unscaling& unscaling) {
  const auto g = load(element);
  if constexpr (sizeof(T) == 8) {
    if (unscaling.in_double) {
      const double value = unscaling.unscales ? multiply(g, double{unscaling.inverse_scale}) : g;
      return sum + multiply(value, value);
    }
  }
  auto value = static_cast<float>(g);
  if (unscaling.unscales) {
    if (unscaling.in_double) {
      const double product = multiply(double{value}, double{unscaling.inverse_scale});
      return sum + multiply(product, product);
    }
    value = multiply(value, unscaling.inverse_scale);
    if constexpr (sizeof(T) == 2)
      if (unscaling.rounds) value = rounded<T>(value);
  }
  return multiply_add<true>(double{value}, double{value}, sum);
}

// A thread's share of a tile's squares. offset: of an element of a strided row.
template <class T, class Offset>
WD_FUSED_DEVICE double squares_of(const T* g, bool is_flat, int count, int thread, int threads,
                                  const Unscaling& unscaling, const Offset& offset) {
  constexpr int kCount = static_cast<int>(16 / sizeof(T));
  constexpr int kUnroll = 4;
  using Elements = Packed<T, kCount>;
  const auto add = [&](double sum, const Elements& packed) {
    T elements[kCount];
    memcpy(elements, &packed, sizeof(packed));
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum = plus_square(sum, elements[i], unscaling);
    return sum;
  };
  const int vectors = is_flat && is_aligned_to(g, 16) ? count / kCount : 0;
  double sum = 0;
  int first = thread;
#pragma unroll 1
  for (; first + (kUnroll - 1) * threads < vectors; first += kUnroll * threads) {
    Elements units[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) units[u] = read_whole<T, kCount>(g + int64_t{first + u * threads} * kCount);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum = add(sum, units[u]);
  }
#pragma unroll 1
  for (; first < vectors; first += threads) sum = add(sum, read_whole<T, kCount>(g + int64_t{first} * kCount));
#pragma unroll 1
  for (int i = vectors * kCount + thread; i < count; i += threads)
    sum = plus_square(sum, in_global_memory(g)[is_flat ? i : offset(i)], unscaling);
  return sum;
}

WD_FUSED_DEVICE double squares_of_tile(const CudaNormParameters& all, const NormTile& tile, int thread, int threads) {
  const CudaNormHeader& header = all.header;
  const uint64_t word = all.words[tile.row];
  if (word == 0 || (word & kIsAveraged) != 0) return 0;
  const auto storage = static_cast<Storage>((word >> kGradientStorageBits) & 3);
  const Kind kind = Kind::of(tile.kind);
  Unscaling unscaling;
  unscaling.unscales = header.grad_scale != nullptr;
  unscaling.inverse_scale = unscaling.unscales ? reciprocal(*header.grad_scale) : 1.0f;
  unscaling.in_double = kind.param == Storage::float64;
  unscaling.rounds = kind.rounds && storage == kind.param;
  const bool is_flat = tile.layout < 0;
  GeneralPiece piece{};
  piece.begin = tile.begin;
  piece.layout = is_flat ? nullptr : header.layouts + tile.layout;
  const auto offset = [&](int i) { return offsets_of(piece, i).gradient; };
  const auto squares = [&](auto none) {
    using T = decltype(none);
    const auto* g = reinterpret_cast<const T*>(word & kGradientAddress) + (is_flat ? tile.begin : 0);
    return squares_of(g, is_flat, tile.count, thread, threads, unscaling, offset);
  };
  switch (storage) {
    case Storage::float64:
      return squares(double{});
    case Storage::float16:
      return squares(Float16{});
    case Storage::bfloat16:
      return squares(BFloat16{});
    default:
      return squares(float{});
  }
}

// The groups' sums out of the partial ones, a warp a group, then the norms. Done by one block, when all others are.
WD_FUSED_DEVICE void finish_norm(const CudaNormHeader& header) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kCudaWarp;
  bool is_nonfinite = false;
  const auto set_norm = [&](int at, double norm) {
    if (header.in_double)
      static_cast<double*>(header.norms)[at] = norm;
    else
      static_cast<float*>(header.norms)[at] = static_cast<float>(norm);
    // As the norm's type has it.
    const double as_kept = header.in_double ? norm : static_cast<float>(norm);
    is_nonfinite |= !(as_kept - as_kept == 0);
  };
#pragma unroll 1
  for (int g = thread / kCudaWarp; g < header.group_count; g += kCudaWarps) {
    const NormGroup group = header.groups[g];
    double sum = 0;
#pragma unroll 8
    for (int slot = group.begin + lane; slot < group.end; slot += kCudaWarp) sum += __ldcg(header.partials + slot);
    sum = sum_of_warp(sum);
    if (lane != 0) continue;
    header.sums[g] = sum;
    if (header.per_group && group.end >= group.begin) set_norm(g, __dsqrt_rn(sum));
  }
  __syncthreads();
  if (thread == 0 && !header.per_group) {
    double total = 0;
    for (int g = 0; g < header.group_count; ++g) total += header.sums[g];
    set_norm(0, __dsqrt_rn(total));
  }
  is_nonfinite = __syncthreads_or(is_nonfinite) != 0;
  if (thread == 0) header.state->is_nonfinite = is_nonfinite;
}

// The sums of squares of a launch's tiles; in the last launch of a step the norms, too.
__global__ void __launch_bounds__(kCudaThreads, 4) norm_kernel(const __grid_constant__ CudaNormParameters all) {
  const CudaNormHeader& header = all.header;
  const TileOfThread me = tile_of_thread(header.small_tiles, header.tiles_in_launch, false);
  if (me.index >= 0 && me.index < header.tiles_in_launch) {  // of all threads of a large tile, or of none
    const NormTile tile = in_table(header.tiles + me.index);
    double sum = squares_of_tile(all, tile, me.thread, me.threads);
    sum = me.threads == kCudaWarp ? sum_of_warp(sum) : sum_of_block(sum);
    if (me.thread == 0) header.partials[tile.slot] = sum;
  }
  if (!header.finishes) return;

  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(&header.state->blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish_norm(header);
}

}  // namespace wd_fused
