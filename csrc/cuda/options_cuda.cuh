// The CUDA kernels of rows with a tail: one that steps tiles, and one before it that forms the norm of the gradients.
// Device code only, as sgd_cuda.cuh is. Launched by sgd_cuda.cu.
//
// A warp steps a unit of 128 elements at a time, four a lane: 16 bytes of a float32 operand. How operands are stored is
// known at run time, the same for a whole tile; all of a unit's loads come first, as plain bits, so that they are under
// way together, and what they mean is looked at afterwards. Rows with everything in float32 have a kernel of their own.
#pragma once

#include <type_traits>

#include "cuda/sgd_cuda.cuh"
#include "plan/options_launch.h"

namespace wd_fused {

inline constexpr int kLaneElements = kUnitElements / kCudaWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kLaneElements == 4, "16 bytes of float32");

// --- what is the same for all elements of a tile

template <class Op>
struct TailTileScalars {
  Scalars<Op> update;
  TailScalars<Op> tail;
};

// kDoubles: whether the kernel may be asked for a norm in double.
template <class Op, bool kDoubles>
WD_FUSED_DEVICE Op clip_of(const CudaTailGroup& group, const CudaTailHeader& header) {
  if (group.norm < 0) return from_word<Op>(group.clip);
  if constexpr (kDoubles) {
    if (header.norm_in_double)
      return static_cast<Op>(
          clip_coefficient(static_cast<const double*>(header.norms)[group.norm], from_word<double>(group.clip)));
  }
  return clip_coefficient(static_cast<const float*>(header.norms)[group.norm], from_word<float>(group.clip));
}

// Factors of 1 and -1 change no rounding: they take the place of four flags, each a register of every thread.
template <class Op, bool kDoubles>
WD_FUSED_DEVICE TailTileScalars<Op> tail_tile_scalars(const CudaTailGroup& group, const CudaTailHeader& header) {
  TailTileScalars<Op> result;
  Scalars<Op>& update = result.update;
  TailScalars<Op>& tail = result.tail;
  update = update_scalars<Op>(group.sgd);
  tail.inverse_scale = header.grad_scale != nullptr ? reciprocal(*header.grad_scale) : 1.0f;
  tail.clip = group.clips ? clip_of<Op, kDoubles>(group, header) : Op{1};
  if (update.maximize) tail.clip = -tail.clip;
  update.maximize = false;
  tail.l1 = from_word<Op>(group.l1);
  tail.penalizes = group.penalizes;
  tail.shrinks = true;
  tail.keep = group.shrinks ? from_word<Op>(group.keep) : Op{1};
  if (group.shrinks && group.sgd.lr_kind != ScalarKind::value)
    tail.keep = multiply_add<true>(update.minus_lr, tail.keep, Op{1});
  tail.average_weight = from_word<Op>(group.average_weight);
  return result;
}

// How many bytes an element of an operand has; none: there is no such operand, or it is not looked at. float64 is
// neither.
struct Width {
  bool is_four;
  bool is_two;
  bool is_one;
};

// How operands are stored and what is done with them, in two registers.
class Kinds {
 public:
  Kinds() = default;
  WD_FUSED_DEVICE Kinds(const CudaTailTile& tile, const CudaTailGroup& group, uint64_t word) {
    const auto gradient = static_cast<Storage>((word >> kGradientStorageBits) & 3);
    const bool only_averages = (word & kIsAveraged) != 0;
    const Momentum momentum = !group.sgd.has_momentum || only_averages ? Momentum::none
                              : word & kFirstStep                      ? Momentum::first
                                                                       : Momentum::running;
    // Of a compensated weight what the next forward pass sees is averaged, and nothing else is done here.
    const Weights weights = only_averages && tile.weights == Weights::kahan ? Weights::parameter : tile.weights;
    bits_ = static_cast<uint32_t>(tile.storage) | static_cast<uint32_t>(gradient) << 4 |
            static_cast<uint32_t>(tile.momentum) << 8 |
            static_cast<uint32_t>(tile.averages_floats ? Storage::float32 : tile.storage) << 12 |
            static_cast<uint32_t>(weights) << 16 | static_cast<uint32_t>(momentum) << 20 |
            uint32_t{tile.stochastic} << 24 | uint32_t{tile.zeroes} << 25 |
            uint32_t{tile.rounds && gradient == tile.storage} << 26 | uint32_t{only_averages} << 27 |
            uint32_t{tile.average != nullptr} << 28;
    const auto width = [](Operand operand, int64_t bytes) { return static_cast<uint32_t>(bytes) << (4 * operand); };
    widths_ = width(param_, bytes_of(tile.storage)) | width(extra_, bytes_of_extra(weights, tile.storage));
    if (!only_averages) widths_ |= width(gradient_, bytes_of(gradient));
    if (momentum == Momentum::running) widths_ |= width(read_buffer_, bytes_of(tile.momentum));
    if (momentum != Momentum::none) widths_ |= width(written_buffer_, bytes_of(tile.momentum));
    if (averages()) widths_ |= width(average_, bytes_of(average()));
  }
  WD_FUSED_DEVICE Storage storage() const { return static_cast<Storage>(bits_ & 15); }
  WD_FUSED_DEVICE Storage gradient() const { return static_cast<Storage>(bits_ >> 4 & 15); }
  WD_FUSED_DEVICE Storage momentum_buffer() const { return static_cast<Storage>(bits_ >> 8 & 15); }
  WD_FUSED_DEVICE Storage average() const { return static_cast<Storage>(bits_ >> 12 & 15); }
  WD_FUSED_DEVICE Weights weights() const { return static_cast<Weights>(bits_ >> 16 & 15); }
  WD_FUSED_DEVICE Momentum momentum() const { return static_cast<Momentum>(bits_ >> 20 & 15); }
  WD_FUSED_DEVICE bool stochastic() const { return (bits_ >> 24 & 1) != 0; }
  WD_FUSED_DEVICE bool zeroes() const { return (bits_ >> 25 & 1) != 0; }
  WD_FUSED_DEVICE bool rounds() const { return (bits_ >> 26 & 1) != 0; }
  WD_FUSED_DEVICE bool only_averages() const { return (bits_ >> 27 & 1) != 0; }
  WD_FUSED_DEVICE bool averages() const { return (bits_ >> 28 & 1) != 0; }
  WD_FUSED_DEVICE bool reads_buffer() const { return momentum() == Momentum::running; }
  WD_FUSED_DEVICE bool writes_buffer() const { return momentum() != Momentum::none; }
  WD_FUSED_DEVICE bool has_blocks() const { return writes_buffer() && momentum_buffer() == Storage::int8; }
  WD_FUSED_DEVICE Width of_param() const { return width_of(param_); }
  WD_FUSED_DEVICE Width of_gradient() const { return width_of(gradient_); }
  WD_FUSED_DEVICE Width of_read_buffer() const { return width_of(read_buffer_); }
  WD_FUSED_DEVICE Width of_written_buffer() const { return width_of(written_buffer_); }
  WD_FUSED_DEVICE Width of_extra() const { return width_of(extra_); }
  WD_FUSED_DEVICE Width of_average() const { return width_of(average_); }

