// A lane's elements of an operand at once: as they lie in memory, and as numbers in opmath that sgd_update
// (sgd_update.h) takes for one. bfloat16 and float16 are rounded two at a time: one instruction, and on the fast unit.
// Device code.
#pragma once

#include "cuda/cuda_common.cuh"

namespace wd_fused {

// kCount elements as they lie in memory.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Packed {
  static constexpr int kWords = sizeof(T) * kCount / 4;
  uint32_t words[kWords];
};

// Numbers in opmath.
template <class Op, int kCount>
struct Lane {
  Op x[kCount];
};
// The T of sgd_update: numbers are rounded to T.
template <class T, int kCount>
struct InLanes;
template <class T, int kCount>
struct OpMath<InLanes<T, kCount>> {
  using scalar = typename OpMath<T>::type;
  using type = Lane<scalar, kCount>;
};

template <class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> operator-(Lane<Op, kCount> x) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.x[i] = -x.x[i];
  return x;
}
template <class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> multiply(Lane<Op, kCount> x, Op a) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.x[i] = multiply(x.x[i], a);
  return x;
}
template <bool kFused, class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> multiply_add(Op a, const Lane<Op, kCount>& x, Lane<Op, kCount> y) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.x[i] = multiply_add<kFused>(a, x.x[i], y.x[i]);
  return y;
}
template <class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> sign_of(Lane<Op, kCount> x) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.x[i] = sign_of(x.x[i]);
  return x;
}

// Two floats rounded, the first in the low half.
template <class T>
WD_FUSED_DEVICE uint32_t rounded_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return uint32_t{pack<T>(rounded<T>(low)).bits} | uint32_t{pack<T>(rounded<T>(high)).bits} << 16;
#endif
}
// The numbers of a pair.
template <class T>
WD_FUSED_DEVICE float low_of(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) return bits_as<float>(pair << 16);
  return load(Float16{static_cast<uint16_t>(pair)});
}
template <class T>
WD_FUSED_DEVICE float high_of(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) return bits_as<float>(pair & 0xffff0000u);
  return load(Float16{static_cast<uint16_t>(pair >> 16)});
}

// From memory to numbers, and back: rounded to T.
template <class T, int kCount>
WD_FUSED_DEVICE Lane<typename OpMath<T>::type, kCount> load(const Packed<T, kCount>& packed) {
  using Numbers = Lane<typename OpMath<T>::type, kCount>;
  if constexpr (sizeof(T) != 2) {
    return bits_as<Numbers>(packed);
  } else {
    Numbers lane;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      lane.x[i] = i % 2 == 0 ? low_of<T>(packed.words[i / 2]) : high_of<T>(packed.words[i / 2]);
    return lane;
  }
}
template <class T, int kCount>
WD_FUSED_DEVICE Packed<T, kCount> packed(const Lane<typename OpMath<T>::type, kCount>& lane) {
  if constexpr (sizeof(T) != 2) {
    return bits_as<Packed<T, kCount>>(lane);
  } else {
    Packed<T, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) result.words[i / 2] = rounded_pair<T>(lane.x[i], lane.x[i + 1]);
    return result;
  }
}
// sgd_update's rounding.
template <class Tag>
struct ElementOf;
template <class T, int kCount>
struct ElementOf<InLanes<T, kCount>> {
  using type = T;
};
template <class Tag, class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> rounded(Lane<Op, kCount> lane) {
  using T = typename ElementOf<Tag>::type;
  if constexpr (sizeof(T) == 2) return load(packed<T, kCount>(lane));
  return lane;
}

template <class Op, int kCount>
WD_FUSED_DEVICE Lane<Op, kCount> averaged(const Lane<Op, kCount>& e, const Lane<Op, kCount>& x, Op weight) {
  if (weight == 1) return x;
  Lane<Op, kCount> difference;
#pragma unroll
  for (int i = 0; i < kCount; ++i) difference.x[i] = x.x[i] - e.x[i];
  if (weight < Op{0.5}) return multiply_add<true>(weight, difference, e);
  return multiply_add<true>(weight - 1, difference, x);
}

