// The update of float16 and bfloat16 tensors by AVX2, FMA and F16C: the formula of sgd_update.h over sixteen elements
// at once, with the same bits. GCC 12 makes no vectors of F16C's conversions itself. With integer operations instead,
// which it does make vectors of, ResNet-50's parameters take two to seven times as long. Called by flat_cpu.cpp.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

// To the end of the file, where templates are instantiated. Everything that is included from here on is inlined, so
// that nothing compiled for this target can take the place of a function that runs before the choice.
#pragma GCC target("avx2,fma,f16c")
#include "cpu/flat_cpu.h"

namespace wd_fused {
namespace {

constexpr int64_t kLanes = 16;

// How sixteen elements are stored, and the numbers in opmath: of float16 the first eight and the others; of bfloat16
// the lower and the upper half of each 128-bit lane, as AVX2 unpacks and packs them.
struct Halves {
  __m128i low, high;
};
WD_FUSED_INLINE Halves negated(Halves x) {
  const __m128i sign = _mm_set1_epi16(-0x8000);
  return {_mm_xor_si128(x.low, sign), _mm_xor_si128(x.high, sign)};
}
struct Whole {
  __m256i all;
};
WD_FUSED_INLINE Whole negated(Whole x) { return {_mm256_xor_si256(x.all, _mm256_set1_epi16(-0x8000))}; }

// Numbers in opmath and, where they come from memory or have just been rounded, the same as they are stored: what is
// not stored of them the compiler leaves out.
template <class Stored>
struct Floats {
  __m256 low, high;
  Stored stored;
};

template <class Stored>
WD_FUSED_INLINE Floats<Stored> operator-(Floats<Stored> x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.low, sign), _mm256_xor_ps(x.high, sign), negated(x.stored)};
}
template <class Stored>
WD_FUSED_INLINE Floats<Stored> multiply(Floats<Stored> a, float x) {
  return {_mm256_mul_ps(a.low, _mm256_set1_ps(x)), _mm256_mul_ps(a.high, _mm256_set1_ps(x)), Stored{}};
}
template <bool kFused, class Stored>
WD_FUSED_INLINE Floats<Stored> multiply_add(float a, Floats<Stored> x, Floats<Stored> y) {
  static_assert(kFused, "with fused multiply-add only");
  return {_mm256_fmadd_ps(_mm256_set1_ps(a), x.low, y.low), _mm256_fmadd_ps(_mm256_set1_ps(a), x.high, y.high),
          Stored{}};
}

// Elements of storage T. Each converts as load(), rounded() and pack() of sgd_update.h do, but that a NaN keeps some of
// its payload. It stays a NaN, since the 16 bits that are rounded off are 0 in every NaN that comes from a T.
template <class T>
struct Lanes;

template <>
struct Lanes<Float16> {
  using Numbers = Floats<Halves>;
  static WD_FUSED_INLINE Numbers unpacked(Halves stored) {
    return {_mm256_cvtph_ps(stored.low), _mm256_cvtph_ps(stored.high), stored};
  }
  static WD_FUSED_INLINE Numbers load(const Float16* from) {
    const auto* halves = reinterpret_cast<const __m128i*>(from);
    return unpacked({_mm_loadu_si128(halves), _mm_loadu_si128(halves + 1)});
  }
  static WD_FUSED_INLINE void store(Float16* to, Numbers x) {
    auto* halves = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(halves, x.stored.low);
    _mm_storeu_si128(halves + 1, x.stored.high);
  }
  static WD_FUSED_INLINE Numbers rounded(Numbers x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return unpacked({_mm256_cvtps_ph(x.low, kNearest), _mm256_cvtps_ph(x.high, kNearest)});
  }
};