 private:
  enum Operand { param_, gradient_, read_buffer_, written_buffer_, extra_, average_ };
  WD_FUSED_DEVICE Width width_of(Operand operand) const {
    const auto is = [&](uint32_t bytes) { return (widths_ & bytes << (4 * operand)) != 0; };
    return {is(4), is(2), is(1)};
  }

  uint32_t bits_;
  uint32_t widths_;  // four bits an operand
};

// A tile's operands at its first element (at the row's, where that is strided).
struct TailPiece {
  char* param;
  char* gradient;
  char* momentum_buffer;
  char* extra;
  char* average;
  float* momentum_scale;
  const int64_t* layouts;
  int layout;  // -1: flat
  int number;  // of the tile, in its row
  int count;
  RowKey key;
  Kinds kinds;
  WD_FUSED_DEVICE int64_t begin() const { return int64_t{number} * kTailTileElements; }
};

WD_FUSED_DEVICE char* as_global(void* address) { return in_global_memory(static_cast<char*>(address)); }

WD_FUSED_DEVICE TailPiece tail_piece(const CudaTailTile& tile, const CudaTailGroup& group, uint64_t word,
                                     const int64_t* layouts) {
  TailPiece piece;
  piece.kinds = Kinds(tile, group, word);
  piece.param = as_global(tile.param);
  piece.momentum_buffer = as_global(tile.momentum_buffer);
  piece.extra = as_global(tile.extra);
  piece.average = as_global(tile.average);
  piece.momentum_scale = in_global_memory(tile.momentum_scale);
  piece.layouts = layouts;
  piece.layout = tile.layout;
  piece.number = tile.piece;
  piece.count = tile.count;
  piece.key = row_key(group.random_key, tile.position);
  auto* gradient = reinterpret_cast<char*>(word & kGradientAddress);
  if (!piece.kinds.only_averages() && tile.layout < 0) gradient += piece.begin() * bytes_of(piece.kinds.gradient());
  piece.gradient = in_global_memory(gradient);
  return piece;
}

// --- bits in memory

// A lane's elements of a unit: four that follow one another, in one access; or, where operands are not aligned for
// that, are strided, or the unit is the row's last, every 32nd, one at a time.
WD_FUSED_DEVICE int first_of_four(int first, int lane) { return first + kLaneElements * lane; }
WD_FUSED_DEVICE int one_of_four(int first, int lane, int i) { return first + lane + kCudaWarp * i; }

// A lane's elements of an operand: packed as they lie in memory, or each in a word of its own.
template <int kCount>
struct Words {
  uint32_t words[kCount];
};
using Four = Words<kLaneElements>;

// Where one element of each operand lies, counted in elements.
struct Offsets {
  int64_t param, gradient, momentum_buffer, extra, average;
};
WD_FUSED_DEVICE Offsets offsets_of(const TailPiece& piece, int element) {
  if (piece.layout < 0) return {element, element, element, element, element};
  const int64_t* sizes = in_global_memory(piece.layouts) + piece.layout + 1;
  const int dims = static_cast<int>(sizes[-1]);
  int64_t index = piece.begin() + element;
  Offsets offsets{};
#pragma unroll 1  // as in update_strided
  for (int d = dims - 1; d >= 0; --d) {
    const int64_t at = index % sizes[d];
    index /= sizes[d];
    offsets.param += at * sizes[dims + d];
    offsets.gradient += at * sizes[2 * dims + d];
    offsets.momentum_buffer += at * sizes[3 * dims + d];
    offsets.extra += at * sizes[4 * dims + d];
    offsets.average += at * sizes[5 * dims + d];
  }
  return offsets;
}

WD_FUSED_DEVICE Words<1> read_one(const char* base, int64_t at, Width width) {
  base = in_global_memory(base);
  if (width.is_four) return {reinterpret_cast<const uint32_t*>(base)[at]};
  if (width.is_two) return {reinterpret_cast<const uint16_t*>(base)[at]};
  if (width.is_one) return {reinterpret_cast<const uint8_t*>(base)[at]};
  return {0};
}
WD_FUSED_DEVICE void write_one(char* base, int64_t at, Width width, Words<1> word) {
  base = in_global_memory(base);
  if (width.is_four)
    reinterpret_cast<uint32_t*>(base)[at] = word.words[0];
  else if (width.is_two)
    reinterpret_cast<uint16_t*>(base)[at] = static_cast<uint16_t>(word.words[0]);
  else if (width.is_one)
    reinterpret_cast<uint8_t*>(base)[at] = static_cast<uint8_t>(word.words[0]);
}

