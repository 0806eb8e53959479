// The update of float16 and bfloat16 tensors, eight elements at once. Called by sgd_cpu.cpp.
#pragma once

#include "update/sgd_update.h"

// The pragma that half_cpu.cpp compiles by is GCC's.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WD_FUSED_HALF_LANES 1
#endif

namespace wd_fused {

// Steps `count` elements that lie one behind the other. `momentum_buffer` is null without momentum.
using UpdateFlat = void (*)(void* param, const void* gradient, void* momentum_buffer, int64_t count,
                            const GroupScalars& group);

#if defined(WD_FUSED_HALF_LANES)
// For processors with AVX2, FMA and F16C; with fused multiply-add. Storage is float16 or bfloat16.
UpdateFlat half_update(Storage storage, Numerics numerics, Momentum momentum);
#endif

}  // namespace wd_fused
