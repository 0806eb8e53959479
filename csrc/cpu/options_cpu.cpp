// The tail as loops over memory. A piece is stepped a chunk at a time, through copies in opmath that stay in the first
// cache (none where an operand is stored in opmath), with a loop for each stage: so every combination of options is
// there, and each loop is plain enough for the compiler to make vectors of. Called by sgd_cpu.cpp.
#include "cpu/options_cpu.h"

#include <algorithm>
#include <cstring>

#include "cpu/strided_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define WD_FUSED_X86_TARGETS 1
#include <immintrin.h>
#endif

namespace wd_fused {
namespace {

constexpr int64_t kChunk = 1024;  // elements; four operands of 4 KiB
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
  uint64_t index;  // of the first, in the row
  Storage storage;
  Storage gradient_storage;
  Momentum momentum;
  bool rounds;
  const RowTail* tail;
  const GroupScalars* group;
  const GroupTail* of_tail;
};

WD_FUSED_INLINE const Scalars<float>& scalars_of(const GroupScalars& group, float) { return group.in_float; }
WD_FUSED_INLINE const Scalars<double>& scalars_of(const GroupScalars& group, double) { return group.in_double; }
WD_FUSED_INLINE const TailScalars<float>& scalars_of(const GroupTail& group, float) { return group.in_float; }
WD_FUSED_INLINE const TailScalars<double>& scalars_of(const GroupTail& group, double) { return group.in_double; }

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

template <class T, class Op>
WD_FUSED_INLINE void load_all(const void* from, Op* __restrict to, int64_t count) {
  const T* __restrict values = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Op>(load(values[i]));
}
template <class T, class Op>
WD_FUSED_INLINE void store_all(void* to, const Op* __restrict from, int64_t count) {
  T* __restrict values = static_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) values[i] = pack<T>(rounded<T>(static_cast<typename OpMath<T>::type>(from[i])));
}

// --- momentum buffers

WD_FUSED_INLINE void load_blocks(const void* from, const float* scale, float* __restrict to, int64_t count) {
  const auto* __restrict values = static_cast<const int8_t*>(from);
  for (int64_t begin = 0; begin < count; begin += kMomentumBlock) {
    const int64_t end = std::min(begin + kMomentumBlock, count);
    const float s = scale[begin / kMomentumBlock];
    for (int64_t i = begin; i < end; ++i) to[i] = load_int8(values[i], s);
  }
}
WD_FUSED_INLINE void store_blocks(void* to, float* scale, const float* __restrict from, int64_t count) {
  auto* __restrict values = static_cast<int8_t*>(to);
  for (int64_t begin = 0; begin < count; begin += kMomentumBlock) {
    const int64_t end = std::min(begin + kMomentumBlock, count);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, magnitude_bits(from[i]));
    const float s = int8_scale(largest);
    scale[begin / kMomentumBlock] = s;
    for (int64_t i = begin; i < end; ++i) values[i] = static_cast<int8_t>(static_cast<int32_t>(to_int8(from[i], s)));
  }
}

// --- weights

template <class T>
WD_FUSED_INLINE void load_halves(const Chunk& chunk, float* __restrict w) {
  const T* __restrict p = static_cast<const T*>(chunk.param);
  const int64_t count = chunk.count;
  switch (chunk.tail->weights) {
    case Weights::full: {
      const auto* __restrict master = static_cast<const float*>(chunk.extra);
      for (int64_t i = 0; i < count; ++i) w[i] = load_full(p[i], master[i]);
      return;
    }
    case Weights::kahan: {
      if (chunk.gradient == nullptr) return load_all<T>(p, w, count);  // what the next forward pass sees is averaged
      const T* __restrict compensation = static_cast<const T*>(chunk.extra);
      for (int64_t i = 0; i < count; ++i) w[i] = load(p[i]) + load(compensation[i]);
      return;
    }
    default:
      return load_all<T>(p, w, count);
  }
}
WD_FUSED_INLINE void load_weights(const Chunk& chunk, float* __restrict w) {
  const auto* __restrict p = static_cast<const BFloat16*>(chunk.param);
  const int64_t count = chunk.count;
  if (chunk.tail->weights == Weights::split) {
    const auto* __restrict remainder = static_cast<const int16_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) w[i] = load_split(p[i], remainder[i]);
  } else if (chunk.tail->weights == Weights::split24) {
    const auto* __restrict remainder = static_cast<const int8_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) w[i] = load_split24(p[i], remainder[i]);
  } else if (chunk.storage == Storage::bfloat16) {
    load_halves<BFloat16>(chunk, w);
  } else {
    load_halves<Float16>(chunk, w);
  }
}