// Four elements from `at` on, which is aligned to all four of them.
WD_FUSED_DEVICE Four read_four(const char* base, int at, Width width) {
  base = in_global_memory(base);
  Four four{};
  if (width.is_four) {
    four = bits_as<Four>(reinterpret_cast<const uint4*>(base)[at / kLaneElements]);
  } else if (width.is_two) {
    const uint2 two = reinterpret_cast<const uint2*>(base)[at / kLaneElements];
    four.words[0] = two.x;
    four.words[1] = two.y;
  } else if (width.is_one) {
    four.words[0] = reinterpret_cast<const uint32_t*>(base)[at / kLaneElements];
  }
  return four;
}
WD_FUSED_DEVICE void take_apart(Four& four, Width width) {
  if (width.is_two) {
    four.words[3] = four.words[1] >> 16;
    four.words[2] = four.words[1] & 0xffffu;
    four.words[1] = four.words[0] >> 16;
    four.words[0] &= 0xffffu;
  } else if (width.is_one) {
    const uint32_t all = four.words[0];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) four.words[i] = (all >> (8 * i)) & 0xffu;
  }
}
WD_FUSED_DEVICE void write_four(char* base, int at, Width width, const Four& four) {
  base = in_global_memory(base);
  if (width.is_four) {
    reinterpret_cast<uint4*>(base)[at / kLaneElements] = bits_as<uint4>(four);
  } else if (width.is_two) {
    reinterpret_cast<uint2*>(base)[at / kLaneElements] = {four.words[0] | four.words[1] << 16,
                                                          four.words[2] | four.words[3] << 16};
  } else if (width.is_one) {
    reinterpret_cast<uint32_t*>(base)[at / kLaneElements] =
        four.words[0] | four.words[1] << 8 | four.words[2] << 16 | four.words[3] << 24;
  }
}

// A number that a word holds, stored as `storage`: a float but for int8, whose scale it lacks.
WD_FUSED_DEVICE float number_in(uint32_t word, Storage storage) {
  if (storage == Storage::float32) return bits_as<float>(word);
  if (storage == Storage::bfloat16) return load(BFloat16{static_cast<uint16_t>(word)});
  return load(Float16{static_cast<uint16_t>(word)});
}
template <class T>
WD_FUSED_DEVICE uint32_t word_of(float rounded_number) {
  return pack<T>(rounded_number).bits;
}
WD_FUSED_DEVICE uint32_t rounded_word(float x, Storage storage) {
  if (storage == Storage::float32) return bits_as<uint32_t>(x);
  if (storage == Storage::bfloat16) return word_of<BFloat16>(rounded<BFloat16>(x));
  return word_of<Float16>(rounded<Float16>(x));
}

// --- the update of rows whose opmath is float

// All bits that a lane needs of some elements.
template <int kCount>
struct Bits {
  Words<kCount> param, gradient, momentum_buffer, extra, average;
};

WD_FUSED_DEVICE void read_bits(const TailPiece& piece, int at, Bits<kLaneElements>& bits) {
  const Kinds kinds = piece.kinds;
  bits.gradient = read_four(piece.gradient, at, kinds.of_gradient());
  bits.param = read_four(piece.param, at, kinds.of_param());
  bits.momentum_buffer = read_four(piece.momentum_buffer, at, kinds.of_read_buffer());
  bits.extra = read_four(piece.extra, at, kinds.of_extra());
  bits.average = read_four(piece.average, at, kinds.of_average());
  take_apart(bits.gradient, kinds.of_gradient());
  take_apart(bits.param, kinds.of_param());
  take_apart(bits.momentum_buffer, kinds.of_read_buffer());
  take_apart(bits.extra, kinds.of_extra());
  take_apart(bits.average, kinds.of_average());
}
WD_FUSED_DEVICE void write_bits(const TailPiece& piece, int at, const Bits<kLaneElements>& bits) {
  const Kinds kinds = piece.kinds;
  write_four(piece.average, at, kinds.of_average(), bits.average);
  if (kinds.only_averages()) return;
  write_four(piece.param, at, kinds.of_param(), bits.param);
  write_four(piece.momentum_buffer, at, kinds.of_written_buffer(), bits.momentum_buffer);
  write_four(piece.extra, at, kinds.of_extra(), bits.extra);
  if (kinds.zeroes()) write_four(piece.gradient, at, kinds.of_gradient(), Four{});
}

WD_FUSED_DEVICE void read_bits(const TailPiece& piece, const Offsets& at, Bits<1>& bits) {
  const Kinds kinds = piece.kinds;
  if (!kinds.only_averages() && kinds.gradient() == Storage::float64)
    bits.gradient = {bits_as<uint32_t>(
        to_opmath<float>(reinterpret_cast<const uint64_t*>(in_global_memory(piece.gradient))[at.gradient]))};
  else
    bits.gradient = read_one(piece.gradient, at.gradient, kinds.of_gradient());
  bits.param = read_one(piece.param, at.param, kinds.of_param());
  bits.momentum_buffer = read_one(piece.momentum_buffer, at.momentum_buffer, kinds.of_read_buffer());
  bits.extra = read_one(piece.extra, at.extra, kinds.of_extra());
  bits.average = read_one(piece.average, at.average, kinds.of_average());
}
WD_FUSED_DEVICE void write_zero(const TailPiece& piece, int64_t at) {
  const Kinds kinds = piece.kinds;
  if (kinds.gradient() == Storage::float64)
    reinterpret_cast<uint64_t*>(in_global_memory(piece.gradient))[at] = 0;
  else
    write_one(piece.gradient, at, kinds.of_gradient(), {});
}
WD_FUSED_DEVICE void write_bits(const TailPiece& piece, const Offsets& at, const Bits<1>& bits) {
  const Kinds kinds = piece.kinds;
  write_one(piece.average, at.average, kinds.of_average(), bits.average);
  if (kinds.only_averages()) return;
  write_one(piece.param, at.param, kinds.of_param(), bits.param);
  write_one(piece.momentum_buffer, at.momentum_buffer, kinds.of_written_buffer(), bits.momentum_buffer);
  write_one(piece.extra, at.extra, kinds.of_extra(), bits.extra);
  if (kinds.zeroes()) write_zero(piece, at.gradient);
}

