// The CUDA kernels that are compiled for a kind each (table.h): how operands are stored is known beforehand, what the
// options do with numbers is asked once a tile. Launched by sgd_cuda.cu.
//
// A thread takes as many elements at a time as 16 bytes of the parameter hold. Whole pieces of a tile whose operands
// are all aligned are stepped several at a time, all loads under way before the first use; any others one at a time,
// each operand by wide accesses where it is aligned for them and element by element where it is not.
#pragma once

#include "cuda/cuda_state.cuh"

namespace wd_fused {

template <uint32_t kCode>
struct KindOf {
  static constexpr Kind kKind = Kind::of(kCode);
  using P = typename TypeOf<kKind.param>::type;
  using M = typename TypeOf<kKind.momentum>::type;
  using A = typename TypeOf<kKind.average>::type;
  using E = typename ExtraOf<kKind.weights, P>::type;
  using Op = typename OpMath<P>::type;
  static constexpr int kCount = static_cast<int>(16 / sizeof(P));
  using Numbers = Lane<Op, kCount>;
  using Rounding = InLanes<std::conditional_t<kKind.rounds, P, Op>, kCount>;
  static constexpr bool kHasExtra = kKind.weights != Weights::parameter;
  static constexpr bool kHasBlocks = kKind.momentum == Storage::int8;
  static constexpr int kTileElements = static_cast<int>(kCudaTileBytes / sizeof(P));
  using TileType = std::conditional_t<kKind.options, OptionsTile, DeviceTile>;
  using OfTile = TileScalars<Op, kKind.options>;
  static constexpr int kBytes = 16 + 16 + kCount * static_cast<int>(sizeof(M)) +
                                (kHasExtra ? kCount * static_cast<int>(sizeof(E)) : 0) +
                                (kKind.averages ? kCount * static_cast<int>(sizeof(A)) : 0);
  // At a time; and blocks on a multiprocessor, which bound a thread's registers: 64 with four, 80 with three, 128.
  static constexpr int kUnroll = kKind.options ? 1 : 2;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)  // where that is not enough
  static constexpr int kBlocks = 2;
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kIsTight = kKind.weights == Weights::split24;  // sm_80 spills 8 bytes with three
#else
  static constexpr bool kIsTight = false;
#endif
  static constexpr int kBlocks = kKind.param == Storage::float32 && !kKind.options           ? 4
                                 : kBytes > 96 || kIsTight || (kHasBlocks && sizeof(P) == 2) ? 2
                                                                                             : 3;
#endif
};

// A tile's operands, from where its first piece would begin: a piece's elements are aligned in the parameter.
template <class K>
struct Operands {
  typename K::P* param;
  typename K::P* gradient;
  typename K::M* buffer;
  typename K::E* extra;
  typename K::A* average;
  float* scale;
  int offset;     // elements of the first piece that are not the tile's
  int count;      // with these
  int64_t index;  // of the first piece's first, in the whole parameter
  RowKey key;
  bool zeroes;
  WD_FUSED_DEVICE int pieces() const { return (count + K::kCount - 1) / K::kCount; }
  WD_FUSED_DEVICE Range range(int piece) const {
    const int first = piece * K::kCount;
    return {offset - first, count - first};
  }
};
template <class K>
struct Unit {
  Packed<typename K::P, K::kCount> param, gradient;
  Packed<typename K::M, K::kCount> buffer;
  Packed<typename K::E, K::kCount> extra;
  Packed<typename K::A, K::kCount> average;
  float scale;
};

// Whether an operand's pieces are aligned for wide accesses.
template <int kCount, class T>
WD_FUSED_DEVICE bool has_whole(const T* at) {
  return is_aligned_to(at, alignof(Packed<T, kCount>));
}