// w comes out as the average sees it.
template <class T>
WD_FUSED_INLINE void store_halves(const Chunk& chunk, float* __restrict w) {
  T* __restrict p = static_cast<T*>(chunk.param);
  const int64_t count = chunk.count;
  switch (chunk.tail->weights) {
    case Weights::full: {
      auto* __restrict master = static_cast<float*>(chunk.extra);
      for (int64_t i = 0; i < count; ++i) {
        master[i] = w[i];
        p[i] = pack<T>(rounded<T>(w[i]));
      }
      return;
    }
    case Weights::kahan: {
      T* __restrict compensation = static_cast<T*>(chunk.extra);
      for (int64_t i = 0; i < count; ++i) {
        const float kept = rounded<T>(w[i]);
        compensation[i] = pack<T>(rounded<T>(lost<T>(w[i], kept)));
        p[i] = pack<T>(kept);
        w[i] = kept;
      }
      return;
    }
    default:
      for (int64_t i = 0; i < count; ++i) {
        w[i] = rounded<T>(w[i]);
        p[i] = pack<T>(w[i]);
      }
  }
}
WD_FUSED_INLINE void store_weights(const Chunk& chunk, float* __restrict w) {
  auto* __restrict p = static_cast<BFloat16*>(chunk.param);
  const int64_t count = chunk.count;
  if (chunk.tail->stochastic) {
    RowKey key = row_key(chunk.of_tail->random_key, chunk.tail->position);
    key.first += static_cast<uint32_t>(chunk.index >> 32) * 0x9e3779b9u;  // as random_bits has it: the same for a chunk
    const auto index = static_cast<uint32_t>(chunk.index);
    for (int64_t i = 0; i < count; ++i) {
      w[i] = stochastically_rounded(w[i], random_bits(key, index + static_cast<uint32_t>(i)));
      p[i] = pack<BFloat16>(w[i]);
    }
  } else if (chunk.tail->weights == Weights::split) {
    auto* __restrict remainder = static_cast<uint16_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_to_split(w[i]);
      p[i].bits = static_cast<uint16_t>(parameter_of(bits));
      remainder[i] = static_cast<uint16_t>(bits);
    }
  } else if (chunk.tail->weights == Weights::split24) {
    auto* __restrict remainder = static_cast<uint8_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) {
      w[i] = to_24_bits(w[i]);
      const uint32_t bits = bits_to_split(w[i]);
      p[i].bits = static_cast<uint16_t>(parameter_of(bits));
      remainder[i] = static_cast<uint8_t>(bits >> 8);
    }
  } else if (chunk.storage == Storage::bfloat16) {
    store_halves<BFloat16>(chunk, w);
  } else {
    store_halves<Float16>(chunk, w);
  }
}

// --- the step

