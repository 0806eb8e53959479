// The arithmetic of one element of an SGD step, for host and device: every rounding is written out, so that the
// compiler has no say in the bits (build with -ffp-contract=off). Knows nothing of torch. Used by csrc/cpu and
// sgd_cuda.cuh.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define WD_FUSED_INLINE __host__ __device__ __forceinline__
#else
#define WD_FUSED_INLINE inline __attribute__((always_inline))
#endif

namespace wd_fused {

// What a parameter, its gradient and its momentum buffer are stored as. int8: a momentum buffer in blocks, of
// options.h.
enum class Storage : int8_t { float32, float64, float16, bfloat16, int8 };
inline constexpr int kStorages = 4;  // of parameters
WD_FUSED_INLINE constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : storage == Storage::int8 ? 1 : 2;
}

// torch: each intermediate is rounded to the storage dtype, as separate operators would. opmath: only the stores are.
enum class Numerics : int8_t { torch, opmath };

// What a step does with the momentum buffer: nothing, fill it (a tensor's first step), or update it.
enum class Momentum : int8_t { none, first, running };

template <class To, class From>
WD_FUSED_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__CUDA_ARCH__)
// The GPU's own conversions: one instruction each. bfloat16's came with compute capability 8.0.
__device__ __forceinline__ Float16 nearest_float16(float x) {
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ BFloat16 nearest_bfloat16(float x) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
#endif
#endif

// load: storage to opmath, exact. rounded: the opmath number nearest to x that T can hold, ties to even. pack: such a
// number to storage, exact. All without branches and, but for the last step of pack, on 32 bits, so that the compiler
// makes good vectors of them: staying in float between two roundings is twice as fast as going through 16 bits.
WD_FUSED_INLINE float load(float x) { return x; }
WD_FUSED_INLINE double load(double x) { return x; }
WD_FUSED_INLINE float load(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
WD_FUSED_INLINE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  // A subnormal is an integer times 2^-24: put behind 0.5, whose last place is 2^-24, it is left over exactly.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(0x3f000000u + magnitude) - 0.5f);
  const uint32_t exponent_shift = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // infinity and NaN keep exponent 255
  const uint32_t normal = (magnitude << 13) + exponent_shift;
  return bits_as<float>((magnitude < 0x0400u ? subnormal : normal) | sign);
#endif
}

template <class T, class Op>
Op rounded(Op x) = delete;
template <>
WD_FUSED_INLINE float rounded<float>(float x) {
  return x;
}
template <>
WD_FUSED_INLINE double rounded<double>(double x) {
  return x;
}
template <>
WD_FUSED_INLINE float rounded<BFloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return load(nearest_bfloat16(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return bits_as<float>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : nearest);
#endif
}
template <>
WD_FUSED_INLINE float rounded<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return load(nearest_float16(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t nearest = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
  // Below 2^-14 the last place is 2^-24, which is that of 0.5: the addition rounds there.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f - 0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fc00000u : 0x7f800000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : nearest;
  return bits_as<float>((nearest >= 0x47800000u ? special : finite) | (bits & 0x80000000u));
#endif
}

template <class T, class Op>
T pack(Op x) = delete;
template <>
WD_FUSED_INLINE float pack<float>(float x) {
  return x;
}
template <>
WD_FUSED_INLINE double pack<double>(double x) {
  return x;
}
template <>
WD_FUSED_INLINE BFloat16 pack<BFloat16>(float x) {
  return {static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16)};
}
template <>
WD_FUSED_INLINE Float16 pack<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return nearest_float16(x);
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t exponent_shift = magnitude >= 0x7f800000u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude - exponent_shift) >> 13;
  return {static_cast<uint16_t>((magnitude < 0x38800000u ? subnormal : normal) | ((bits >> 16) & 0x8000u))};
#endif
}

// What arithmetic is done in: on a parameter, which half_cpu.cpp makes several at once, and what hyperparameters are.
template <class T>
struct OpMath {
  using type = float;
  using scalar = float;
};
template <>
struct OpMath<double> {
  using type = double;
  using scalar = double;
};

// A yes or no as wide as an opmath number: a bool in the condition of a select keeps GCC 12 from making vectors of it.
template <class Op>
struct Flag {
  using type = int32_t;
};
template <>
struct Flag<double> {
  using type = int64_t;
};

// A group's hyperparameters, in opmath, in the form that the update uses.
template <class Op>
struct Scalars {
  Op minus_lr;
  Op momentum;
  Op one_minus_dampening;
  Op weight_decay;
  typename Flag<Op>::type
      decays;  // the user's weight_decay is not 0: it may be in Op, and 0 * p still turns -0 and inf
  typename Flag<Op>::type nesterov;
  typename Flag<Op>::type maximize;
};

// The same in both opmaths.
struct GroupScalars {
  Scalars<float> in_float;
  Scalars<double> in_double;
};

// a*x + y with one rounding, or with two where torch itself runs without fused multiply-add.
template <bool kFused>
WD_FUSED_INLINE float multiply_add(float a, float x, float y) {
#if defined(__CUDA_ARCH__)
  return kFused ? __fmaf_rn(a, x, y) : __fadd_rn(__fmul_rn(a, x), y);
#else
  return kFused ? __builtin_fmaf(a, x, y) : a * x + y;
#endif
}
template <bool kFused>
WD_FUSED_INLINE double multiply_add(double a, double x, double y) {
#if defined(__CUDA_ARCH__)
  return kFused ? __fma_rn(a, x, y) : __dadd_rn(__dmul_rn(a, x), y);
#else
  return kFused ? __builtin_fma(a, x, y) : a * x + y;
#endif
}
WD_FUSED_INLINE float multiply(float a, float x) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, x);
#else
  return a * x;
