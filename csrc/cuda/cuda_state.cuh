// What is stored otherwise than as plain numbers, a lane's elements at once: weights in two parts, stochastic rounding,
// int8 momentum. The bits are those of options.h, element by element; here in fewer instructions, with what is rare (a
// weight that somebody has written, a NaN, a quotient near a tie) left to options.h. Device code.
#pragma once

#include "cuda/cuda_lanes.cuh"

namespace wd_fused {

// --- which types a kind's operands have

template <Storage kStorage>
struct TypeOf;
template <>
struct TypeOf<Storage::float32> {
  using type = float;
};
template <>
struct TypeOf<Storage::float64> {
  using type = double;
};
template <>
struct TypeOf<Storage::float16> {
  using type = Float16;
};
template <>
struct TypeOf<Storage::bfloat16> {
  using type = BFloat16;
};
template <>
struct TypeOf<Storage::int8> {
  using type = int8_t;
};
template <Weights kWeights, class P>
struct ExtraOf {
  using type = P;  // kahan, or none
};
template <class P>
struct ExtraOf<Weights::full, P> {
  using type = float;
};
template <class P>
struct ExtraOf<Weights::split, P> {
  using type = int16_t;
};
template <class P>
struct ExtraOf<Weights::split24, P> {
  using type = int8_t;
};

// --- elements of packed words

template <class T, int kCount>
WD_FUSED_DEVICE uint32_t bits_at(const Packed<T, kCount>& packed, int i) {
  constexpr int kOfWord = 4 / sizeof(T);
  if constexpr (kOfWord == 1) return packed.words[i];
  return (packed.words[i / kOfWord] >> (8 * sizeof(T) * (i % kOfWord))) & ((1u << (8 * sizeof(T))) - 1);
}
// The bytes of two words that a selector names, the lowest first.
template <uint32_t kSelector>
WD_FUSED_DEVICE uint32_t permuted(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, kSelector);
}
WD_FUSED_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return permuted<0x5410>(a, b); }
WD_FUSED_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return permuted<0x7632>(a, b); }
// The byte kByte of each of four.
template <int kByte>
WD_FUSED_DEVICE uint32_t bytes_of_four(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  constexpr uint32_t kTwo = kByte | (kByte + 4) << 4;
  return low_halves(permuted<kTwo>(a, b), permuted<kTwo>(c, d));
}

template <int kCount>
WD_FUSED_DEVICE bool any_nan(const Lane<float, kCount>& w) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) any |= w.x[i] != w.x[i] || w.x[i + 1] != w.x[i + 1];
  return any;
}

// Exact: numbers that T can hold.
template <class T, int kCount>
WD_FUSED_DEVICE Packed<T, kCount> packed_exactly(const Lane<typename OpMath<T>::type, kCount>& lane) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Packed<T, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
      result.words[i / 2] = bits_as<uint32_t>(lane.x[i]) >> 16 | (bits_as<uint32_t>(lane.x[i + 1]) & 0xffff0000u);
    return result;
  } else {
    return packed<T, kCount>(lane);
  }
}

// --- weights

template <Weights kWeights, class P, class E, int kCount>
struct WeightsOf;

template <class P, class E, int kCount>
struct WeightsOf<Weights::parameter, P, E, kCount> {
  using Numbers = Lane<typename OpMath<P>::type, kCount>;
  static WD_FUSED_DEVICE Numbers loaded(const Packed<P, kCount>& p, const Packed<E, kCount>&) { return load(p); }
  // w comes out as an average sees it.
  static WD_FUSED_DEVICE void store(Numbers& w, Packed<P, kCount>& p, Packed<E, kCount>&) {
    p = packed<P, kCount>(w);
    w = load(p);
  }
};

template <class P, int kCount>
struct WeightsOf<Weights::full, P, float, kCount> {
  using Numbers = Lane<float, kCount>;
  static WD_FUSED_DEVICE Numbers loaded(const Packed<P, kCount>& p, const Packed<float, kCount>& master) {
    Numbers w = load(master);
    const Packed<P, kCount> shown = packed<P, kCount>(w);
    uint32_t other = 0;
#pragma unroll
    for (int i = 0; i < Packed<P, kCount>::kWords; ++i) other |= shown.words[i] ^ p.words[i];
    if (other != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) w.x[i] = load_full(P{static_cast<uint16_t>(bits_at(p, i))}, w.x[i]);
    }
    return w;
  }
  static WD_FUSED_DEVICE void store(Numbers& w, Packed<P, kCount>& p, Packed<float, kCount>& master) {
    p = packed<P, kCount>(w);
    master = packed<float, kCount>(w);
  }
};

