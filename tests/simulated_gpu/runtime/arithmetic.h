// What PTX's instructions compute, as functions of typed values. Included by translated kernels; translator/opcodes.py
// says which opcode is which function. Where the manual leaves a result open, it says here what it is.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace simulated_gpu {

template <class T, class Bits>
inline T of(Bits bits) {
  static_assert(sizeof(T) == sizeof(Bits));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = uint8_t;
};
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};
template <class T>
inline auto bits_of(T value) {
  return of<typename BitsOf<sizeof(T)>::type>(value);
}

template <class T>
using IfInteger = std::enable_if_t<std::is_integral_v<T>, int>;
template <class T>
using IfFloat = std::enable_if_t<std::is_floating_point_v<T>, int>;
template <class T>
inline constexpr unsigned kWidth = 8 * sizeof(T);

// --- integers

template <class T>
struct Twice;
template <>
struct Twice<uint16_t> {
  using type = uint32_t;
};
template <>
struct Twice<int16_t> {
  using type = int32_t;
};
template <>
struct Twice<uint32_t> {
  using type = uint64_t;
};
template <>
struct Twice<int32_t> {
  using type = int64_t;
};
template <>
struct Twice<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Twice<int64_t> {
  using type = __int128;
};
template <class T>
using Wide = typename Twice<T>::type;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T, IfInteger<T> = 0>
inline T add(T a, T b) {
  return T(Unsigned<T>(a) + Unsigned<T>(b));
}
template <class T, IfInteger<T> = 0>
inline T sub(T a, T b) {
  return T(Unsigned<T>(a) - Unsigned<T>(b));
}
template <class T>
inline Wide<T> mul_wide(T a, T b) {
  return Wide<T>(a) * Wide<T>(b);
}
template <class T, IfInteger<T> = 0>
inline T mul(T a, T b) {
  return T(mul_wide(a, b));
}
template <class T>
inline T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> kWidth<T>);
}
template <class T>
inline T mad(T a, T b, T c) {
  return add(mul(a, b), c);
}
template <class T>
inline T mad_hi(T a, T b, T c) {
  return add(mul_hi(a, b), c);
}
template <class T>
inline Wide<T> mad_wide(T a, T b, Wide<T> c) {
  return add(mul_wide(a, b), c);
}
// By 0: the manual leaves it open; all ones, and the dividend as remainder.
template <class T, IfInteger<T> = 0>
inline T divide(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return sub(T(0), a);
  return T(a / b);
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T, IfInteger<T> = 0>
inline T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T, IfInteger<T> = 0>
inline T maximum(T a, T b) {
  return a > b ? a : b;
}
template <class T, IfInteger<T> = 0>
inline T negative(T a) {
  return sub(T(0), a);
}
template <class T, IfInteger<T> = 0>
inline T absolute(T a) {
  return a < 0 ? negative(a) : a;
}
template <class T>
inline T bit_and(T a, T b) {
  return T(a & b);
}
template <class T>
inline T bit_or(T a, T b) {
  return T(a | b);
}
template <class T>
inline T bit_xor(T a, T b) {
  return T(a ^ b);
}
template <class T>
inline T bit_not(T a) {
  return std::is_same_v<T, bool> ? T(a == 0) : T(~a);
}
template <class T>
inline T is_zero(T a) {
  return a == 0;
}
template <class T>
inline T shift_left(T a, uint32_t by) {
  return by < kWidth<T> ? T(a << by) : T(0);
}
template <class T>
inline T shift_right(T a, uint32_t by) {
  if (by < kWidth<T>) return T(a >> by);
  return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
}
template <class T>
inline uint32_t population(T a) {
  return uint32_t(__builtin_popcountll(a));
}
template <class T>
inline uint32_t leading_zeros(T a) {
  return a == 0 ? kWidth<T> : uint32_t(__builtin_clzll(a)) - (64 - kWidth<T>);
}
template <class T>
inline T reversed(T a) {
  T result = 0;
  for (unsigned i = 0; i < kWidth<T>; ++i) result |= T((a >> i & 1) << (kWidth<T> - 1 - i));
  return result;
}
// Of a negative number the highest 0; none: all ones.
template <class T>
inline uint32_t highest(T a) {
  const auto bits = Unsigned<T>(a < 0 ? ~a : a);
  return bits == 0 ? ~0u : kWidth<T> - 1 - leading_zeros(bits);
}
// How far it is to the left, so that it becomes the highest of all.
template <class T>
inline uint32_t above_highest(T a) {
  return highest(a) == ~0u ? ~0u : kWidth<T> - 1 - highest(a);
}
template <class T>
inline T extract(T a, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const T shifted = shift_right(a, position);
  if (position >= kWidth<T> || length >= kWidth<T> - position) return shifted;
  const unsigned rest = kWidth<T> - length;
  return T(T(Unsigned<T>(shifted) << rest) >> rest);
}
template <class T>
inline T insert(T a, T b, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  const T ones = length >= kWidth<T> ? T(~T(0)) : T((T(1) << length) - 1);
  const T mask = shift_left(ones, position);
  return T((b & ~mask) | (shift_left(a, position) & mask));
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i);
    auto byte = uint8_t(bytes >> (8 * (which & 7)));
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}
inline uint32_t table_of_three(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline uint32_t funnel_left_clamped(uint32_t low, uint32_t high, uint32_t by) {
  return by >= 32 ? low : uint32_t((uint64_t(high) << 32 | low) >> (32 - by));
}
inline uint32_t funnel_right_clamped(uint32_t low, uint32_t high, uint32_t by) {
  return by >= 32 ? high : uint32_t((uint64_t(high) << 32 | low) >> by);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  return funnel_left_clamped(low, high, by & 31);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return funnel_right_clamped(low, high, by & 31);
}
template <class T>
inline T select(T a, T b, bool first) {
  return first ? a : b;
}
template <class T>
inline T select_by_sign(T a, T b, int32_t sign) {
  return sign >= 0 ? a : b;
}
template <class To, class From>
inline To saturated(From a) {
  const auto wide = __int128(a);
  constexpr auto low = __int128(std::numeric_limits<To>::min()), high = __int128(std::numeric_limits<To>::max());
  return To(wide < low ? low : wide > high ? high : wide);
}

// --- float and double

// Of float the manual says no payload of a NaN; GPUs give this one.
inline float canonical(float x) { return __builtin_expect(x != x, 0) ? of<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x; }

template <class T, IfFloat<T> = 0>
inline T add(T a, T b) {
  return canonical(a + b);
}
template <class T, IfFloat<T> = 0>
inline T sub(T a, T b) {
  return canonical(a - b);
}
template <class T, IfFloat<T> = 0>
inline T mul(T a, T b) {
  return canonical(a * b);
}
inline float fused(float a, float b, float c) { return canonical(__builtin_fmaf(a, b, c)); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class T, IfFloat<T> = 0>
inline T divide(T a, T b) {
  return canonical(a / b);
}
template <class T>
inline T reciprocal(T a) {
  return canonical(T(1) / a);
}
inline float square_root(float a) { return canonical(__builtin_sqrtf(a)); }
inline double square_root(double a) { return __builtin_sqrt(a); }
template <class T, IfFloat<T> = 0>
inline T negative(T a) {
  return of<T>(bits_of(a) ^ bits_of(T(-0.0)));
}
template <class T, IfFloat<T> = 0>
inline T absolute(T a) {
  return of<T>(bits_of(a) & ~bits_of(T(-0.0)));
}
template <class T>
inline T copy_sign(T from, T to) {
  return of<T>((bits_of(to) & ~bits_of(T(-0.0))) | (bits_of(from) & bits_of(T(-0.0))));
}
// A number rather than a NaN; -0 is less than 0.
template <class T, IfFloat<T> = 0>
inline T minimum(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T, IfFloat<T> = 0>
inline T maximum(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a > b ? a : b;
}
inline float minimum_or_nan(float a, float b) { return a != a || b != b ? of<float>(0x7fffffffu) : minimum(a, b); }
inline float maximum_or_nan(float a, float b) { return a != a || b != b ? of<float>(0x7fffffffu) : maximum(a, b); }
template <class T>
inline bool is_nan(T a) {
  return a != a;
}
template <class T>
inline bool is_number(T a) {
  return a == a;
}
template <class T>
inline bool is_finite(T a) {
  return a - a == 0;
}
template <class T>
inline bool is_infinite(T a) {
  return a == a && !is_finite(a);
}
template <class T>
inline T saturated_to_one(T a) {
  return a > 0 ? (a < 1 ? a : T(1)) : T(0);
}

// The approximations: the exact value rounded once to double, then to float, of which those of a GPU are 1 or 2 units
// off. Nothing that must have certain bits may depend on them.
inline float flushed(float a) { return __builtin_fabsf(a) < 0x1p-126f ? copy_sign(a, 0.0f) : a; }
inline float exp2_of(float a) { return canonical(float(__builtin_exp2(double(a)))); }
inline float log2_of(float a) { return canonical(float(__builtin_log2(double(a)))); }
inline float sine(float a) { return canonical(float(__builtin_sin(double(a)))); }
inline float cosine(float a) { return canonical(float(__builtin_cos(double(a)))); }
inline float tangent(float a) { return canonical(float(__builtin_tanh(double(a)))); }
inline float reciprocal_root(float a) { return canonical(float(1 / __builtin_sqrt(double(a)))); }
inline double reciprocal_root(double a) { return 1 / __builtin_sqrt(a); }
inline float flushed_exp2(float a) { return flushed(exp2_of(flushed(a))); }
inline float flushed_log2(float a) { return flushed(log2_of(flushed(a))); }
inline float flushed_reciprocal(float a) { return flushed(reciprocal(flushed(a))); }
inline float flushed_root(float a) { return flushed(square_root(flushed(a))); }
inline float flushed_reciprocal_root(float a) { return flushed(reciprocal_root(flushed(a))); }

}  // namespace simulated_gpu