template <class Rounding, Momentum kMomentum, bool kFused, class Op, class Tail>
WD_FUSED_INLINE void update_all(Op* __restrict w, const Op* __restrict g, Op* __restrict b, const Chunk& chunk,
                                const Tail tail) {
  const Scalars<Op> scalars = scalars_of(*chunk.group, Op{});
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    Op w_i = w[i];
    Op b_i = kMomentum == Momentum::running ? b[i] : Op{};
    sgd_update<Rounding, Numerics::torch, kFused, kMomentum>(w_i, g[i], b_i, scalars, tail);
    if (kMomentum != Momentum::none) b[i] = b_i;
    w[i] = w_i;
  }
}
template <class Rounding, bool kFused, class Op, class Tail>
WD_FUSED_INLINE void update_all(Op* w, const Op* g, Op* b, const Chunk& chunk, const Tail& tail) {
  if (chunk.momentum == Momentum::none)
    update_all<Rounding, Momentum::none, kFused>(w, g, b, chunk, tail);
  else if (chunk.momentum == Momentum::first)
    update_all<Rounding, Momentum::first, kFused>(w, g, b, chunk, tail);
  else
    update_all<Rounding, Momentum::running, kFused>(w, g, b, chunk, tail);
}
template <class Rounding, bool kFused, class Op>
WD_FUSED_INLINE void update_all(Op* w, const Op* g, Op* b, const Chunk& chunk) {
  const TailScalars<Op>& tail = scalars_of(*chunk.of_tail, Op{});
  if (tail.penalizes || tail.shrinks)
    update_all<Rounding, kFused>(w, g, b, chunk, tail);
  else
    update_all<Rounding, kFused>(w, g, b, chunk, ScalarsWithoutPenalties<Op>{tail});
}

// The commonest rows in one loop, in which all operands stream at once: where memory is what a step waits for, that is
// faster than the stages. Momentum buffers and averages in float32, nothing that penalizes or shrinks; parameters and
// gradients in float32 ...
template <bool kAverages, Momentum kMomentum, bool kFused>
WD_FUSED_INLINE void step_float32(const Chunk& chunk) {
  auto* __restrict p = static_cast<float*>(chunk.param);
  const auto* __restrict g = static_cast<const float*>(chunk.gradient);
  auto* __restrict b = static_cast<float*>(chunk.momentum_buffer);
  auto* __restrict e = static_cast<float*>(chunk.average);
  const Scalars<float> scalars = chunk.group->in_float;
  const ScalarsWithoutPenalties<float> tail{chunk.of_tail->in_float};
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    float w = p[i];
    float b_i = kMomentum == Momentum::running ? b[i] : 0.0f;
    sgd_update<float, Numerics::torch, kFused, kMomentum>(w, g[i], b_i, scalars, tail);
    if (kMomentum == Momentum::running) b[i] = b_i;
    p[i] = w;
    if (kAverages) e[i] = averaged<kFused>(e[i], w, tail.average_weight);
  }
}
// ... or in bfloat16, with float32 weights.
template <Weights kWeights, bool kAverages, Momentum kMomentum, bool kFused>
WD_FUSED_INLINE void step_bfloat16(const Chunk& chunk) {
  auto* __restrict p = static_cast<uint16_t*>(chunk.param);
  const auto* __restrict g = static_cast<const BFloat16*>(chunk.gradient);
  auto* __restrict b = static_cast<float*>(chunk.momentum_buffer);
  auto* __restrict e = static_cast<float*>(chunk.average);
  auto* __restrict master = static_cast<float*>(chunk.extra);
  auto* __restrict remainder = static_cast<uint16_t*>(chunk.extra);
  const Scalars<float> scalars = chunk.group->in_float;
  const ScalarsWithoutPenalties<float> tail{chunk.of_tail->in_float};
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    const BFloat16 p_i{p[i]};
    float w =
        kWeights == Weights::split ? load_split(p_i, static_cast<int16_t>(remainder[i])) : load_full(p_i, master[i]);
    float b_i = kMomentum == Momentum::running ? b[i] : 0.0f;
    sgd_update<float, Numerics::torch, kFused, kMomentum>(w, load(g[i]), b_i, scalars, tail);
    if (kMomentum == Momentum::running) b[i] = b_i;
    if (kWeights == Weights::split) {
      const uint32_t bits = bits_to_split(w);
      p[i] = static_cast<uint16_t>(parameter_of(bits));
      remainder[i] = static_cast<uint16_t>(bits);
    } else {
      master[i] = w;
      p[i] = pack<BFloat16>(rounded<BFloat16>(w)).bits;
    }
    if (kAverages) e[i] = averaged<kFused>(e[i], w, tail.average_weight);
  }
}
template <bool kAverages, Momentum kMomentum, bool kFused>
WD_FUSED_INLINE void step_in_one_loop(const Chunk& chunk) {
  if (chunk.storage == Storage::float32)
    step_float32<kAverages, kMomentum, kFused>(chunk);
  else if (chunk.tail->weights == Weights::split)
    step_bfloat16<Weights::split, kAverages, kMomentum, kFused>(chunk);
  else
    step_bfloat16<Weights::full, kAverages, kMomentum, kFused>(chunk);
}
template <bool kAverages, bool kFused>
WD_FUSED_INLINE void step_in_one_loop(const Chunk& chunk) {
  if (chunk.momentum == Momentum::none)
    step_in_one_loop<kAverages, Momentum::none, kFused>(chunk);
  else
    step_in_one_loop<kAverages, Momentum::running, kFused>(chunk);
}
// Whether it has been done so.
template <bool kFused>
WD_FUSED_INLINE bool is_done_in_one_loop(const Chunk& chunk) {
  const RowTail& tail = *chunk.tail;
  const TailScalars<float>& scalars = chunk.of_tail->in_float;
  const bool has_masters = tail.weights == Weights::split || tail.weights == Weights::full;
  if (chunk.gradient == nullptr || chunk.momentum == Momentum::first) return false;
  if (scalars.penalizes || scalars.shrinks) return false;
  if (tail.averages && tail.average_storage != Storage::float32) return false;
  if (chunk.gradient_storage != chunk.storage || tail.momentum != Storage::float32) return false;
  if (chunk.storage != Storage::float32 && (chunk.storage != Storage::bfloat16 || !has_masters)) return false;
  if (tail.averages)
    step_in_one_loop<true, kFused>(chunk);
  else
    step_in_one_loop<false, kFused>(chunk);
  return true;
}