// --- accesses

// All elements of an aligned piece.
template <class T, int kCount>
WD_FUSED_DEVICE Packed<T, kCount> read_whole(const T* at, bool once = false) {
  Packed<T, kCount> packed;
  if constexpr (sizeof(packed) >= 16) {
#pragma unroll
    for (int i = 0; i < Packed<T, kCount>::kWords / 4; ++i) {
      const auto* from = reinterpret_cast<const uint4*>(in_global_memory(at)) + i;
      const uint4 four = once ? __ldcs(from) : *from;  // evicted first: nobody reads a gradient again
      packed.words[4 * i] = four.x, packed.words[4 * i + 1] = four.y;
      packed.words[4 * i + 2] = four.z, packed.words[4 * i + 3] = four.w;
    }
  } else if constexpr (sizeof(packed) == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(in_global_memory(at));
    packed.words[0] = two.x, packed.words[1] = two.y;
  } else {
    packed.words[0] = *reinterpret_cast<const uint32_t*>(in_global_memory(at));
  }
  return packed;
}
template <class T, int kCount>
WD_FUSED_DEVICE void write_whole(T* at, const Packed<T, kCount>& packed) {
  if constexpr (sizeof(packed) >= 16) {
#pragma unroll
    for (int i = 0; i < Packed<T, kCount>::kWords / 4; ++i)
      reinterpret_cast<uint4*>(in_global_memory(at))[i] = {packed.words[4 * i], packed.words[4 * i + 1],
                                                           packed.words[4 * i + 2], packed.words[4 * i + 3]};
  } else if constexpr (sizeof(packed) == 8) {
    *reinterpret_cast<uint2*>(in_global_memory(at)) = {packed.words[0], packed.words[1]};
  } else {
    *reinterpret_cast<uint32_t*>(in_global_memory(at)) = packed.words[0];
  }
}

// Which elements of a piece there are.
struct Range {
  int begin;
  int end;
  WD_FUSED_DEVICE bool has(int i) const { return begin <= i && i < end; }
};
template <class T>
struct BitsOf;  // an element as an unsigned number
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <>
struct BitsOf<Float16> {
  using type = uint16_t;
};
template <>
struct BitsOf<BFloat16> {
  using type = uint16_t;
};
template <>
struct BitsOf<int16_t> {
  using type = uint16_t;
};
template <>
struct BitsOf<int8_t> {
  using type = uint8_t;
};
// Element by element; those that are not there are 0.
template <class T, int kCount>
WD_FUSED_DEVICE Packed<T, kCount> read_elements(const T* at, Range range) {
  using Bits = typename BitsOf<T>::type;
  const auto* from = reinterpret_cast<const Bits*>(in_global_memory(at));
  Packed<T, kCount> packed{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Bits bits = range.has(i) ? from[i] : Bits{0};
    if constexpr (sizeof(T) == 8) {
      packed.words[2 * i] = static_cast<uint32_t>(bits);
      packed.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else {
      constexpr int kOfWord = 4 / sizeof(T);
      packed.words[i / kOfWord] |= uint32_t{bits} << (8 * sizeof(T) * (i % kOfWord));
    }
  }
  return packed;
}
template <class T, int kCount>
WD_FUSED_DEVICE void write_elements(T* at, const Packed<T, kCount>& packed, Range range) {
  using Bits = typename BitsOf<T>::type;
  auto* to = reinterpret_cast<Bits*>(in_global_memory(at));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!range.has(i)) continue;
    if constexpr (sizeof(T) == 8) {
      to[i] = uint64_t{packed.words[2 * i]} | uint64_t{packed.words[2 * i + 1]} << 32;
    } else {
      constexpr int kOfWord = 4 / sizeof(T);
      to[i] = static_cast<Bits>(packed.words[i / kOfWord] >> (8 * sizeof(T) * (i % kOfWord)));
    }
  }
}

}  // namespace wd_fused