// The weights that bits are.
template <class T, int kCount>
WD_FUSED_DEVICE void load_weights(const TailPiece& piece, const Bits<kCount>& bits, float (&w)[kCount]) {
  const Kinds kinds = piece.kinds;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T p{static_cast<uint16_t>(bits.param.words[i])};
    const uint32_t extra = bits.extra.words[i];
    if (kinds.weights() == Weights::full)
      w[i] = load_full(p, bits_as<float>(extra));
    else if (kinds.weights() == Weights::kahan)
      w[i] = load(p) + load(T{static_cast<uint16_t>(extra)});
    else
      w[i] = load(p);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (kinds.weights() == Weights::split) w[i] = load_split(p, static_cast<int16_t>(extra));
      if (kinds.weights() == Weights::split24) w[i] = load_split24(p, static_cast<int8_t>(extra));
    }
  }
}

// w comes out as the average sees it. element: the first of them.
template <class T, int kCount>
WD_FUSED_DEVICE void store_weights(const TailPiece& piece, int element, float (&w)[kCount], Bits<kCount>& bits) {
  const Kinds kinds = piece.kinds;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint32_t& p = bits.param.words[i];
    uint32_t& extra = bits.extra.words[i];
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (kinds.stochastic()) {
        w[i] = stochastically_rounded(w[i], random_bits(piece.key, static_cast<uint64_t>(piece.begin() + element + i)));
        p = word_of<T>(w[i]);
        continue;
      }
      if (kinds.weights() == Weights::split || kinds.weights() == Weights::split24) {
        if (kinds.weights() == Weights::split24) w[i] = to_24_bits(w[i]);
        const Split both = split(w[i]);
        p = both.p.bits;
        extra = kinds.weights() == Weights::split ? both.remainder : both.remainder >> 8;
        continue;
      }
    }
    const float kept = rounded<T>(w[i]);
    p = word_of<T>(kept);
    if (kinds.weights() == Weights::full) {
      extra = bits_as<uint32_t>(w[i]);
      continue;
    }
    if (kinds.weights() == Weights::kahan) extra = word_of<T>(rounded<T>(lost<T>(w[i], kept)));
    w[i] = kept;
  }
}

template <class Rounding, Momentum kMomentum, int kCount>
WD_FUSED_DEVICE void update_all(float (&w)[kCount], const float (&g)[kCount], float (&b)[kCount],
                                const TailTileScalars<float>& scalars) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    sgd_update<Rounding, Numerics::torch, true, kMomentum>(w[i], g[i], b[i], scalars.update, scalars.tail);
}
template <class Rounding, int kCount>
WD_FUSED_DEVICE void update_all(float (&w)[kCount], const float (&g)[kCount], float (&b)[kCount], Momentum momentum,
                                const TailTileScalars<float>& scalars) {
  if (momentum == Momentum::none)
    update_all<Rounding, Momentum::none>(w, g, b, scalars);
  else if (momentum == Momentum::first)
    update_all<Rounding, Momentum::first>(w, g, b, scalars);
  else
    update_all<Rounding, Momentum::running>(w, g, b, scalars);
}

// From bits to the numbers after the step, but for an average: w before it is stored, b likewise.
template <int kCount>
WD_FUSED_DEVICE void step_numbers(const TailPiece& piece, const Bits<kCount>& bits, float buffer_scale,
                                  const TailTileScalars<float>& scalars, float (&w)[kCount], float (&b)[kCount]) {
  const Kinds kinds = piece.kinds;
  if (kinds.storage() == Storage::float32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) w[i] = bits_as<float>(bits.param.words[i]);
  } else if (kinds.storage() == Storage::bfloat16) {
    load_weights<BFloat16>(piece, bits, w);
  } else {
    load_weights<Float16>(piece, bits, w);
  }
  if (kinds.only_averages()) return;
  // read_bits has made float32 of a float64 gradient.
  const Storage of_gradient = kinds.gradient() == Storage::float64 ? Storage::float32 : kinds.gradient();
  float g[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    g[i] = number_in(bits.gradient.words[i], of_gradient);
    b[i] = kinds.momentum_buffer() == Storage::int8
               ? load_int8(static_cast<int8_t>(bits.momentum_buffer.words[i]), buffer_scale)
               : number_in(bits.momentum_buffer.words[i], kinds.momentum_buffer());
  }
  if (!kinds.rounds() || kinds.storage() == Storage::float32)
    update_all<float>(w, g, b, kinds.momentum(), scalars);
  else if (kinds.storage() == Storage::bfloat16)
    update_all<BFloat16>(w, g, b, kinds.momentum(), scalars);
  else
    update_all<Float16>(w, g, b, kinds.momentum(), scalars);
}

// The other way: w and b as they are stored, and the average. buffer_scale: of an int8 buffer, the new one.
template <int kCount>
WD_FUSED_DEVICE void store_numbers(const TailPiece& piece, int element, float buffer_scale, float average_weight,
                                   float (&w)[kCount], const float (&b)[kCount], Bits<kCount>& bits) {
  const Kinds kinds = piece.kinds;
  if (!kinds.only_averages()) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      bits.momentum_buffer.words[i] =
          kinds.momentum_buffer() == Storage::int8
              ? static_cast<uint32_t>(static_cast<int32_t>(to_int8(b[i], buffer_scale))) & 0xffu
              : rounded_word(b[i], kinds.momentum_buffer());
    if (kinds.storage() == Storage::float32) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits.param.words[i] = bits_as<uint32_t>(w[i]);
    } else if (kinds.storage() == Storage::bfloat16) {
      store_weights<BFloat16>(piece, element, w, bits);
    } else {
      store_weights<Float16>(piece, element, w, bits);
    }
  }
  if (!kinds.averages()) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = number_in(bits.average.words[i], kinds.average());
    bits.average.words[i] = rounded_word(averaged<true>(e, w[i], average_weight), kinds.average());
  }
}

