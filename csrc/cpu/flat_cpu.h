// The update of rows without options as loops over flat memory. Called by walk.cpp.
#pragma once

#include <array>

#include "cpu/walk.h"

// The pragma that half_cpu.cpp compiles by is GCC's.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WD_FUSED_HALF_LANES 1
#endif

namespace wd_fused {

// Steps `count` elements that lie one behind the other. `momentum_buffer` is null without momentum.
using UpdateFlat = void (*)(void* param, const void* gradient, void* momentum_buffer, int64_t count,
                            const GroupScalars& group);

// By storage and momentum, for the multiply-add that torch follows and this processor.
using FlatKernels = std::array<std::array<UpdateFlat, 3>, kStorages>;
const FlatKernels& flat_kernels(Numerics numerics, bool fused_multiply_add);
#if defined(WD_FUSED_HALF_LANES)
// Of float16 and bfloat16, sixteen elements at once (half_cpu.cpp). For processors with AVX2, FMA and F16C; with fused
// multiply-add. Storage is float16 or bfloat16.
UpdateFlat half_update(Storage storage, Numerics numerics, Momentum momentum);
#endif

}  // namespace wd_fused