template <>
struct Lanes<BFloat16> {
  using Numbers = Floats<Whole>;
  static WD_FUSED_INLINE Numbers load(const BFloat16* from) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, stored)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, stored)),
            {stored}};
  }
  static WD_FUSED_INLINE void store(BFloat16* to, Numbers x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.stored.all);
  }
  static WD_FUSED_INLINE Numbers rounded(Numbers x) {
    const __m256i low = raised(x.low), high = raised(x.high);
    return {
        nearest(low), nearest(high), {_mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16))}};
  }

 private:
  // The nearest in the upper 16 bits, and what is left of the sum in the lower.
  static WD_FUSED_INLINE __m256i raised(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), is_odd);
  }
  static WD_FUSED_INLINE __m256 nearest(__m256i raised) {  // blended, not masked: GCC 12 makes the mask for each use
    return _mm256_castsi256_ps(_mm256_blend_epi16(raised, _mm256_setzero_si256(), 0b01010101));
  }
};
}  // namespace

template <class T>
struct OpMath<Lanes<T>> {
  using type = typename Lanes<T>::Numbers;
  using scalar = float;
};
template <>
WD_FUSED_INLINE Floats<Halves> rounded<Lanes<Float16>>(Floats<Halves> x) {
  return Lanes<Float16>::rounded(x);
}
template <>
WD_FUSED_INLINE Floats<Whole> rounded<Lanes<BFloat16>>(Floats<Whole> x) {
  return Lanes<BFloat16>::rounded(x);
}

namespace {

template <class T, Numerics kNumerics, Momentum kMomentum>
WD_FUSED_INLINE void update_lanes(T* p, const T* g, T* b, const Scalars<float>& scalars) {
  using Numbers = typename Lanes<T>::Numbers;
  Numbers p_i = Lanes<T>::load(p);
  Numbers b_i = kMomentum == Momentum::running ? Lanes<T>::load(b) : Numbers{};
  sgd_update<Lanes<T>, kNumerics, true, kMomentum>(p_i, Lanes<T>::load(g), b_i, scalars);
  if (kMomentum != Momentum::none) Lanes<T>::store(b, b_i);
  Lanes<T>::store(p, p_i);
}

// A NaN without a payload, which rounding could carry over into the sign.
WD_FUSED_INLINE float quiet(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

template <class T, Numerics kNumerics, Momentum kMomentum>
void update(void* param, const void* gradient, void* momentum_buffer, int64_t count, const GroupScalars& group) {
  T* p = static_cast<T*>(param);
  const T* g = static_cast<const T*>(gradient);
  T* b = static_cast<T*>(momentum_buffer);
  constexpr bool kReads = kMomentum == Momentum::running, kWrites = kMomentum != Momentum::none;
  Scalars<float> scalars = group.in_float;
  for (float* scalar : {&scalars.minus_lr, &scalars.momentum, &scalars.one_minus_dampening, &scalars.weight_decay})
    *scalar = quiet(*scalar);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    update_lanes<T, kNumerics, kMomentum>(p + i, g + i, kWrites ? b + i : nullptr, scalars);
  if (i == count) return;
  T few_p[kLanes] = {}, few_g[kLanes] = {}, few_b[kLanes] = {};
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(T);
  std::memcpy(few_p, p + i, bytes);
  std::memcpy(few_g, g + i, bytes);
  if (kReads) std::memcpy(few_b, b + i, bytes);
  update_lanes<T, kNumerics, kMomentum>(few_p, few_g, few_b, scalars);
  std::memcpy(p + i, few_p, bytes);
  if (kWrites) std::memcpy(b + i, few_b, bytes);
}

template <class T, Numerics kNumerics>
UpdateFlat of_momentum(Momentum momentum) {
  switch (momentum) {
    case Momentum::none:
      return update<T, kNumerics, Momentum::none>;
    case Momentum::first:
      return update<T, kNumerics, Momentum::first>;
    case Momentum::running:
      return update<T, kNumerics, Momentum::running>;
  }
  return nullptr;
}

template <class T>
UpdateFlat of_numerics(Numerics numerics, Momentum momentum) {
  return numerics == Numerics::torch ? of_momentum<T, Numerics::torch>(momentum)
                                     : of_momentum<T, Numerics::opmath>(momentum);
}

}  // namespace

UpdateFlat half_update(Storage storage, Numerics numerics, Momentum momentum) {
  return storage == Storage::float16 ? of_numerics<Float16>(numerics, momentum)
                                     : of_numerics<BFloat16>(numerics, momentum);
}

}  // namespace wd_fused
#endif