// One operand's piece, by its own alignment.
template <int kCount, class T>
WD_FUSED_DEVICE Packed<T, kCount> read_any(const T* base, int piece, Range range) {
  const T* at = base + piece * kCount;
  if (has_whole<kCount>(base) && range.begin <= 0 && range.end >= kCount) return read_whole<T, kCount>(at);
  return read_elements<T, kCount>(at, range);
}
template <int kCount, class T>
WD_FUSED_DEVICE void write_any(T* base, int piece, Range range, const Packed<T, kCount>& packed) {
  T* at = base + piece * kCount;
  if (has_whole<kCount>(base) && range.begin <= 0 && range.end >= kCount)
    write_whole<T, kCount>(at, packed);
  else
    write_elements<T, kCount>(at, packed, range);
}

// From a unit as it was read to how it must be written.
template <class K, Momentum kMomentum>
WD_FUSED_DEVICE void step(Unit<K>& unit, int64_t index, RowKey key, const typename K::OfTile& scalars) {
  using P = typename K::P;
  using M = typename K::M;
  constexpr int kCount = K::kCount;
  using OfWeights = WeightsOf<K::kKind.weights, P, typename K::E, kCount>;
  typename K::Numbers w = OfWeights::loaded(unit.param, unit.extra);
  typename K::Numbers g = load(unit.gradient);
  typename K::Numbers b{};
  if constexpr (kMomentum == Momentum::running) b = load_momentum<M, kCount>(unit.buffer, unit.scale);
  if (scalars.unscales) g = rounded<typename K::Rounding>(multiply(g, scalars.inverse_grad_scale));
  if constexpr (K::kKind.options)
    if (scalars.clips) g = rounded<typename K::Rounding>(multiply(g, scalars.clip));
  sgd_update<typename K::Rounding, Numerics::torch, true, kMomentum>(w, g, b, scalars.update, scalars.options);
  if constexpr (kMomentum != Momentum::none) {
    if constexpr (K::kHasBlocks) {
      unit.scale = block_scale(b);
      unit.buffer = packed_int8(b, unit.scale);
    } else if constexpr (K::kKind.rounds) {
      unit.buffer = packed_exactly<M, kCount>(b);
    } else {
      unit.buffer = packed<M, kCount>(b);
    }
  }
  if constexpr (K::kKind.stochastic)
    round_stochastically(w, unit.param, key, static_cast<uint64_t>(index));
  else
    OfWeights::store(w, unit.param, unit.extra);
  if constexpr (K::kKind.averages) {
    const auto e = load(unit.average);
    unit.average = packed<typename K::A, kCount>(averaged(e, w, scalars.average_weight));
  }
}

template <class K, Momentum kMomentum>
WD_FUSED_DEVICE Unit<K> read_unit(const Operands<K>& of, int piece) {
  constexpr int kCount = K::kCount;
  const int at = piece * kCount;
  Unit<K> unit{};
  unit.gradient = read_whole<typename K::P, kCount>(of.gradient + at, true);
  unit.param = read_whole<typename K::P, kCount>(of.param + at);
  if constexpr (kMomentum == Momentum::running) {
    unit.buffer = read_whole<typename K::M, kCount>(of.buffer + at);
    if constexpr (K::kHasBlocks) unit.scale = in_global_memory(of.scale)[at / static_cast<int>(kMomentumBlock)];
  }
  if constexpr (K::kHasExtra) unit.extra = read_whole<typename K::E, kCount>(of.extra + at);
  if constexpr (K::kKind.averages) unit.average = read_whole<typename K::A, kCount>(of.average + at);
  return unit;
}
template <class K, Momentum kMomentum>
WD_FUSED_DEVICE void write_unit(const Operands<K>& of, int piece, const Unit<K>& unit) {
  constexpr int kCount = K::kCount;
  const int at = piece * kCount;
  write_whole<typename K::P, kCount>(of.param + at, unit.param);
  if constexpr (kMomentum != Momentum::none) {
    write_whole<typename K::M, kCount>(of.buffer + at, unit.buffer);
    if constexpr (K::kHasBlocks)
      if (threadIdx.x % kLanesOfBlock<kCount> == 0)
        in_global_memory(of.scale)[at / static_cast<int>(kMomentumBlock)] = unit.scale;
  }
  if constexpr (K::kHasExtra) write_whole<typename K::E, kCount>(of.extra + at, unit.extra);
  if constexpr (K::kKind.averages) write_whole<typename K::A, kCount>(of.average + at, unit.average);
  if constexpr (K::kKind.options)
    if (of.zeroes) write_whole<typename K::P, kCount>(of.gradient + at, Packed<typename K::P, kCount>{});
}

