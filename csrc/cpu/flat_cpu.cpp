// The update as loops over memory, compiled for each vector instruction set and chosen at run time; every variant gives
// the same bits. Called by walk.cpp.
#include "cpu/flat_cpu.h"

#include "cpu/chunk.h"

namespace wd_fused {
namespace {

template <class T, Numerics kNumerics, bool kFused, Momentum kMomentum>
WD_FUSED_INLINE void update_flat(void* param, const void* gradient, void* momentum_buffer, int64_t count,
                                 const GroupScalars& group) {
  using Op = typename OpMath<T>::type;
  T* __restrict p = static_cast<T*>(param);
  const T* __restrict g = static_cast<const T*>(gradient);
  T* __restrict b = static_cast<T*>(momentum_buffer);
  const Scalars<Op> scalars = scalars_of(group, Op{});
  for (int64_t i = 0; i < count; ++i) {
    Op p_i = load(p[i]);
    Op b_i = kMomentum == Momentum::running ? load(b[i]) : Op{};
    sgd_update<T, kNumerics, kFused, kMomentum>(p_i, load(g[i]), b_i, scalars);
    if (kMomentum != Momentum::none) b[i] = pack<T>(b_i);
    p[i] = pack<T>(p_i);
  }
}

// Two tables of kernels for each instruction set, by numerics. The bodies are inlined into functions that carry the
// target, so that none of it leaks into code that runs before the choice.
using ByNumerics = std::array<FlatKernels, 2>;

#define WD_FUSED_KERNELS(NAME, FUSED, TARGET)                                                                     \
  namespace NAME {                                                                                                \
  template <class T, Numerics kNumerics, Momentum kMomentum>                                                      \
  TARGET void kernel(void* p, const void* g, void* b, int64_t count, const GroupScalars& group) {                 \
    update_flat<T, kNumerics, FUSED, kMomentum>(p, g, b, count, group);                                           \
  }                                                                                                               \
  template <class T, Numerics kNumerics>                                                                          \
  constexpr std::array<UpdateFlat, 3> by_momentum() {                                                             \
    return {kernel<T, kNumerics, Momentum::none>, kernel<T, kNumerics, Momentum::first>,                          \
            kernel<T, kNumerics, Momentum::running>};                                                             \
  }                                                                                                               \
  template <Numerics kNumerics>                                                                                   \
  constexpr FlatKernels by_storage() {                                                                            \
    return {by_momentum<float, kNumerics>(), by_momentum<double, kNumerics>(), by_momentum<Float16, kNumerics>(), \
            by_momentum<BFloat16, kNumerics>()};                                                                  \
  }                                                                                                               \
  constexpr ByNumerics table = {by_storage<Numerics::torch>(), by_storage<Numerics::opmath>()};                   \
  }

// No AVX-512: a step waits for memory, and on a Zen 4 core its wider accesses stream 30 M float32 elements 6 % slower
// than AVX2's, and are equal within the caches.
#if defined(WD_FUSED_X86_TARGETS)
WD_FUSED_KERNELS(avx2, true, __attribute__((target("avx2,fma"))))
#endif
WD_FUSED_KERNELS(baseline, true, )
WD_FUSED_KERNELS(separate, false, )
#undef WD_FUSED_KERNELS

#if defined(WD_FUSED_HALF_LANES)
ByNumerics with_half_lanes() {
  ByNumerics result = avx2::table;
  for (const Numerics numerics : {Numerics::torch, Numerics::opmath})
    for (const Storage storage : {Storage::float16, Storage::bfloat16})
      for (const Momentum momentum : {Momentum::none, Momentum::first, Momentum::running})
        result[static_cast<size_t>(numerics)][static_cast<size_t>(storage)][static_cast<size_t>(momentum)] =
            half_update(storage, numerics, momentum);
  return result;
}
#elif defined(WD_FUSED_X86_TARGETS)
const ByNumerics& with_half_lanes() { return avx2::table; }
#endif

const ByNumerics& tables(bool fused_multiply_add) {
  if (!fused_multiply_add) return separate::table;
#if defined(WD_FUSED_X86_TARGETS)
  static const ByNumerics best = with_half_lanes();
  if (cpu_isa() == CpuIsa::avx2) return best;
#endif
  return baseline::table;
}

}  // namespace

const FlatKernels& flat_kernels(Numerics numerics, bool fused_multiply_add) {
  return tables(fused_multiply_add)[static_cast<size_t>(numerics)];
}

}  // namespace wd_fused