template <class P, int kCount>
struct WeightsOf<Weights::kahan, P, P, kCount> {
  using Numbers = Lane<float, kCount>;
  static WD_FUSED_DEVICE Numbers loaded(const Packed<P, kCount>& p, const Packed<P, kCount>& compensation) {
    Numbers w = load(p);
    const Numbers more = load(compensation);
#pragma unroll
    for (int i = 0; i < kCount; ++i) w.x[i] += more.x[i];
    return w;
  }
  static WD_FUSED_DEVICE void store(Numbers& w, Packed<P, kCount>& p, Packed<P, kCount>& compensation) {
    p = packed<P, kCount>(w);
    const Numbers kept = load(p);
    Numbers difference;
#pragma unroll
    for (int i = 0; i < kCount; ++i) difference.x[i] = lost<P>(w.x[i], kept.x[i]);
    compensation = packed<P, kCount>(difference);
    w = kept;
  }
};

// A weight's bits are the parameter above the remainder, less the remainder's sign: (x ^ 0x8000) - 0x8000. Where
// somebody has made the parameter 0, a negative remainder makes a NaN of it, as only NaN has.
template <int kCount>
struct WeightsOf<Weights::split, BFloat16, int16_t, kCount> {
  using Numbers = Lane<float, kCount>;
  static WD_FUSED_DEVICE Numbers loaded(const Packed<BFloat16, kCount>& p, const Packed<int16_t, kCount>& remainder) {
    Numbers w;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t below = remainder.words[i / 2] ^ 0x80008000u;
      w.x[i] = bits_as<float>(low_halves(below, p.words[i / 2]) - 0x8000u);
      w.x[i + 1] = bits_as<float>(high_halves(below, p.words[i / 2]) - 0x8000u);
    }
    if (any_nan(w)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        w.x[i] =
            load_split(BFloat16{static_cast<uint16_t>(bits_at(p, i))}, static_cast<int16_t>(bits_at(remainder, i)));
    }
    return w;
  }
  static WD_FUSED_DEVICE void store(Numbers& w, Packed<BFloat16, kCount>& p, Packed<int16_t, kCount>& remainder) {
    Numbers kept = w;
    if (any_nan(w)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) kept.x[i] = bits_as<float>(bits_to_split(w.x[i]));
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const auto low = bits_as<uint32_t>(kept.x[i]), high = bits_as<uint32_t>(kept.x[i + 1]);
      p.words[i / 2] = high_halves(low + 0x8000u, high + 0x8000u);
      remainder.words[i / 2] = low_halves(low, high);
    }
  }
};

template <int kCount>
struct WeightsOf<Weights::split24, BFloat16, int8_t, kCount> {
  using Numbers = Lane<float, kCount>;
  static WD_FUSED_DEVICE Numbers loaded(const Packed<BFloat16, kCount>& p, const Packed<int8_t, kCount>& remainder) {
    Numbers w;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Four bytes: what is cut off, the remainder, the parameter.
      const uint32_t below = (remainder.words[i / 4] ^ 0x80808080u) >> (8 * (i % 4)) & 0xffu;
      const uint32_t above = i % 2 == 0 ? p.words[i / 2] << 16 : p.words[i / 2] & 0xffff0000u;
      w.x[i] = bits_as<float>((above | below << 8) - 0x8000u);
    }
    if (any_nan(w)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        w.x[i] =
            load_split24(BFloat16{static_cast<uint16_t>(bits_at(p, i))}, static_cast<int8_t>(bits_at(remainder, i)));
    }
    return w;
  }
  static WD_FUSED_DEVICE void store(Numbers& w, Packed<BFloat16, kCount>& p, Packed<int8_t, kCount>& remainder) {
    if (any_nan(w)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) w.x[i] = bits_as<float>(bits_to_split(w.x[i]));
    }
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits[i] = bits_as<uint32_t>(w.x[i]);
      bits[i] += 0x7fu + ((bits[i] >> 8) & 1u);  // as to_24_bits, but for the last byte
      w.x[i] = bits_as<float>(bits[i] & 0xffffff00u);
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) p.words[i / 2] = high_halves(bits[i] + 0x8000u, bits[i + 1] + 0x8000u);
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      remainder.words[i / 4] = bytes_of_four<1>(bits[i], bits[i + 1], bits[i + 2], bits[i + 3]);
  }
};

// --- stochastic rounding