// The scale of a block of int8 momentum out of what each lane of the warp has as the largest of its own.
WD_FUSED_DEVICE float scale_of_block(uint32_t largest) {
#pragma unroll
  for (int distance = kCudaWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  return int8_scale(largest);
}
template <int kCount>
WD_FUSED_DEVICE uint32_t largest_of(const float (&b)[kCount], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = magnitude_bits(b[i]) > largest ? magnitude_bits(b[i]) : largest;
  return largest;
}

WD_FUSED_DEVICE float* scale_of(const TailPiece& piece, int first) {
  return in_global_memory(piece.momentum_scale) + first / kUnitElements;
}

// The compiler keeps nothing that it has read from memory beyond this point.
WD_FUSED_DEVICE void look_again() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// A unit of a row in any storages but float64, aligned and whole. These are called by all lanes of a warp.
WD_FUSED_DEVICE void update_four(const TailPiece& piece, int first, int lane, const TailTileScalars<float>& scalars) {
  look_again();
  const Kinds kinds = piece.kinds;
  const int element = first_of_four(first, lane);
  Bits<kLaneElements> bits{};
  float w[kLaneElements], b[kLaneElements];
  float buffer_scale = kinds.has_blocks() ? *scale_of(piece, first) : 0.0f;
  read_bits(piece, element, bits);
  step_numbers(piece, bits, buffer_scale, scalars, w, b);
  if (kinds.has_blocks()) {
    buffer_scale = scale_of_block(largest_of(b, 0));
    if (lane == 0) *scale_of(piece, first) = buffer_scale;
  }
  look_again();
  store_numbers(piece, element, buffer_scale, scalars.tail.average_weight, w, b, bits);
  write_bits(piece, element, bits);
}

// Any other unit. A block of int8 momentum is stepped twice, first for its new scale: that needs no registers.
WD_FUSED_DEVICE void update_one_by_one(const TailPiece& piece, int first, int lane,
                                       const TailTileScalars<float>& scalars) {
  const Kinds kinds = piece.kinds;
  float old_scale = 0, new_scale = 0;
  if (kinds.has_blocks()) old_scale = *scale_of(piece, first);
  uint32_t largest = 0;
#pragma unroll 1
  for (int pass = kinds.has_blocks() ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (int i = 0; i < kLaneElements; ++i) {
      const int element = one_of_four(first, lane, i);
      if (element >= piece.count) break;
      look_again();
      const Offsets at = offsets_of(piece, element);
      Bits<1> bits{};
      float w[1], b[1];
      read_bits(piece, at, bits);
      look_again();
      step_numbers(piece, bits, old_scale, scalars, w, b);
      if (pass == 0) {
        largest = largest_of(b, largest);
        continue;
      }
      look_again();
      store_numbers(piece, element, new_scale, scalars.tail.average_weight, w, b, bits);
      look_again();
      write_bits(piece, at, bits);
    }
    if (pass != 0) return;
    new_scale = scale_of_block(largest);
    if (lane == 0) *scale_of(piece, first) = new_scale;
  }
}

WD_FUSED_DEVICE bool is_aligned_to(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}
// Whether four elements of every operand can be taken at once.
WD_FUSED_DEVICE bool has_fours(const TailPiece& piece) {
  const Kinds kinds = piece.kinds;
  const auto fits = [](const char* address, Width width) {
    return is_aligned_to(address, width.is_four ? 16 : width.is_two ? 8 : width.is_one ? 4 : 1);
  };
  return piece.layout < 0 && (kinds.only_averages() || kinds.gradient() != Storage::float64) &&
         fits(piece.param, kinds.of_param()) && fits(piece.gradient, kinds.of_gradient()) &&
         fits(piece.momentum_buffer, kinds.of_written_buffer()) && fits(piece.extra, kinds.of_extra()) &&
         fits(piece.average, kinds.of_average());
}

WD_FUSED_DEVICE void update_piece(const TailPiece& piece, int warp, int warps, int lane,
                                  const TailTileScalars<float>& scalars) {
  const int stride = warps * kUnitElements;
  const int count = piece.count;
  int first = warp * kUnitElements;
  if (has_fours(piece))
#pragma unroll 1
    for (; first + kUnitElements <= count; first += stride) update_four(piece, first, lane, scalars);
#pragma unroll 1
  for (; first < count; first += stride) update_one_by_one(piece, first, lane, scalars);
}

// What all lanes of a warp have in common lies in shared memory: in registers it would be 40 of each.
struct alignas(16) WarpShare {
  TailPiece piece;
  TailTileScalars<float> scalars;
};
WD_FUSED_DEVICE void update_piece_shared(const TailPiece& piece, int warp, int warps, int lane,
                                         const TailTileScalars<float>& scalars) {
  __shared__ WarpShare shares[kCudaWarps];
  WarpShare& share = shares[threadIdx.x / kCudaWarp];
  if (lane == 0) share = {piece, scalars};
  __syncwarp();
  update_piece(share.piece, warp, warps, lane, share.scalars);
}

// --- the update of float64 rows: their momentum buffer and average are float64, too

WD_FUSED_DEVICE double gradient_in_double(const TailPiece& piece, int64_t at) {
  const Kinds kinds = piece.kinds;
  if (kinds.gradient() == Storage::float64) return reinterpret_cast<const double*>(piece.gradient)[at];
  return number_in(read_one(piece.gradient, at, kinds.of_gradient()).words[0], kinds.gradient());
}

template <Momentum kMomentum>
WD_FUSED_DEVICE void update_doubles(const TailPiece& piece, int warp, int warps, int lane,
                                    const TailTileScalars<double>& scalars) {
  const Kinds kinds = piece.kinds;
  auto* params = reinterpret_cast<double*>(piece.param);
  auto* buffers = reinterpret_cast<double*>(piece.momentum_buffer);
  auto* averages = reinterpret_cast<double*>(piece.average);
#pragma unroll 1
  for (int element = warp * kCudaWarp + lane; element < piece.count; element += warps * kCudaWarp) {
    const Offsets at = offsets_of(piece, element);
    double w = params[at.param];
    const double e = averages == nullptr ? 0 : averages[at.average];
    if (!kinds.only_averages()) {
      const double g = gradient_in_double(piece, at.gradient);
      double b = kMomentum == Momentum::running ? buffers[at.momentum_buffer] : 0;
      sgd_update<double, Numerics::torch, true, kMomentum>(w, g, b, scalars.update, scalars.tail);
      params[at.param] = w;
      if (kMomentum != Momentum::none) buffers[at.momentum_buffer] = b;
      if (kinds.zeroes()) write_zero(piece, at.gradient);
    }
    if (averages != nullptr) averages[at.average] = averaged<true>(e, w, scalars.tail.average_weight);
  }
}

// --- the update of rows with everything in float32

struct FloatUnit {
  Vector<float> param, gradient, momentum_buffer, average;
};

// Steps kUnroll aligned units, `stride` elements apart: all loads are under way before the first use.
template <Momentum kMomentum, bool kAverages, int kUnroll>
WD_FUSED_DEVICE void update_float_units(const TailPiece& piece, int first, int stride, int lane,
                                        const TailTileScalars<float>& scalars) {
  const Kinds kinds = piece.kinds;
  using At = Access<Vector<float>::kWidth, float>;
  auto* params = reinterpret_cast<float*>(piece.param);
  auto* gradients = reinterpret_cast<float*>(piece.gradient);
  auto* buffers = reinterpret_cast<float*>(piece.momentum_buffer);
  auto* averages = reinterpret_cast<float*>(piece.average);
  FloatUnit units[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = first_of_four(first + u * stride, lane);
    units[u].gradient = At::read_once(gradients + at);
    units[u].param = At::read(params + at);
    if (kMomentum == Momentum::running) units[u].momentum_buffer = At::read(buffers + at);
    if (kAverages) units[u].average = At::read(averages + at);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = first_of_four(first + u * stride, lane);
    FloatUnit& unit = units[u];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      float& w = unit.param.elements[i];
      sgd_update<float, Numerics::torch, true, kMomentum>(
          w, unit.gradient.elements[i], unit.momentum_buffer.elements[i], scalars.update, scalars.tail);
      if (kAverages)
        unit.average.elements[i] = averaged<true>(unit.average.elements[i], w, scalars.tail.average_weight);
    }
    At::write(params + at, unit.param);
    if (kMomentum != Momentum::none) At::write(buffers + at, unit.momentum_buffer);
    if (kAverages) At::write(averages + at, unit.average);
    if (kinds.zeroes()) At::write(gradients + at, Vector<float>{});
  }
}

