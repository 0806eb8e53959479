// The options as loops over memory. A piece is stepped a chunk at a time, through copies in opmath that stay in the
// first cache (none where an operand is stored in opmath), with a loop for each stage: so every combination of options
// is there, and each loop is plain enough for the compiler to make vectors of. Called by walk.cpp.
#include <algorithm>
#include <cstring>

#include "cpu/chunk.h"

namespace wd_fused {
namespace {

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
  switch (chunk.options->weights) {
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
  if (chunk.options->weights == Weights::split) {
    const auto* __restrict remainder = static_cast<const int16_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) w[i] = load_split(p[i], remainder[i]);
  } else if (chunk.options->weights == Weights::split24) {
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
  switch (chunk.options->weights) {
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
  if (chunk.options->stochastic) {
    RowKey key = row_key(chunk.of_options->random_key, chunk.options->position);
    if (chunk.places != nullptr || chunk.index >> 32 != (chunk.index + static_cast<uint64_t>(count) - 1) >> 32) {
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = chunk.places != nullptr ? chunk.places[i] : chunk.index + static_cast<uint64_t>(i);
        w[i] = stochastically_rounded(w[i], random_bits(key, index));
        p[i] = pack<BFloat16>(w[i]);
      }
      return;
    }
    key.first += static_cast<uint32_t>(chunk.index >> 32) * 0x9e3779b9u;  // as random_bits has it: the same for a chunk
    const auto index = static_cast<uint32_t>(chunk.index);
    for (int64_t i = 0; i < count; ++i) {
      w[i] = stochastically_rounded(w[i], random_bits(key, index + static_cast<uint32_t>(i)));
      p[i] = pack<BFloat16>(w[i]);
    }
  } else if (chunk.options->weights == Weights::split) {
    auto* __restrict remainder = static_cast<uint16_t*>(chunk.extra);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_to_split(w[i]);
      p[i].bits = static_cast<uint16_t>(parameter_of(bits));
      remainder[i] = static_cast<uint16_t>(bits);
    }
  } else if (chunk.options->weights == Weights::split24) {
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

template <class Rounding, Momentum kMomentum, bool kFused, class Op, class Options>
WD_FUSED_INLINE void update_all(Op* __restrict w, const Op* __restrict g, Op* __restrict b, const Chunk& chunk,
                                const Options options) {
  const Scalars<Op> scalars = scalars_of(*chunk.group, Op{});
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    Op w_i = w[i];
    Op b_i = kMomentum == Momentum::running ? b[i] : Op{};
    sgd_update<Rounding, Numerics::torch, kFused, kMomentum>(w_i, g[i], b_i, scalars, options);
    if (kMomentum != Momentum::none) b[i] = b_i;
    w[i] = w_i;
  }
}
template <class Rounding, bool kFused, class Op, class Options>
WD_FUSED_INLINE void update_all(Op* w, const Op* g, Op* b, const Chunk& chunk, const Options& options) {
  if (chunk.momentum == Momentum::none)
    update_all<Rounding, Momentum::none, kFused>(w, g, b, chunk, options);
  else if (chunk.momentum == Momentum::first)
    update_all<Rounding, Momentum::first, kFused>(w, g, b, chunk, options);
  else
    update_all<Rounding, Momentum::running, kFused>(w, g, b, chunk, options);
}
template <class Rounding, bool kFused, class Op>
WD_FUSED_INLINE void update_all(Op* w, const Op* g, Op* b, const Chunk& chunk) {
  const OptionScalars<Op>& options = scalars_of(*chunk.of_options, Op{});
  if (options.penalizes || options.shrinks)
    update_all<Rounding, kFused>(w, g, b, chunk, options);
  else
    update_all<Rounding, kFused>(w, g, b, chunk, ScalarsWithoutPenalties<Op>{options});
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
  const ScalarsWithoutPenalties<float> options{chunk.of_options->in_float};
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    float w = p[i];
    float b_i = kMomentum == Momentum::running ? b[i] : 0.0f;
    sgd_update<float, Numerics::torch, kFused, kMomentum>(w, g[i], b_i, scalars, options);
    if (kMomentum == Momentum::running) b[i] = b_i;
    p[i] = w;
    if (kAverages) e[i] = averaged<kFused>(e[i], w, options.average_weight);
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
  const ScalarsWithoutPenalties<float> options{chunk.of_options->in_float};
  for (int64_t i = 0, count = chunk.count; i < count; ++i) {
    const BFloat16 p_i{p[i]};
    float w =
        kWeights == Weights::split ? load_split(p_i, static_cast<int16_t>(remainder[i])) : load_full(p_i, master[i]);
    float b_i = kMomentum == Momentum::running ? b[i] : 0.0f;
    sgd_update<float, Numerics::torch, kFused, kMomentum>(w, load(g[i]), b_i, scalars, options);
    if (kMomentum == Momentum::running) b[i] = b_i;
    if (kWeights == Weights::split) {
      const uint32_t bits = bits_to_split(w);
      p[i] = static_cast<uint16_t>(parameter_of(bits));
      remainder[i] = static_cast<uint16_t>(bits);
    } else {
      master[i] = w;
      p[i] = pack<BFloat16>(rounded<BFloat16>(w)).bits;
    }
    if (kAverages) e[i] = averaged<kFused>(e[i], w, options.average_weight);
  }
}
template <bool kAverages, Momentum kMomentum, bool kFused>
WD_FUSED_INLINE void step_in_one_loop(const Chunk& chunk) {
  if (chunk.storage == Storage::float32)
    step_float32<kAverages, kMomentum, kFused>(chunk);
  else if (chunk.options->weights == Weights::split)
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
  const RowOptions& options = *chunk.options;
  const OptionScalars<float>& scalars = chunk.of_options->in_float;
  const bool has_masters = options.weights == Weights::split || options.weights == Weights::full;
  if (chunk.gradient == nullptr || chunk.momentum == Momentum::first) return false;
  if (scalars.penalizes || scalars.shrinks) return false;
  if (options.averages && options.average_storage != Storage::float32) return false;
  if (chunk.gradient_storage != chunk.storage || options.momentum != Storage::float32) return false;
  if (chunk.storage != Storage::float32 && (chunk.storage != Storage::bfloat16 || !has_masters)) return false;
  if (options.averages)
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
  const RowOptions& options = *chunk.options;
  const bool in_place = chunk.storage == Storage::float32;
  float* w = in_place ? static_cast<float*>(chunk.param) : w_copy;
  if (!in_place) load_weights(chunk, w);
  if (chunk.gradient != nullptr) {
    const float* g = gradient_in_opmath(chunk, g_copy);
    const bool buffer_in_place = options.momentum == Storage::float32;
    float* b = buffer_in_place ? static_cast<float*>(chunk.momentum_buffer) : b_copy;
    if (chunk.momentum == Momentum::running && !buffer_in_place) {
      if (options.momentum == Storage::int8)
        load_blocks(chunk.momentum_buffer, chunk.momentum_scale, b, chunk.count);
      else if (options.momentum == Storage::bfloat16)
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
      if (options.momentum == Storage::int8)
        store_blocks(chunk.momentum_buffer, chunk.momentum_scale, b, chunk.count);
      else if (options.momentum == Storage::bfloat16)
        store_all<BFloat16>(chunk.momentum_buffer, b, chunk.count);
      else
        store_all<Float16>(chunk.momentum_buffer, b, chunk.count);
    }
    if (!in_place) store_weights(chunk, w);
  }
  if (options.averages) {
    const float weight = chunk.of_options->in_float.average_weight;
    if (options.average_storage == Storage::float32)
      average_all<kFused, float>(chunk.average, w, weight, chunk.count);
    else if (options.average_storage == Storage::bfloat16)
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
  if (chunk.options->averages)
    average_all<kFused, double>(chunk.average, w, chunk.of_options->in_double.average_weight, chunk.count);
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
  if (chunk.options->zeroes && chunk.gradient != nullptr)
    std::memset(chunk.gradient, 0, static_cast<size_t>(chunk.count * bytes_of(chunk.gradient_storage)));
}

// --- instruction sets, as in flat_cpu.cpp

#define WD_FUSED_STEP(NAME, FUSED, IN_ONE_LOOP, TARGET) \
  TARGET void NAME(const Chunk& chunk) { step_chunk<FUSED, IN_ONE_LOOP>(chunk); }
#if defined(WD_FUSED_X86_TARGETS)
WD_FUSED_STEP(avx2, true, true, __attribute__((target("avx2,fma"))))
WD_FUSED_STEP(baseline, true, false, )
#else
WD_FUSED_STEP(baseline, true, true, )
#endif
WD_FUSED_STEP(separate, false, false, )
#undef WD_FUSED_STEP

}  // namespace

StepChunk options_step(bool fused_multiply_add) {
  if (!fused_multiply_add) return separate;
#if defined(WD_FUSED_X86_TARGETS)
  if (cpu_isa() == CpuIsa::avx2) return avx2;
#endif
  return baseline;
}

}  // namespace wd_fused