// Any piece. momentum: none or first, or running.
template <class K>
WD_FUSED_DEVICE void step_any(const Operands<K>& of, int piece, Momentum momentum, const typename K::OfTile& scalars) {
  constexpr int kCount = K::kCount;
  const Range range = of.range(piece);
  Unit<K> unit{};
  unit.gradient = read_any<kCount>(of.gradient, piece, range);
  unit.param = read_any<kCount>(of.param, piece, range);
  if (momentum == Momentum::running) unit.buffer = read_any<kCount>(of.buffer, piece, range);
  const int block = piece / kLanesOfBlock<kCount>;
  const bool has_block = K::kHasBlocks && range.end > 0;
  if (has_block && momentum == Momentum::running) unit.scale = in_global_memory(of.scale)[block];
  if constexpr (K::kHasExtra) unit.extra = read_any<kCount>(of.extra, piece, range);
  if constexpr (K::kKind.averages) unit.average = read_any<kCount>(of.average, piece, range);
  if (momentum == Momentum::running)
    step<K, Momentum::running>(unit, of.index + piece * kCount, of.key, scalars);
  else
    step<K, Momentum::first>(unit, of.index + piece * kCount, of.key, scalars);
  write_any<kCount>(of.param, piece, range, unit.param);
  if (momentum != Momentum::none) {
    write_any<kCount>(of.buffer, piece, range, unit.buffer);
    if (has_block && threadIdx.x % kLanesOfBlock<kCount> == 0) in_global_memory(of.scale)[block] = unit.scale;
  }
  if constexpr (K::kHasExtra) write_any<kCount>(of.extra, piece, range, unit.extra);
  if constexpr (K::kKind.averages) write_any<kCount>(of.average, piece, range, unit.average);
  if constexpr (K::kKind.options)
    if (of.zeroes) write_any<kCount>(of.gradient, piece, range, Packed<typename K::P, kCount>{});
}

// The fast loop over pieces from `piece` on, `threads` apart, that lie before `end`; where it stops is returned. make:
// the tile's scalars, which are asked for when the first loads are under way.
template <class K, Momentum kMomentum, class Make>
WD_FUSED_DEVICE int step_whole(const Operands<K>& of, int piece, int threads, int end, typename K::OfTile& scalars,
                               const Make& make) {
  constexpr int kUnroll = K::kUnroll;
  Unit<K> units[kUnroll];
  const auto read = [&] {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) units[u] = read_unit<K, kMomentum>(of, piece + u * threads);
  };
  const auto has_more = [&] { return piece + (kUnroll - 1) * threads < end; };
  const bool has_any = has_more();
  if (has_any) read();
  scalars = make();
  if (has_any) {
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = piece + u * threads;
        step<K, kMomentum>(units[u], of.index + at * K::kCount, of.key, scalars);
        write_unit<K, kMomentum>(of, at, units[u]);
      }
      piece += kUnroll * threads;
      if (!has_more()) break;
      read();
    }
  }
  return piece;
}