template <Momentum kMomentum, bool kAverages>
WD_FUSED_DEVICE void update_float(const TailPiece& piece, const Offsets& at, const TailTileScalars<float>& scalars) {
  const Kinds kinds = piece.kinds;
  auto* params = reinterpret_cast<float*>(piece.param);
  auto* gradients = reinterpret_cast<float*>(piece.gradient);
  auto* buffers = reinterpret_cast<float*>(piece.momentum_buffer);
  auto* averages = reinterpret_cast<float*>(piece.average);
  float w = params[at.param];
  float b = kMomentum == Momentum::running ? buffers[at.momentum_buffer] : 0;
  const float e = kAverages ? averages[at.average] : 0;
  sgd_update<float, Numerics::torch, true, kMomentum>(w, gradients[at.gradient], b, scalars.update, scalars.tail);
  params[at.param] = w;
  if (kMomentum != Momentum::none) buffers[at.momentum_buffer] = b;
  if (kAverages) averages[at.average] = averaged<true>(e, w, scalars.tail.average_weight);
  if (kinds.zeroes()) gradients[at.gradient] = 0;
}

template <Momentum kMomentum, bool kAverages>
WD_FUSED_DEVICE void update_floats(const TailPiece& piece, int warp, int warps, int lane,
                                   const TailTileScalars<float>& scalars) {
  const int stride = warps * kUnitElements;
  int first = warp * kUnitElements;
  if (has_fours(piece)) {
#pragma unroll 1
    for (; first + stride + kUnitElements <= piece.count; first += 2 * stride)
      update_float_units<kMomentum, kAverages, 2>(piece, first, stride, lane, scalars);
#pragma unroll 1
    for (; first + kUnitElements <= piece.count; first += stride)
      update_float_units<kMomentum, kAverages, 1>(piece, first, stride, lane, scalars);
  }
#pragma unroll 1
  for (; first < piece.count; first += stride)
#pragma unroll 1
    for (int i = 0; i < kLaneElements && one_of_four(first, lane, i) < piece.count; ++i)
      update_float<kMomentum, kAverages>(piece, offsets_of(piece, one_of_four(first, lane, i)), scalars);
}
template <Momentum kMomentum>
WD_FUSED_DEVICE void update_floats(const TailPiece& piece, int warp, int warps, int lane,
                                   const TailTileScalars<float>& scalars) {
  const Kinds kinds = piece.kinds;
  if (kinds.averages())
    update_floats<kMomentum, true>(piece, warp, warps, lane, scalars);
  else
    update_floats<kMomentum, false>(piece, warp, warps, lane, scalars);
}

// Of a row without a gradient.
WD_FUSED_DEVICE void average_floats(const TailPiece& piece, int warp, int warps, int lane, float average_weight) {
  const auto* params = reinterpret_cast<const float*>(piece.param);
  auto* averages = reinterpret_cast<float*>(piece.average);
#pragma unroll 1
  for (int element = warp * kCudaWarp + lane; element < piece.count; element += warps * kCudaWarp) {
    const Offsets at = offsets_of(piece, element);
    averages[at.average] = averaged<true>(averages[at.average], params[at.param], average_weight);
  }
}

// --- which rows a kernel is compiled for