template <bool kFused, class T, class Op>
WD_FUSED_INLINE void average_all(void* average, const Op* __restrict w, Op weight, int64_t count) {
  T* __restrict e = static_cast<T*>(average);
  for (int64_t i = 0; i < count; ++i)
    e[i] = pack<T>(
        rounded<T>(static_cast<typename OpMath<T>::type>(averaged<kFused>(static_cast<Op>(load(e[i])), w[i], weight))));
}

// Where they are stored, or in the copy.
template <class Op>
WD_FUSED_INLINE const Op* gradient_in_opmath(const Chunk& chunk, Op* copy) {
  if (bytes_of(chunk.gradient_storage) == static_cast<int64_t>(sizeof(Op)))
    return static_cast<const Op*>(chunk.gradient);
  with_type_of(chunk.gradient_storage,
               [&](auto* type) { load_all<std::remove_pointer_t<decltype(type)>>(chunk.gradient, copy, chunk.count); });
  return copy;
}

template <bool kFused>
WD_FUSED_INLINE void step_floats(const Chunk& chunk) {
  alignas(64) float w_copy[kChunk], g_copy[kChunk], b_copy[kChunk];
  const RowTail& tail = *chunk.tail;
  const bool in_place = chunk.storage == Storage::float32;
  float* w = in_place ? static_cast<float*>(chunk.param) : w_copy;
  if (!in_place) load_weights(chunk, w);
  if (chunk.gradient != nullptr) {
    const float* g = gradient_in_opmath(chunk, g_copy);
    const bool buffer_in_place = tail.momentum == Storage::float32;
    float* b = buffer_in_place ? static_cast<float*>(chunk.momentum_buffer) : b_copy;
    if (chunk.momentum == Momentum::running && !buffer_in_place) {
      if (tail.momentum == Storage::int8)
        load_blocks(chunk.momentum_buffer, chunk.momentum_scale, b, chunk.count);
      else if (tail.momentum == Storage::bfloat16)
        load_all<BFloat16>(chunk.momentum_buffer, b, chunk.count);
      else
        load_all<Float16>(chunk.momentum_buffer, b, chunk.count);
    }
    if (!chunk.rounds)
      update_all<float, kFused>(w, g, b, chunk);
    else if (chunk.storage == Storage::bfloat16)
      update_all<BFloat16, kFused>(w, g, b, chunk);
    else
      update_all<Float16, kFused>(w, g, b, chunk);
    if (chunk.momentum != Momentum::none && !buffer_in_place) {
      if (tail.momentum == Storage::int8)
        store_blocks(chunk.momentum_buffer, chunk.momentum_scale, b, chunk.count);
      else if (tail.momentum == Storage::bfloat16)
        store_all<BFloat16>(chunk.momentum_buffer, b, chunk.count);
      else
        store_all<Float16>(chunk.momentum_buffer, b, chunk.count);
    }
    if (!in_place) store_weights(chunk, w);
  }
  if (tail.averages) {
    const float weight = chunk.of_tail->in_float.average_weight;
    if (tail.average_storage == Storage::float32)
      average_all<kFused, float>(chunk.average, w, weight, chunk.count);
    else if (tail.average_storage == Storage::bfloat16)
      average_all<kFused, BFloat16>(chunk.average, w, weight, chunk.count);
    else
      average_all<kFused, Float16>(chunk.average, w, weight, chunk.count);
  }
}