template <class K>
WD_FUSED_DEVICE Operands<K> operands_of(const typename K::TileType& tile, uint64_t word, const CudaGroupOptions& group,
                                        const int64_t* layouts) {
  using P = typename K::P;
  Operands<K> of{};
  auto* param = static_cast<P*>(tile.param);
  // Pieces begin where the parameter is aligned; blocks of int8 momentum where the tile does.
  if constexpr (!K::kHasBlocks)
    of.offset = static_cast<int>(reinterpret_cast<uintptr_t>(param) % sizeof(uint4) / sizeof(P));
  of.count = of.offset + tile.count;
  const int64_t begin = int64_t{tile.piece} * K::kTileElements;
  of.index = begin - of.offset;
  of.param = param - of.offset;
  of.gradient = reinterpret_cast<P*>(word & kGradientAddress) + of.index;
  of.buffer = static_cast<typename K::M*>(tile.momentum_buffer) - of.offset;
  if constexpr (K::kKind.options) {
    of.extra = static_cast<typename K::E*>(tile.extra) - of.offset;
    of.average = static_cast<typename K::A*>(tile.average) - of.offset;
    of.scale = in_global_memory(tile.momentum_scale);
    of.zeroes = (tile.kind & kZeroesGradient) != 0;
    if constexpr (K::kKind.stochastic) {
      of.key = row_key(group.random_key, tile.position);
      of.index += first_index(layouts, tile.layout);
    }
  }
  return of;
}

// What is left to do of a step that is skipped: gradients that are not finite must not stay for the next to add to.
template <class K>
WD_FUSED_DEVICE void zero_gradient(const Operands<K>& of, int thread, int threads) {
#pragma unroll 1
  for (int i = of.offset + thread; i < of.count; i += threads) of.gradient[i] = typename K::P{};
}

// One step of all tiles of a launch.
template <uint32_t kCode, int kParameterBytes>
__global__ void __launch_bounds__(kCudaThreads, KindOf<kCode>::kBlocks)
    sgd_kernel(const __grid_constant__ CudaParameters<kParameterBytes> all) {
  using K = KindOf<kCode>;
  constexpr int kCount = K::kCount;
  const CudaHeader& header = all.header;
  const TileOfThread me = tile_of_thread(header.small_tiles, header.tiles_in_launch, header.backwards);
  if (me.index < 0) return;
  const auto tile = in_table(static_cast<const typename K::TileType*>(header.tiles) + me.index);
  const bool skips = is_skipped(header);
  const uint64_t word = all.words[tile.row];
  if (word == 0) return;
  const CudaGroupOptions& group = reinterpret_cast<const CudaGroupOptions*>(all.words + header.rows)[tile.group];
  const Operands<K> of = operands_of<K>(tile, word, group, header.layouts);
  if (skips) {
    if (of.zeroes) zero_gradient(of, me.thread, me.threads);
    return;
  }
  const Momentum momentum = !group.sgd.has_momentum ? Momentum::none
                            : word & kFirstStep     ? Momentum::first
                                                    : Momentum::running;
  const bool is_aligned = has_whole<kCount>(of.param) && has_whole<kCount>(of.gradient) &&
                          (momentum == Momentum::none || has_whole<kCount>(of.buffer)) &&
                          (!K::kHasExtra || has_whole<kCount>(of.extra)) &&
                          (!K::kKind.averages || has_whole<kCount>(of.average));
  const int pieces = of.pieces();
  const int first = of.offset != 0;  // piece 0 is not whole
  int whole = is_aligned ? of.count / kCount : 0;
  if (K::kHasBlocks) whole = whole / kCudaWarp * kCudaWarp;  // by all lanes of a warp, or by none
  const auto make = [&] { return tile_scalars<typename K::Op, K::kKind.options>(group, header); };
  typename K::OfTile scalars;
  int piece = first + me.thread;
  if (momentum == Momentum::running)
    piece = step_whole<K, Momentum::running>(of, piece, me.threads, whole, scalars, make);
  else if (!K::kKind.options && momentum == Momentum::none)
    piece = step_whole<K, Momentum::none>(of, piece, me.threads, whole, scalars, make);
  else
    scalars = make();
  const int end = K::kHasBlocks ? (pieces + kCudaWarp - 1) / kCudaWarp * kCudaWarp : pieces + first;
#pragma unroll 1
  for (; piece < end; piece += me.threads)
    step_any(of, !K::kHasBlocks && piece >= pieces ? 0 : piece, momentum, scalars);
}

}  // namespace wd_fused
