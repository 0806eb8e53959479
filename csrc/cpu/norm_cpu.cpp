// Sums of squared gradients, side by side for vectors. Called by walk.cpp.
#include "cpu/chunk.h"

#if defined(WD_FUSED_X86_TARGETS)
#include <immintrin.h>

#include <cstring>
#endif

namespace wd_fused {
namespace {

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
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += square(g[i + lane]);
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
    __m256d sums[kSumLanes / kWidth];
    std::memcpy(sums, lanes, sizeof(sums));
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
#pragma GCC unroll 8
      for (int64_t vector = 0; vector < kSumLanes / kWidth; ++vector) {
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

// Of a chunk that begins at a multiple of kSumLanes in its row.
template <class Isa>
WD_FUSED_INLINE void add_squares_of(const Chunk& chunk, double* lanes) {
  const void* gradient = chunk.gradient;
  const int64_t count = chunk.count;
  if (chunk.storage == Storage::float64) {
    const OptionScalars<double>& options = chunk.of_options->in_double;
    with_type_of(chunk.gradient_storage, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      add_squares<T, double>(gradient, count, options.inverse_scale, lanes);
    });
    return;
  }
  const OptionScalars<float>& options = chunk.of_options->in_float;
  if (chunk.rounds && chunk.storage == Storage::bfloat16)
    return add_squares<BFloat16, BFloat16>(gradient, count, options.inverse_scale, lanes);
  if (chunk.rounds && chunk.storage == Storage::float16)
    return add_squares<Float16, Float16>(gradient, count, options.inverse_scale, lanes);
  if (chunk.gradient_storage == Storage::float32) {
    const auto* values = static_cast<const float*>(gradient);
    const int64_t done = Isa::add_squares(values, count, options.inverse_scale, lanes);
    return add_squares<float, float>(values + done, count - done, options.inverse_scale, lanes);
  }
  with_type_of(chunk.gradient_storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_squares<T, float>(gradient, count, options.inverse_scale, lanes);
  });
}

void portable(const Chunk& chunk, double* lanes) { add_squares_of<Portable>(chunk, lanes); }
#if defined(WD_FUSED_X86_TARGETS)
__attribute__((target("avx2,fma"))) void avx2(const Chunk& chunk, double* lanes) { add_squares_of<Avx2>(chunk, lanes); }
#endif

}  // namespace

AddSquares square_sums() {
#if defined(WD_FUSED_X86_TARGETS)
  if (cpu_isa() == CpuIsa::avx2) return avx2;
#endif
  return portable;
}

}  // namespace wd_fused