// float64 parameters: momentum buffer and average are float64, too.
template <bool kFused>
WD_FUSED_INLINE void step_doubles(const Chunk& chunk) {
  alignas(64) double g_copy[kChunk];
  auto* w = static_cast<double*>(chunk.param);
  if (chunk.gradient != nullptr) {
    update_all<double, kFused>(w, gradient_in_opmath(chunk, g_copy), static_cast<double*>(chunk.momentum_buffer),
                               chunk);
  }
  if (chunk.tail->averages)
    average_all<kFused, double>(chunk.average, w, chunk.of_tail->in_double.average_weight, chunk.count);
}

template <bool kFused, bool kInOneLoop>
WD_FUSED_INLINE void step_chunk(const Chunk& chunk) {
  if (chunk.storage == Storage::float64) {
    step_doubles<kFused>(chunk);
  } else {
    bool done = false;
    if constexpr (kInOneLoop) done = is_done_in_one_loop<kFused>(chunk);
    if (!done) step_floats<kFused>(chunk);
  }
  if (chunk.tail->zeroes && chunk.gradient != nullptr)
    std::memset(chunk.gradient, 0, static_cast<size_t>(chunk.count * bytes_of(chunk.gradient_storage)));
}

// --- the norm

constexpr int64_t kLanes = 32;  // of sums side by side, for vectors

template <class T, class Rounding, class Op>
WD_FUSED_INLINE void add_squares(const void* gradient, int64_t count, Op inverse_scale, double* lanes) {
  const T* __restrict g = static_cast<const T*>(gradient);
  const bool unscales = inverse_scale != 1;
  const auto square = [=](T element) {
    const Op as_is = static_cast<Op>(load(element));
    const auto value = static_cast<double>(unscales ? rounded<Rounding>(multiply(as_is, inverse_scale)) : as_is);
    return value * value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += square(g[i + lane]);
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += square(g[i]);
}

// How whole vectors of float32 are added to the lanes; returns of how many elements that has been done.
struct Portable {
  static int64_t add_squares(const float*, int64_t, float, double*) { return 0; }
};
#if defined(WD_FUSED_X86_TARGETS)
// The lanes stay in registers, which compilers do not do of themselves, and a load converts: a quarter of the
// instructions. In double the square of a float is exact, so that a fused multiply-add changes no bit.
struct Avx2 {
  __attribute__((target("avx2,fma"))) static int64_t add_squares(const float* gradient, int64_t count,
                                                                 float inverse_scale, double* lanes) {
    constexpr int64_t kWidth = 4;
    const __m128 scale = _mm_set1_ps(inverse_scale);
    const bool unscales = inverse_scale != 1;
    __m256d sums[kLanes / kWidth];
    std::memcpy(sums, lanes, sizeof(sums));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 8
      for (int64_t vector = 0; vector < kLanes / kWidth; ++vector) {
        const __m128 values = _mm_loadu_ps(gradient + i + vector * kWidth);
        const __m256d in_double = _mm256_cvtps_pd(unscales ? _mm_mul_ps(values, scale) : values);
        sums[vector] = _mm256_fmadd_pd(in_double, in_double, sums[vector]);
      }
    }
    std::memcpy(lanes, sums, sizeof(sums));
    return i;
  }
};
#endif