#endif
}
WD_FUSED_INLINE double multiply(double a, double x) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, x);
#else
  return a * x;
#endif
}

// A gradient that torch.amp.GradScaler has scaled, as its unscale_() gives it back: times the scale's reciprocal.
template <class T, Numerics kNumerics>
WD_FUSED_INLINE typename OpMath<T>::type unscaled(typename OpMath<T>::type g, typename OpMath<T>::type inverse_scale) {
  g = multiply(g, inverse_scale);
  return kNumerics == Numerics::torch ? rounded<T>(g) : g;
}
WD_FUSED_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(x);
#else
  return 1 / x;
#endif
}
WD_FUSED_INLINE double reciprocal(double x) { return 1 / x; }

// Scalars as 64 bits: an opmath number's own bits (from_word), or a double's, rounded to opmath by integer arithmetic:
// no float32 kernel shall need double-precision instructions.
WD_FUSED_INLINE uint64_t to_word(float value) { return bits_as<uint32_t>(value); }
WD_FUSED_INLINE uint64_t to_word(double value) { return bits_as<uint64_t>(value); }
template <class Op>
WD_FUSED_INLINE Op from_word(uint64_t word) = delete;
template <>
WD_FUSED_INLINE float from_word<float>(uint64_t word) {
  return bits_as<float>(static_cast<uint32_t>(word));
}
template <>
WD_FUSED_INLINE double from_word<double>(uint64_t word) {
  return bits_as<double>(word);
}
template <class Op>
WD_FUSED_INLINE Op to_opmath(uint64_t double_bits) = delete;
template <>
WD_FUSED_INLINE double to_opmath<double>(uint64_t double_bits) {
  return bits_as<double>(double_bits);
}
template <>
WD_FUSED_INLINE float to_opmath<float>(uint64_t double_bits) {
  constexpr uint64_t kInfinity = uint64_t{0x7ff} << 52;
  constexpr int kSmallestNormal = 1023 - 126;  // the exponent of float's, as double writes it
  const uint64_t magnitude = double_bits & ~(uint64_t{1} << 63);
  const auto sign = static_cast<uint32_t>(double_bits >> 63) << 31;
  if (magnitude > kInfinity) return bits_as<float>(sign | 0x7fc00000u);
  const auto exponent = static_cast<int>(magnitude >> 52);
  // Below float's normal numbers the significand is shifted to their last place, 2^-149; above, exponent and all are
  // kept as they are but for the bias. Then to nearest, ties to even; a carry ends in the exponent, as it must.
  const int below = exponent < kSmallestNormal ? kSmallestNormal - exponent : 0;
  const uint64_t significand = (magnitude & ((uint64_t{1} << 52) - 1)) | (uint64_t{exponent != 0} << 52);
  const uint64_t all = below == 0 ? magnitude - (uint64_t{1023 - 127} << 52) : significand;
  const int shift = below < 32 ? 29 + below : 61;
  const uint64_t half = (uint64_t{1} << (shift - 1)) - 1 + ((all >> shift) & 1);
  const uint64_t nearest = (all + half) >> shift;
  return bits_as<float>(sign | static_cast<uint32_t>(nearest < 0x7f800000u ? nearest : 0x7f800000u));
}

template <class Op>
WD_FUSED_INLINE Op sign_of(Op x) {
  return x > 0 ? Op{1} : x < 0 ? Op{-1} : Op{0};
}

// The place of OptionScalars (options.h) in a step without options.
struct NoOptions {
  static constexpr bool kIsUsed = false;
  static constexpr bool kScales = false;
  static constexpr bool kHasPenalties = false;
};

// One SGD step of one element: p parameter, g gradient, b momentum buffer, all in opmath. p and b come out rounded, but
// for those of options: they may be stored otherwise.
template <class T, Numerics kNumerics, bool kFused, Momentum kMomentum, class Options = NoOptions>
WD_FUSED_INLINE void sgd_update(typename OpMath<T>::type& p, typename OpMath<T>::type g, typename OpMath<T>::type& b,
                                const Scalars<typename OpMath<T>::scalar>& scalars, const Options& options = {}) {
  using Op = typename OpMath<T>::type;
  using Scalar = typename OpMath<T>::scalar;
  const auto round = [](Op x) { return kNumerics == Numerics::torch ? rounded<T>(x) : x; };
  const auto fma = [&](Scalar a, Op x, Op y) { return round(multiply_add<kFused>(a, x, y)); };

  if constexpr (Options::kScales) {
    g = round(
        multiply(g, options.inverse_scale));  // 1 where there is no such thing: exact, and better vectors than a choice
    g = round(multiply(g, options.clip));
  }
  g = scalars.maximize ? -g : g;
  g = scalars.decays ? fma(scalars.weight_decay, p, g) : g;
  if constexpr (Options::kHasPenalties) {
    g = options.penalizes ? fma(options.l1, sign_of(p), g) : g;
    p = options.shrinks ? round(multiply(p, options.keep)) : p;
  }
  if (kMomentum == Momentum::first) b = g;
  if (kMomentum == Momentum::running) b = fma(scalars.one_minus_dampening, g, round(multiply(b, scalars.momentum)));
  if (kMomentum != Momentum::none) g = scalars.nesterov ? fma(scalars.momentum, b, g) : b;
  p = multiply_add<kFused>(scalars.minus_lr, g, p);
  if constexpr (!Options::kIsUsed) {
    p = rounded<T>(p);
    if (kNumerics == Numerics::opmath && kMomentum != Momentum::none) b = rounded<T>(b);
  }
}

}  // namespace wd_fused
