// float16 and bfloat16, packed pairs, conversions between all types, comparisons. Included by translated kernels.
#pragma once

#include "arithmetic.h"

namespace simulated_gpu {

enum class Rounding { nearest, zero, down, up };

struct Half {
  uint16_t bits;
  static constexpr int kFraction = 10, kLeastExponent = -14, kGreatestExponent = 15;
};
struct BFloat {
  uint16_t bits;
  static constexpr int kFraction = 7, kLeastExponent = -126, kGreatestExponent = 127;
};
template <class T>
struct Two {  // as they lie in a register
  T low, high;
};
template <class T>
inline constexpr bool is_half = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;
template <class T>
using IfHalf = std::enable_if_t<is_half<T>, int>;
inline constexpr uint16_t kHalfNan = 0x7fff;  // of both, as the manual has it

// --- to wider ones

inline float widen_half(Half a) {
  const uint32_t magnitude = a.bits & 0x7fffu, sign = uint32_t(a.bits & 0x8000u) << 16;
  if (magnitude > 0x7c00) return canonical(__builtin_nanf(""));
  // The exponents' biases differ by 112; a power of 2 does for subnormal ones, too.
  const auto number = magnitude == 0x7c00 ? 0x7f800000u : bits_of(of<float>(magnitude << 13) * 0x1p112f);
  return of<float>(number | sign);
}
template <class To>
inline To widen(Half a) {
  return widen_half(a);
}
template <class To>
inline To widen(BFloat a) {
  return of<float>(uint32_t(a.bits) << 16);
}
template <class To>
inline To widen(float a) {
  return To(a);
}

// --- to narrower ones

inline bool rounds_up(Rounding mode, bool is_negative, bool is_odd, uint64_t rest, uint64_t half) {
  switch (mode) {
    case Rounding::nearest:
      return rest > half || (rest == half && is_odd);
    case Rounding::zero:
      return false;
    case Rounding::down:
      return is_negative && rest != 0;
    default:
      return !is_negative && rest != 0;
  }
}

// What a double becomes with so few bits of fraction and such exponents.
template <class T>
inline T narrow_double(double x, Rounding mode) {
  const auto bits = of<uint64_t>(x);
  const bool is_negative = bits >> 63 != 0;
  const auto sign = uint16_t(is_negative ? 0x8000 : 0);
  if (x != x) return {kHalfNan};
  constexpr auto kInfinity = uint16_t((2 * T::kGreatestExponent + 1) << T::kFraction);
  if (x - x != 0) return {uint16_t(sign | kInfinity)};
  const int exponent = int(bits >> 52 & 0x7ff) - 1023;
  if (exponent == -1023 && bits << 1 == 0) return {sign};
  // a double that is subnormal is far below anything here
  const uint64_t significand = (bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
  const int below = exponent < T::kLeastExponent ? T::kLeastExponent - exponent : 0;
  const int drop = 52 - T::kFraction + below;
  uint64_t kept = drop < 63 ? significand >> drop : 0;
  const uint64_t rest = drop < 63 ? significand & ((uint64_t(1) << drop) - 1) : 1;
  const uint64_t half = drop < 63 ? uint64_t(1) << (drop - 1) : 2;
  kept += rounds_up(mode, is_negative, kept & 1, rest, half);
  // kept has the leading one where the number is normal: added to the exponent, it carries
  uint64_t result = kept;
  if (below == 0) result += uint64_t(exponent - T::kLeastExponent) << T::kFraction;
  if (result >= kInfinity) {
    const bool to_infinity =
        mode == Rounding::nearest || (mode == Rounding::down && is_negative) || (mode == Rounding::up && !is_negative);
    result = to_infinity ? kInfinity : kInfinity - 1;
  }
  return {uint16_t(sign | result)};
}

inline Half nearest_half(float x) {
  const auto bits = of<uint32_t>(x);
  const auto sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result = 0;
  if (magnitude >= 0x47800000)  // 2^16
    result = magnitude > 0x7f800000 ? kHalfNan : 0x7c00;
  else if (magnitude < 0x38800000)  // 2^-14: the addition rounds to multiples of 2^-24
    result = bits_of(of<float>(magnitude) + 0.5f) - bits_of(0.5f);
  else
    result = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {result == kHalfNan ? kHalfNan : uint16_t(result | sign)};
}

template <Rounding kMode>
inline float narrow_to_float(long double x) {
  const auto near = float(x);
  if (kMode == Rounding::nearest || !(near - near == 0 || x - x == 0) || near == x) return canonical(near);
  const bool away = near > x ? kMode == Rounding::down || (kMode == Rounding::zero && x > 0)
                             : kMode == Rounding::up || (kMode == Rounding::zero && x < 0);
  const float towards = near > x ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
  return away ? __builtin_nextafterf(near, towards) : near;
}

template <class To, Rounding kMode, class From>
inline To narrow(From from) {
  if constexpr (is_half<From>) {
    return narrow_double<To>(widen<double>(from), kMode);
  } else if constexpr (std::is_same_v<To, float>) {
    return narrow_to_float<kMode>(from);
  } else if constexpr (std::is_same_v<From, float> && kMode == Rounding::nearest) {
    if (from != from) return {kHalfNan};
    if constexpr (std::is_same_v<To, Half>) return nearest_half(from);
    const auto bits = of<uint32_t>(from);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return narrow_double<To>(from, kMode);
  }
}
template <class T, Rounding kMode>
inline Two<T> narrow_two(float high, float low) {
  return {narrow<T, kMode>(low), narrow<T, kMode>(high)};
}

// --- integers

template <Rounding kMode, class T>
inline T integral(T x) {
  if constexpr (is_half<T>) {
    return narrow_double<T>(integral<kMode>(widen<double>(x)), Rounding::nearest);
  } else {
    switch (kMode) {
      case Rounding::nearest:
        return canonical(T(__builtin_nearbyint(x)));
      case Rounding::zero:
        return canonical(T(__builtin_trunc(x)));
      case Rounding::down:
        return canonical(T(__builtin_floor(x)));
      default:
        return canonical(T(__builtin_ceil(x)));
    }
  }
}
template <class To, Rounding kMode, class From>
inline To to_integer(From from) {
  if constexpr (!std::is_same_v<From, double>) {
    if (const auto x = widen<double>(from); x == x || sizeof(To) == 8) return to_integer<To, kMode>(x);
    return 0;
  } else {
    if (from != from) return To(Unsigned<To>(1) << (kWidth<To> - 1));
    const double x = integral<kMode>(from);
    constexpr auto low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
    if (x <= double(low)) return low;
    if (x >= double(high)) return high;  // of 64 bits, this is rounded up: none is between them
    return To(x);
  }
}
template <class To, Rounding kMode, class From>
inline To of_integer(From from) {
  if constexpr (std::is_same_v<To, double>) {
    const auto exact = static_cast<long double>(from);  // has 64 bits of fraction
    const auto near = double(exact);
    if (kMode == Rounding::nearest || near == exact) return near;
    const bool away = near > exact ? kMode == Rounding::down || (kMode == Rounding::zero && exact > 0)
                                   : kMode == Rounding::up || (kMode == Rounding::zero && exact < 0);
    const double towards = near > exact ? -__builtin_inf() : __builtin_inf();
    return away ? __builtin_nextafter(near, towards) : near;
  } else if constexpr (std::is_same_v<To, float>) {
    return narrow_to_float<kMode>(from);
  } else {
    // Rounded to odd first, which a second rounding does not see.
    const double cut = of_integer<double, Rounding::zero>(from);
    const bool is_exact = static_cast<long double>(cut) == static_cast<long double>(from);
    return narrow_double<To>(is_exact ? cut : of<double>(of<uint64_t>(cut) | 1), kMode);
  }
}

// --- arithmetic of halves: exact as double, or rounded to odd, then once

inline double sum_to_odd(double a, double b) {
  const double sum = a + b;
  if (sum - sum != 0) return sum;
  const double of_b = sum - a;
  const double rest = (a - (sum - of_b)) + (b - of_b);
  auto bits = of<uint64_t>(sum);
  if (rest == 0 || bits & 1) return sum;
  const bool towards_zero = (rest < 0) == (sum > 0);
  bits += towards_zero ? -1 : 1;
  return of<double>(bits);
}
template <class T, IfHalf<T> = 0>
inline T fused(T a, T b, T c) {
  return narrow_double<T>(sum_to_odd(widen<double>(a) * widen<double>(b), widen<double>(c)), Rounding::nearest);
}
template <class T, IfHalf<T> = 0>
inline T add(T a, T b) {
  return narrow_double<T>(sum_to_odd(widen<double>(a), widen<double>(b)), Rounding::nearest);
}
template <class T, IfHalf<T> = 0>
inline T negative(T a) {
  return {uint16_t(a.bits ^ 0x8000)};
}
template <class T, IfHalf<T> = 0>
inline T sub(T a, T b) {
  return add(a, negative(b));
}
template <class T, IfHalf<T> = 0>
inline T mul(T a, T b) {
  return narrow_double<T>(widen<double>(a) * widen<double>(b), Rounding::nearest);
}
template <class T, IfHalf<T> = 0>
inline T absolute(T a) {
  return {uint16_t(a.bits & 0x7fff)};
}
template <class T, IfHalf<T> = 0>
inline T minimum(T a, T b) {
  return narrow<T, Rounding::nearest>(minimum(widen<float>(a), widen<float>(b)));
}
template <class T, IfHalf<T> = 0>
inline T maximum(T a, T b) {
  return narrow<T, Rounding::nearest>(maximum(widen<float>(a), widen<float>(b)));
}
template <class T, IfHalf<T> = 0>
inline T minimum_or_nan(T a, T b) {
  return narrow<T, Rounding::nearest>(minimum_or_nan(widen<float>(a), widen<float>(b)));
}
template <class T, IfHalf<T> = 0>
inline T maximum_or_nan(T a, T b) {
  return narrow<T, Rounding::nearest>(maximum_or_nan(widen<float>(a), widen<float>(b)));
}

#define SIMULATED_GPU_OF_TWO(function)          \
  template <class T>                            \
  inline Two<T> function(Two<T> a) {            \
    return {function(a.low), function(a.high)}; \
  }
#define SIMULATED_GPU_OF_TWO_AND_TWO(function)                 \
  template <class T>                                           \
  inline Two<T> function(Two<T> a, Two<T> b) {                 \
    return {function(a.low, b.low), function(a.high, b.high)}; \
  }
SIMULATED_GPU_OF_TWO(negative)
SIMULATED_GPU_OF_TWO(absolute)
SIMULATED_GPU_OF_TWO_AND_TWO(add)
SIMULATED_GPU_OF_TWO_AND_TWO(sub)
SIMULATED_GPU_OF_TWO_AND_TWO(mul)
SIMULATED_GPU_OF_TWO_AND_TWO(minimum)
SIMULATED_GPU_OF_TWO_AND_TWO(maximum)
SIMULATED_GPU_OF_TWO_AND_TWO(minimum_or_nan)
SIMULATED_GPU_OF_TWO_AND_TWO(maximum_or_nan)
#undef SIMULATED_GPU_OF_TWO
#undef SIMULATED_GPU_OF_TWO_AND_TWO
template <class T>
inline Two<T> fused(Two<T> a, Two<T> b, Two<T> c) {
  return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}

// --- comparisons

template <class T>
inline auto comparable(T a) {
  if constexpr (is_half<T>)
    return widen<float>(a);
  else
    return a;
}
template <class T>
inline bool any_nan(T a, T b) {
  const auto x = comparable(a), y = comparable(b);
  return x != x || y != y;
}
template <class T>
inline bool both_numbers(T a, T b) {
  return !any_nan(a, b);
}
#define SIMULATED_GPU_COMPARISON(name, sign) \
  template <class T>                         \
  inline bool name(T a, T b) {               \
    return comparable(a) sign comparable(b); \
  }                                          \
  template <class T>                         \
  inline bool name##_or_nan(T a, T b) {      \
    return name(a, b) || any_nan(a, b);      \
  }
SIMULATED_GPU_COMPARISON(equal, ==)
SIMULATED_GPU_COMPARISON(less, <)
SIMULATED_GPU_COMPARISON(at_most, <=)
SIMULATED_GPU_COMPARISON(greater, >)
SIMULATED_GPU_COMPARISON(at_least, >=)
#undef SIMULATED_GPU_COMPARISON
template <class T>
inline bool unequal(T a, T b) {  // of numbers
  return both_numbers(a, b) && comparable(a) != comparable(b);
}
template <class T>
inline bool unequal_or_nan(T a, T b) {
  return !equal(a, b);
}

}  // namespace simulated_gpu