// Of a chunk whose index is a multiple of kLanes.
template <class Isa>
WD_FUSED_INLINE void add_squares_of(const Chunk& chunk, double* lanes) {
  const void* gradient = chunk.gradient;
  const int64_t count = chunk.count;
  if (chunk.storage == Storage::float64) {
    const TailScalars<double>& tail = chunk.of_tail->in_double;
    with_type_of(chunk.gradient_storage, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      add_squares<T, double>(gradient, count, tail.inverse_scale, lanes);
    });
    return;
  }
  const TailScalars<float>& tail = chunk.of_tail->in_float;
  if (chunk.rounds && chunk.storage == Storage::bfloat16)
    return add_squares<BFloat16, BFloat16>(gradient, count, tail.inverse_scale, lanes);
  if (chunk.rounds && chunk.storage == Storage::float16)
    return add_squares<Float16, Float16>(gradient, count, tail.inverse_scale, lanes);
  if (chunk.gradient_storage == Storage::float32) {
    const auto* values = static_cast<const float*>(gradient);
    const int64_t done = Isa::add_squares(values, count, tail.inverse_scale, lanes);
    return add_squares<float, float>(values + done, count - done, tail.inverse_scale, lanes);
  }
  with_type_of(chunk.gradient_storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_squares<T, float>(gradient, count, tail.inverse_scale, lanes);
  });
}