// index: of the first element in its row. Of the random bits the upper sixteen are wanted, which are those of the last
// product: what random_bits() folds into the lower ones is left out.
template <int kCount>
WD_FUSED_DEVICE void round_stochastically(Lane<float, kCount>& w, Packed<BFloat16, kCount>& p, RowKey key,
                                          uint64_t index) {
  const bool has_nan = any_nan(w);
  const uint32_t begin = static_cast<uint32_t>(index) + key.first + static_cast<uint32_t>(index >> 32) * 0x9e3779b9u;
  const bool is_simple = !has_nan && static_cast<uint32_t>(index) <= 0xffffffffu - kCount;
  if (is_simple) {
    const uint32_t second = key.second ^ (key.second >> 15);
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint32_t x = begin + static_cast<uint32_t>(i);
      x ^= x >> 16;
      x *= 0x7feb352du;
      x = x ^ (x >> 15) ^ second;
      x *= 0x846ca68bu;
      bits[i] = bits_as<uint32_t>(w.x[i]) + (x >> 16);
      w.x[i] = bits_as<float>(bits[i] & 0xffff0000u);
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) p.words[i / 2] = high_halves(bits[i], bits[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      w.x[i] = stochastically_rounded(w.x[i], random_bits(key, index + static_cast<uint64_t>(i)));
    p = packed_exactly<BFloat16, kCount>(w);
  }
}

// --- momentum

// Lanes that share a block of int8 momentum.
template <int kCount>
inline constexpr int kLanesOfBlock = static_cast<int>(kMomentumBlock) / kCount;

template <class M, int kCount>
WD_FUSED_DEVICE Lane<typename OpMath<M>::type, kCount> load_momentum(const Packed<M, kCount>& packed, float scale) {
  if constexpr (!std::is_same_v<M, int8_t>) {
    return load(packed);
  } else {
    Lane<float, kCount> b;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Behind 2^23, whose last place is 1: less that and what made the byte unsigned.
      const uint32_t word = packed.words[i / 4] ^ 0x80808080u;
      const float value = bits_as<float>(0x4b000000u | ((word >> (8 * (i % 4))) & 0xffu)) - 8388736.0f;
      b.x[i] = multiply(scale, multiply(value, value < 0 ? -value : value));
    }
    return b;
  }
}

template <int kLanes>
WD_FUSED_DEVICE uint32_t largest_of_lanes(uint32_t largest) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  return largest;
}
// The scale of each block out of the numbers that its lanes hold; all lanes of a warp.
template <int kCount>
WD_FUSED_DEVICE float block_scale(const Lane<float, kCount>& b) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = max(largest, magnitude_bits(b.x[i]));
  return int8_scale(largest_of_lanes<kLanesOfBlock<kCount>>(largest));
}

WD_FUSED_DEVICE float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
WD_FUSED_DEVICE float approximate_root(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// to_int8 of each. The root of an approximate quotient is off by less than 2.5 * 2^-23 of it, 4e-5 at most: as near to
// a tie as kNearTie the exact one is taken, one number in 4,000; and for all where the scale has no good reciprocal.
inline constexpr float kNearTie = 0x1p-13f;
template <int kCount>
WD_FUSED_DEVICE Packed<int8_t, kCount> packed_int8(const Lane<float, kCount>& b, float scale) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23, whose last place is 1
  Packed<int8_t, kCount> result{};
  if (!(scale > 0) || bits_as<uint32_t>(scale) >= 0x7f800000u) return result;
  const float inverse = approximate_reciprocal(scale);
  uint32_t bytes[kCount];
  uint32_t exactly = 0;  // a bit a number
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float root = copysignf(approximate_root(multiply(fabsf(b.x[i]), inverse)), b.x[i]);
    const float shifted = root + kToInteger;
    bytes[i] = bits_as<uint32_t>(shifted);
    exactly |= fabsf(root - (shifted - kToInteger)) > 0.5f - kNearTie ? 1u << i : 0u;
  }
  if (scale < 0x1p-100f || scale > 0x1p100f) exactly = (1u << kCount) - 1;
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    result.words[i / 4] = bytes_of_four<0>(bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]);
#pragma unroll 1
  for (; exactly != 0; exactly &= exactly - 1) {
    const int which = __ffs(static_cast<int>(exactly)) - 1;
    float number = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) number = i == which ? b.x[i] : number;
    const uint32_t byte = static_cast<uint32_t>(static_cast<int32_t>(to_int8(number, scale))) & 0xffu;
    const int shift = which % 4 * 8;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      if (i == which / 4) result.words[i] = (result.words[i] & ~(0xffu << shift)) | byte << shift;
  }
  return result;
}

}  // namespace wd_fused
