// The options of a step: what an optimizer does beyond SGD while an element is in registers anyway. Which option does
// what to one element, and how weights and momenta are stored that are not plain numbers. For host and device; knows
// nothing of torch. The update itself is in sgd_update.h. Used by options_cpu.cpp and options_cuda.cuh.
#pragma once

#include <vector>

#include "update/sgd_update.h"

namespace wd_fused {

// Where the weight that is stepped lies: in the parameter; in a float32 master of its own (full); in the parameter's
// bits and so many more (split: 16, split24: 8); in the parameter and what its last rounding took away (kahan).
enum class Weights : int8_t { parameter, full, split, split24, kahan };
inline constexpr const char* kWeightsNames[] = {"parameter", "full", "split", "split24", "kahan"};

// Elements of an int8 momentum buffer that share a scale.
inline constexpr int64_t kMomentumBlock = 128;

// What the options make of a row. Addresses are of the first element.
struct RowOptions {
  bool is_used = false;  // the row has options
  bool stochastic = false;
  bool averages = false;
  bool clips = false;   // the gradient counts in a norm
  bool zeroes = false;  // the gradient, in the end
  bool rounds = false;  // every intermediate to the parameter's storage, 16 bits, if the gradient is of that, too
  Weights weights = Weights::parameter;
  Storage gradient = Storage::float32;  // the last one's, for a kernel that is compiled for it
  Storage momentum = Storage::float32;
  Storage average_storage = Storage::float32;
  int32_t position = 0;     // in its group
  int64_t first_index = 0;  // the first element's place in the whole parameter, of which the row is a shard
  void* extra = nullptr;    // master weights (float32), remainders (int16, int8) or compensations (as the parameter)
  float* momentum_scale = nullptr;  // one a block
  void* average = nullptr;
};
WD_FUSED_INLINE constexpr int64_t bytes_of_extra(Weights weights, Storage storage) {
  switch (weights) {
    case Weights::full:
      return 4;
    case Weights::split:
      return 2;
    case Weights::split24:
      return 1;
    case Weights::kahan:
      return bytes_of(storage);
    default:
      return 0;
  }
}

// A group's numbers of a step, in opmath.
template <class Op>
struct OptionScalars {
  static constexpr bool kIsUsed = true;
  static constexpr bool kScales = true;  // gradients, by inverse_scale and clip
  static constexpr bool kHasPenalties = true;
  using Answer = typename Flag<Op>::type;
  Op inverse_scale;  // of torch.amp.GradScaler's scale; 1: there is none
  Op clip;           // the coefficient of the norm; 1: there is none
  Op l1;
  Op keep;            // what decoupled weight decay multiplies a weight with
  Op average_weight;  // of the new weight in the average
  Answer penalizes;
  Answer shrinks;
};
// The same for a group of which nothing penalizes or shrinks.
template <class Op>
struct ScalarsWithoutPenalties : OptionScalars<Op> {
  static constexpr bool kHasPenalties = false;
};
struct GroupOptions {
  OptionScalars<float> in_float;
  OptionScalars<double> in_double;
  uint32_t random_key[2];
};

// The same as wd_fused/options/spec.py gives them, in double: GroupStep there.
struct GroupStep {
  double max_norm = std::numeric_limits<double>::quiet_NaN();  // which is: the group does not clip
  double l1 = 0;
  double decoupled = 0;  // c in p * (1 - lr * c); 0: none
  bool l2 = true;        // false: weight_decay makes no term of the gradient
  double average_weight = 0;
  uint64_t random_key = 0;
  bool average_varies = false;  // average_weight will be another one in a later step
  bool clips() const { return max_norm == max_norm; }
};
// How a step clips.
struct Norm {
  bool is_used = false;  // some group clips
  bool per_group = false;
  bool error_if_nonfinite = false;
  bool in_double = false;            // norm and coefficients; else in float
  std::vector<double> coefficients;  // one a group, if the caller knows them; else the step forms them
};

// What gradients of a norm above max_norm are multiplied with, as torch.nn.utils.clip_grad_norm_ has it; NaN stays.
template <class N>
WD_FUSED_INLINE N clip_coefficient(N norm, N max_norm) {
  const N coefficient = multiply(reciprocal(norm + N(1e-6)), max_norm);
  return coefficient > 1 ? N{1} : coefficient;
}

// --- the average

// e + weight * (x - e), as torch's lerp has it; 1: x.
template <bool kFused, class Op>
WD_FUSED_INLINE Op averaged(Op e, Op x, Op weight) {
  const Op difference = x - e;
  const bool is_small = weight < Op{0.5};
  const Op mixed = multiply_add<kFused>(is_small ? weight : weight - 1, difference, is_small ? e : x);
  return weight == 1 ? x : mixed;
}

// --- weights that are not the parameter alone. w: in float; stored: the parameter's storage type.

// The master weight, unless somebody has written the parameter since: then that is the weight.
template <class T>
WD_FUSED_INLINE float load_full(T p, float master) {
  const float shown = load(p);
  return bits_as<uint32_t>(rounded<T>(master)) == bits_as<uint32_t>(shown) ? master : shown;
}

// A float32 number is the bfloat16 nearest to it, ties away from zero, and a signed remainder in units of its last
// place. A zero has no negative remainder: somebody has written the parameter since.
WD_FUSED_INLINE float load_split(BFloat16 p, int16_t remainder) {
  const bool is_new = (p.bits & 0x7fffu) == 0 && remainder < 0;
  return bits_as<float>((uint32_t{p.bits} << 16) + (is_new ? 0u : static_cast<uint32_t>(int32_t{remainder})));
}
WD_FUSED_INLINE float load_split24(BFloat16 p, int8_t remainder) {
  const bool is_new = (p.bits & 0x7fffu) == 0 && remainder < 0;
  return bits_as<float>((uint32_t{p.bits} << 16) + (is_new ? 0u : static_cast<uint32_t>(int32_t{remainder}) << 8));
}
WD_FUSED_INLINE bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
// w as split24 keeps it: to nearest, ties to even.
WD_FUSED_INLINE float to_24_bits(float w) {
  const uint32_t bits = bits_as<uint32_t>(w);
  const uint32_t nearest = (bits + 0x7fu + ((bits >> 8) & 1u)) & 0xffffff00u;
  return bits_as<float>(is_nan(bits) ? 0x7fc00000u : nearest);
}
// The bits of w, as they are split into a parameter and a remainder, the low half.
WD_FUSED_INLINE uint32_t bits_to_split(float w) {
  const uint32_t bits = bits_as<uint32_t>(w);
  return is_nan(bits) ? 0x7fc00000u : bits;
}
WD_FUSED_INLINE uint32_t parameter_of(uint32_t bits) { return (bits + 0x8000u) >> 16; }
struct Split {
  BFloat16 p;
  uint16_t remainder;
};
WD_FUSED_INLINE Split split(float w) {
  const uint32_t bits = bits_to_split(w);
  return {{static_cast<uint16_t>(parameter_of(bits))}, static_cast<uint16_t>(bits)};
}

// What rounding w to p took away, for the next step; nothing where that is no number.
template <class T>
WD_FUSED_INLINE float lost(float w, float p) {
  const float difference = w - p;
  return (bits_as<uint32_t>(difference) & 0x7f800000u) == 0x7f800000u ? 0.0f : difference;
}

// --- stochastic rounding. Random bits of an element are a function of seed, step, group (the key), the row's place in
// the group and the element's place in the whole parameter, and of nothing else.

// Chris Wellons' lowbias32, a bijection of 32 bits.
WD_FUSED_INLINE uint32_t mixed_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
struct RowKey {
  uint32_t first;
  uint32_t second;
};
WD_FUSED_INLINE RowKey row_key(const uint32_t (&key)[2], int32_t position) {
  const auto place = static_cast<uint32_t>(position);
  return {mixed_bits(key[0] + place * 0x9e3779b9u), mixed_bits(key[1] ^ (place * 0x85ebca6bu))};
}
// The same rounds with the second half of the key between them.
WD_FUSED_INLINE uint32_t random_bits(RowKey key, uint64_t index) {
  uint32_t x = static_cast<uint32_t>(index) + key.first + static_cast<uint32_t>(index >> 32) * 0x9e3779b9u;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
// w up or down to a bfloat16, up as likely as it is near.
WD_FUSED_INLINE float stochastically_rounded(float w, uint32_t random) {
  const uint32_t bits = bits_as<uint32_t>(w);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
#if defined(__CUDA_ARCH__)  // to nearest is one instruction there
  const float nearest = rounded<BFloat16>(w);
  return is_finite ? bits_as<float>((bits + (random >> 16)) & 0xffff0000u) : nearest;
#else
  const uint32_t some = (bits + (is_finite ? random >> 16 : 0u)) & 0xffff0000u;
  return is_nan(bits) ? rounded<BFloat16>(w) : bits_as<float>(some);
#endif
}

// --- int8 momentum: b = scale * q * |q|, so that small values next to a large one keep some digits

WD_FUSED_INLINE float load_int8(int8_t q, float scale) {
  const auto value = static_cast<float>(q);
  return multiply(scale, multiply(value, value < 0 ? -value : value));
}
// The bits of |b|: as unsigned numbers they are ordered as the floats are, NaN above all.
WD_FUSED_INLINE uint32_t magnitude_bits(float b) { return bits_as<uint32_t>(b) & 0x7fffffffu; }
WD_FUSED_INLINE float divided(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
WD_FUSED_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
WD_FUSED_INLINE float int8_scale(uint32_t largest_magnitude_bits) {
  return divided(bits_as<float>(largest_magnitude_bits), 127.0f * 127.0f);
}
WD_FUSED_INLINE float to_int8(float b, float scale) {
  constexpr float kToInteger = 12582912.0f;                                    // 1.5 * 2^23, whose last place is 1
  const bool is_usable = scale > 0 && bits_as<uint32_t>(scale) < 0x7f800000u;  // finite
  const float root = square_root(divided(bits_as<float>(magnitude_bits(b)), scale));
  float q = (root + kToInteger) - kToInteger;
  q = q < 127.0f ? q : 127.0f;
  q = b < 0 ? -q : q;
  return is_usable ? q : 0.0f;
}

}  // namespace wd_fused