// In the same order whatever there is to sum: lanes that have got nothing are zeros.
WD_FUSED_INLINE double sum_of(double* lanes, int64_t used) {
  int64_t half = kLanes / 2;
  while (half >= used) half /= 2;
  for (; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}
template <class Isa>
WD_FUSED_INLINE double squares_of(const Chunk& chunk) {
  alignas(64) double lanes[kLanes] = {};
  add_squares_of<Isa>(chunk, lanes);
  return sum_of(lanes, std::min(chunk.count, kLanes));
}

// --- instruction sets, as in sgd_cpu.cpp

struct Loops {
  void (*step)(const Chunk&);
  double (*squares)(const Chunk&);
};

#define WD_FUSED_LOOPS(NAME, FUSED, IN_ONE_LOOP, ISA, TARGET)                     \
  namespace NAME {                                                                \
  TARGET void step(const Chunk& chunk) { step_chunk<FUSED, IN_ONE_LOOP>(chunk); } \
  TARGET double squares(const Chunk& chunk) { return squares_of<ISA>(chunk); }    \
  constexpr Loops loops = {step, squares};                                        \
  }
#if defined(WD_FUSED_X86_TARGETS)
WD_FUSED_LOOPS(avx2, true, true, Avx2, __attribute__((target("avx2,fma"))))
WD_FUSED_LOOPS(baseline, true, false, Portable, )
#else
WD_FUSED_LOOPS(baseline, true, true, Portable, )
#endif
WD_FUSED_LOOPS(separate, false, false, Portable, )
#undef WD_FUSED_LOOPS

const Loops& loops_for(bool fused_multiply_add) {
  if (!fused_multiply_add) return separate::loops;
#if defined(WD_FUSED_X86_TARGETS)
  if (cpu_isa() == CpuIsa::avx2) return avx2::loops;
#endif
  return baseline::loops;
}

// --- pieces

void move_by(void*& address, int64_t bytes) {
  if (address != nullptr) address = static_cast<char*>(address) + bytes;
}
// Flat operands, some elements further on.
void advance(Chunk& chunk, int64_t elements) {
  move_by(chunk.param, elements * bytes_of(chunk.storage));
  move_by(chunk.gradient, elements * bytes_of(chunk.gradient_storage));
  move_by(chunk.momentum_buffer, elements * bytes_of(chunk.tail->momentum));
  move_by(chunk.extra, elements * bytes_of_extra(chunk.tail->weights, chunk.storage));
  move_by(chunk.average, elements * bytes_of(chunk.tail->average_storage));
  if (chunk.momentum_scale != nullptr) chunk.momentum_scale += elements / kMomentumBlock;
  chunk.index += static_cast<uint64_t>(elements);
}

// All of a row; of a flat one from `begin` on.
WD_FUSED_INLINE Chunk chunk_of(const CpuStep& step, int32_t row_index, int64_t begin, int64_t count) {
  const Row& row = step.table.rows()[static_cast<size_t>(row_index)];
  const RowInput& input = step.inputs[static_cast<size_t>(row_index)];
  const RowTail& tail = step.tails[static_cast<size_t>(row_index)];
  Chunk chunk;
  chunk.param = row.param;
  chunk.gradient = const_cast<void*>(input.gradient);
  chunk.momentum_buffer = row.momentum_buffer;
  chunk.extra = tail.extra;
  chunk.average = tail.average;
  chunk.momentum_scale = tail.momentum_scale;
  chunk.count = count;
  chunk.index = 0;
  chunk.storage = row.storage;
  chunk.gradient_storage = input.gradient_storage;
  chunk.momentum = input.momentum;
  chunk.rounds = tail.rounds && step.numerics == Numerics::torch && input.gradient_storage == row.storage;
  chunk.tail = &tail;
  chunk.group = &step.groups[static_cast<size_t>(row.group)];
  chunk.of_tail = &step.of_tail[static_cast<size_t>(row.group)];
  if (begin != 0 && input.layout == nullptr) advance(chunk, begin);
  return chunk;
}

void*& operand_of(Chunk& chunk, int operand) {
  switch (operand) {
    case StridedLayout::param:
      return chunk.param;
    case StridedLayout::gradient:
      return chunk.gradient;
    case StridedLayout::momentum_buffer:
      return chunk.momentum_buffer;
    case StridedLayout::extra:
      return chunk.extra;
    default:
      return chunk.average;
  }
}

// A strided row's operands, and small flat copies of them.
class FlatCopies {
 public:
  using Layout = StridedLayout;
  FlatCopies(const Chunk& all, const Layout& layout, int64_t begin)
      : all_(all), layout_(layout), reading_(layout, begin), writing_(layout, begin) {}

  // The next elements, copied. only_gradient: nothing else is looked at.
  Chunk read(int64_t begin, int64_t count, bool only_gradient) {
    Chunk chunk = all_;
    chunk.index = static_cast<uint64_t>(begin);
    chunk.count = count;
    if (all_.momentum_scale != nullptr) chunk.momentum_scale = all_.momentum_scale + begin / kMomentumBlock;
    for_runs(reading_, count, [&](const Position& at, int64_t place, int64_t length) {
      for (int o = 0; o < kOperands; ++o)
        if (operand_of(all_, o) != nullptr && (!only_gradient || o == Layout::gradient))
          copy(o, at, place, length, /*to_copies=*/true);
    });
    for (int o = 0; o < kOperands; ++o)
      if (operand_of(all_, o) != nullptr) operand_of(chunk, o) = copies_[o];
    return chunk;
  }
  void write(int64_t count) {
    for_runs(writing_, count, [&](const Position& at, int64_t place, int64_t length) {
      for (int o = 0; o < kOperands; ++o)
        if (operand_of(all_, o) != nullptr && (o != Layout::gradient || all_.tail->zeroes))
          copy(o, at, place, length, /*to_copies=*/false);
    });
  }

 private:
  static constexpr int kOperands = static_cast<int>(Layout::kOperands);

  int64_t bytes(int operand) const {
    switch (operand) {
      case Layout::param:
        return bytes_of(all_.storage);
      case Layout::gradient:
        return bytes_of(all_.gradient_storage);
      case Layout::momentum_buffer:
        return bytes_of(all_.tail->momentum);
      case Layout::extra:
        return bytes_of_extra(all_.tail->weights, all_.storage);
      default:
        return bytes_of(all_.tail->average_storage);
    }
  }
  void copy(int operand, const Position& at, int64_t place, int64_t length, bool to_copies) {
    const auto which = static_cast<Layout::Operand>(operand);
    const int64_t size = bytes(operand);
    char* strided = static_cast<char*>(operand_of(all_, operand)) + at.offset(which) * size;
    char* flat = copies_[operand] + place * size;
    const int64_t stride = layout_.strides[which].back();
    const auto as = [&](auto* type) {
      using Word = std::remove_pointer_t<decltype(type)>;
      if (to_copies)
        gather(reinterpret_cast<Word*>(flat), reinterpret_cast<const Word*>(strided), stride, length);
      else
        scatter(reinterpret_cast<Word*>(strided), reinterpret_cast<const Word*>(flat), stride, length);
    };
    if (size == 8) return as(static_cast<uint64_t*>(nullptr));
    if (size == 4) return as(static_cast<uint32_t*>(nullptr));
    if (size == 2) return as(static_cast<uint16_t*>(nullptr));
    as(static_cast<uint8_t*>(nullptr));
  }

  Chunk all_;
  const Layout& layout_;
  Position reading_;
  Position writing_;
  alignas(64) char copies_[kOperands][kChunk * sizeof(double)];
};

}  // namespace