struct FloatRows {
  static constexpr bool kDoubles = false;
  static constexpr int kBlocks = 3;  // on a multiprocessor
  static WD_FUSED_DEVICE void update(const CudaTailHeader& header, const CudaTailGroup& group, const TailPiece& piece,
                                     int warp, int warps, int lane) {
    const Kinds kinds = piece.kinds;
    const auto scalars = tail_tile_scalars<float, kDoubles>(group, header);
    if (kinds.only_averages())
      average_floats(piece, warp, warps, lane, scalars.tail.average_weight);
    else if (kinds.momentum() == Momentum::none)
      update_floats<Momentum::none>(piece, warp, warps, lane, scalars);
    else if (kinds.momentum() == Momentum::first)
      update_floats<Momentum::first>(piece, warp, warps, lane, scalars);
    else
      update_floats<Momentum::running>(piece, warp, warps, lane, scalars);
  }
};
struct OpmathFloatRows {
  static constexpr bool kDoubles = false;
  static constexpr int kBlocks = 4;
  static WD_FUSED_DEVICE void update(const CudaTailHeader& header, const CudaTailGroup& group, const TailPiece& piece,
                                     int warp, int warps, int lane) {
    update_piece_shared(piece, warp, warps, lane, tail_tile_scalars<float, kDoubles>(group, header));
  }
};
struct AnyRows {
  static constexpr bool kDoubles = true;
  static constexpr int kBlocks = 2;
  static WD_FUSED_DEVICE void update(const CudaTailHeader& header, const CudaTailGroup& group, const TailPiece& piece,
                                     int warp, int warps, int lane) {
    const Kinds kinds = piece.kinds;
    if (kinds.storage() != Storage::float64) {
      update_piece_shared(piece, warp, warps, lane, tail_tile_scalars<float, kDoubles>(group, header));
      return;
    }
    const auto scalars = tail_tile_scalars<double, kDoubles>(group, header);
    if (kinds.momentum() == Momentum::none)
      update_doubles<Momentum::none>(piece, warp, warps, lane, scalars);
    else if (kinds.momentum() == Momentum::first)
      update_doubles<Momentum::first>(piece, warp, warps, lane, scalars);
    else
      update_doubles<Momentum::running>(piece, warp, warps, lane, scalars);
  }
};