void tail_cpu_piece(const CpuStep& step, int32_t row, int64_t begin, int64_t count) {
  const RowInput& input = step.inputs[static_cast<size_t>(row)];
  if (input.gradient == nullptr && !input.is_averaged) return;
  const Loops& loops = loops_for(step.fused_multiply_add);
  Chunk chunk = chunk_of(step, row, begin, std::min(kChunk, count));
  if (input.layout == nullptr) {
    loops.step(chunk);
    for (int64_t done = kChunk; done < count; done += kChunk) {
      advance(chunk, kChunk);
      chunk.count = std::min(kChunk, count - done);
      loops.step(chunk);
    }
    return;
  }
  FlatCopies copies(chunk, *input.layout, begin);
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t length = std::min(kChunk, count - done);
    loops.step(copies.read(begin + done, length, /*only_gradient=*/false));
    copies.write(length);
  }
}

double squares_of_piece(const CpuStep& step, int32_t row, int64_t begin, int64_t count) {
  const RowInput& input = step.inputs[static_cast<size_t>(row)];
  const RowTail& tail = step.tails[static_cast<size_t>(row)];
  if (input.gradient == nullptr || !tail.clips) return 0;
  const Loops& loops = loops_for(step.fused_multiply_add);
  const Chunk chunk = chunk_of(step, row, begin, count);
  if (input.layout == nullptr) return loops.squares(chunk);
  alignas(64) double lanes[kLanes] = {};
  FlatCopies copies(chunk, *input.layout, begin);
  for (int64_t done = 0; done < count; done += kChunk)
    add_squares_of<Portable>(copies.read(begin + done, std::min(kChunk, count - done), /*only_gradient=*/true), lanes);
  return sum_of(lanes, kLanes);
}

}  // namespace wd_fused