// Which tile a thread works on, and with how many others; none: index < 0.
struct TileOfThread {
  int index;
  int warp;  // of the tile's
  int warps;
  int lane;
};
WD_FUSED_DEVICE TileOfThread tile_of_thread(const CudaTailHeader& header) {
  const int block = static_cast<int>(blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kCudaWarp;
  const int lane = static_cast<int>(threadIdx.x) % kCudaWarp;
  if (block < header.block_tiles)
    return {header.backwards ? header.block_tiles - 1 - block : block, warp, kCudaWarps, lane};
  const int index = header.block_tiles + (block - header.block_tiles) * kCudaWarps + warp;
  return {index < header.tiles_in_launch ? index : -1, 0, 1, lane};
}

// What is left to do of a step that is skipped: gradients that are not finite must not stay for the next to add to.
WD_FUSED_DEVICE void zero_piece(const TailPiece& piece, int thread, int threads) {
  if (piece.kinds.only_averages()) return;
#pragma unroll 1
  for (int element = thread; element < piece.count; element += threads)
    write_zero(piece, offsets_of(piece, element).gradient);
}

// One step of all tiles of a launch.
template <class Rows, int kParameterBytes>
__global__ void __launch_bounds__(kCudaThreads, Rows::kBlocks)
    tail_kernel(const __grid_constant__ CudaTailParameters<kParameterBytes> all) {
  const CudaTailHeader& header = all.header;
  const bool skips = (header.found_inf != nullptr && *header.found_inf != 0) ||
                     (header.skips_nonfinite && header.norm_state->is_nonfinite != 0);
  const TileOfThread of = tile_of_thread(header);
  if (of.index < 0) return;
  const CudaTailTile tile = header.tiles[of.index];
  if (skips && !tile.zeroes) return;
  const uint64_t word = all.words[tile.row];
  if (word == 0) return;
  const CudaTailGroup& group = reinterpret_cast<const CudaTailGroup*>(all.words + header.rows)[tile.group];
  const TailPiece piece = tail_piece(tile, group, word, header.layouts);
  if (skips) return zero_piece(piece, of.warp * kCudaWarp + of.lane, of.warps * kCudaWarp);
  Rows::update(header, group, piece, of.warp, of.warps, of.lane);
}

// --- the norm

// Sums whose order never changes: each lane's own, then pairs of lanes.
WD_FUSED_DEVICE double sum_of_warp(double sum) {
#pragma unroll
  for (int distance = kCudaWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// What becomes of a gradient before it is squared, as sgd_update unscales it.
struct Unscaling {
  float inverse_scale;
  bool unscales;
  bool in_double;  // the parameter is float64
  bool rounds;     // to T, what both are stored as
};
template <class T, bool kUnscales>
WD_FUSED_DEVICE double square(T element, const Unscaling& unscaling) {
  const auto g = load(element);
  double value = g;
  if (sizeof(T) == 8 && !unscaling.in_double) value = static_cast<float>(g);
  if (kUnscales && unscaling.in_double) {
    value = multiply(value, double{unscaling.inverse_scale});
  } else if (kUnscales) {
    const float product = multiply(static_cast<float>(g), unscaling.inverse_scale);
    value = product;
    if constexpr (sizeof(T) == 2) value = unscaling.rounds ? rounded<T>(product) : product;
  }
  return multiply(value, value);
}

// Of whole vectors of T, the first `vectors`; a thread's share.
template <class T, bool kUnscales>
WD_FUSED_DEVICE double squares_of_vectors(const T* g, int vectors, int thread, int threads,
                                          const Unscaling& unscaling) {
  using At = Access<Vector<T>::kWidth, T>;
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr int kUnroll = 4;
  double sum = 0;
  int first = thread;
#pragma unroll 1
  for (; first + (kUnroll - 1) * threads < vectors; first += kUnroll * threads) {
    Vector<T> units[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) units[u] = At::read(g + (first + u * threads) * kWidth);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += square<T, kUnscales>(units[u].elements[i], unscaling);
  }
#pragma unroll 1
  for (; first < vectors; first += threads) {
    const Vector<T> unit = At::read(g + first * kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += square<T, kUnscales>(unit.elements[i], unscaling);
  }
  return sum;
}

// Of all elements: in vectors as far as they go.
template <class T, bool kUnscales>
WD_FUSED_DEVICE double squares_of_elements(const TailPiece& piece, int thread, int threads,
                                           const Unscaling& unscaling) {
  const auto* g = in_global_memory(reinterpret_cast<const T*>(piece.gradient));
  constexpr int kWidth = Vector<T>::kWidth;
  const int vectors = piece.layout < 0 && is_aligned_to(g, sizeof(uint4)) ? piece.count / kWidth : 0;
  double sum = squares_of_vectors<T, kUnscales>(g, vectors, thread, threads, unscaling);
#pragma unroll 1
  for (int i = vectors * kWidth + thread; i < piece.count; i += threads)
    sum += square<T, kUnscales>(g[offsets_of(piece, i).gradient], unscaling);
  return sum;
}
template <bool kUnscales>
WD_FUSED_DEVICE double squares_of_piece(const TailPiece& piece, int thread, int threads, const Unscaling& unscaling) {
  switch (piece.kinds.gradient()) {
    case Storage::float64:
      return squares_of_elements<double, kUnscales>(piece, thread, threads, unscaling);
    case Storage::float16:
      return squares_of_elements<Float16, kUnscales>(piece, thread, threads, unscaling);
    case Storage::bfloat16:
      return squares_of_elements<BFloat16, kUnscales>(piece, thread, threads, unscaling);
    default:
      return squares_of_elements<float, kUnscales>(piece, thread, threads, unscaling);
  }
}

// A thread's share of a tile's sum of squares.
template <int kParameterBytes>
WD_FUSED_DEVICE double squares_of_tile(const CudaTailParameters<kParameterBytes>& all, int index, int thread,
                                       int threads) {
  const CudaTailHeader& header = all.header;
  const CudaTailTile tile = header.tiles[index];
  const uint64_t word = all.words[tile.row];
  if (word == 0 || (word & kIsAveraged)) return 0;
  const CudaTailGroup& group = reinterpret_cast<const CudaTailGroup*>(all.words + header.rows)[tile.group];
  const TailPiece piece = tail_piece(tile, group, word, header.layouts);
  const Kinds kinds = piece.kinds;
  Unscaling unscaling;
  unscaling.unscales = header.grad_scale != nullptr;
  unscaling.inverse_scale = unscaling.unscales ? reciprocal(*header.grad_scale) : 1.0f;
  unscaling.in_double = kinds.storage() == Storage::float64;
  unscaling.rounds = kinds.rounds();
  return unscaling.unscales ? squares_of_piece<true>(piece, thread, threads, unscaling)
                            : squares_of_piece<false>(piece, thread, threads, unscaling);
}

// The sum of what every thread of a block has; in thread 0.
WD_FUSED_DEVICE double sum_of_block(double sum) {
  __shared__ double of_warp[kCudaWarps];
  const int thread = static_cast<int>(threadIdx.x);
  sum = sum_of_warp(sum);
  __syncthreads();  // what was there before has been read
  if (thread % kCudaWarp == 0) of_warp[thread / kCudaWarp] = sum;
  __syncthreads();
  double all = 0;
  if (thread == 0)
    for (int warp = 0; warp < kCudaWarps; ++warp) all += of_warp[warp];
  return all;
}

// The groups' sums out of the partial ones, then the norms. Done by one block, when all others are.
WD_FUSED_DEVICE void finish_norm(const CudaTailHeader& header) {
  const int thread = static_cast<int>(threadIdx.x);
  double total = 0;
  bool is_nonfinite = false;
  const auto set_norm = [&](int at, double norm) {
    if (header.norm_in_double)
      static_cast<double*>(header.norms)[at] = norm;
    else
      static_cast<float*>(header.norms)[at] = static_cast<float>(norm);
    // As the norm's type has it.
    const double as_kept = header.norm_in_double ? norm : static_cast<float>(norm);
    is_nonfinite |= !(as_kept - as_kept == 0);
  };
#pragma unroll 1
  for (int g = 0; g < header.group_count; ++g) {
    const CudaNormGroup group = header.norm_groups[g];
    double sum = 0;
    if (group.end > group.begin) {  // of all threads, or of none
      for (int slot = group.begin + thread; slot < group.end; slot += kCudaThreads)
        sum += __ldcg(header.partials + slot);
      sum = sum_of_block(sum);
    }
    if (thread != 0) continue;
    header.sums[g] = sum;
    total += sum;
    if (header.norm_per_group && group.end >= group.begin) set_norm(g, __dsqrt_rn(sum));
  }
  if (thread != 0) return;
  if (!header.norm_per_group) set_norm(0, __dsqrt_rn(total));
  header.norm_state->is_nonfinite = is_nonfinite;
}

// The sums of squares of a launch's tiles; in the last launch of a step the norms, too.
template <int kParameterBytes>
__global__ void __launch_bounds__(kCudaThreads, 4)
    norm_kernel(const __grid_constant__ CudaTailParameters<kParameterBytes> all) {
  const CudaTailHeader& header = all.header;
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int of_blocks = (header.block_tiles + header.tiles_of_norm_block - 1) / header.tiles_of_norm_block;
  // A block sums so many tiles one after another, of which those of a group that follow one another have one slot
  // between them; a warp one.
  const bool for_block = block < of_blocks;
  const int in_tile = for_block ? thread : thread % kCudaWarp;
  int index = for_block ? block * header.tiles_of_norm_block
                        : header.block_tiles + (block - of_blocks) * kCudaWarps + thread / kCudaWarp;
  const int tiles = for_block ? header.tiles_of_norm_block : 1;
  const int last = for_block ? header.block_tiles : header.tiles_in_launch;
  const int end = index + tiles < last ? index + tiles : last;
  while (index < end) {
    const int slot = header.slots[index];
    double sum = 0;
    for (; index < end && header.slots[index] == slot; ++index)
      if (slot >= 0) sum += squares_of_tile(all, index, in_tile, for_block ? kCudaThreads : kCudaWarp);
    if (slot < 0) continue;
    sum = for_block ? sum_of_block(sum) : sum_of_warp(sum);
    if (in_tile == 0) header.partials[slot] = sum;
  }
  if (!header.finishes_norm) return;

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicInc(&header.norm_state->blocks_done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  finish_norm(header);
}

}  // namespace wd_fused
