// The update as loops over memory, compiled for each vector instruction set and chosen at run time; every variant gives
// the same bits. Called by step_plan.cpp.
#include "cpu/sgd_cpu.h"

#include <algorithm>
#include <array>

#include "cpu/half_cpu.h"
#include "cpu/options_cpu.h"
#include "cpu/strided_cpu.h"

namespace wd_fused {
namespace {

const Scalars<float>& scalars_of(const GroupScalars& group, float) { return group.in_float; }
const Scalars<double>& scalars_of(const GroupScalars& group, double) { return group.in_double; }

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

// One table of kernels for each instruction set: [storage][numerics][momentum]. The bodies are inlined into functions
// that carry the target, so that none of it leaks into code that runs before the choice.
using KernelTable = std::array<std::array<std::array<UpdateFlat, 3>, 2>, kStorages>;

#define WD_FUSED_KERNELS(NAME, FUSED, TARGET)                                                         \
  namespace NAME {                                                                                    \
  template <class T, Numerics kNumerics, Momentum kMomentum>                                          \
  TARGET void kernel(void* p, const void* g, void* b, int64_t count, const GroupScalars& group) {     \
    update_flat<T, kNumerics, FUSED, kMomentum>(p, g, b, count, group);                               \
  }                                                                                                   \
  template <class T, Numerics kNumerics>                                                              \
  constexpr std::array<UpdateFlat, 3> by_momentum() {                                                 \
    return {kernel<T, kNumerics, Momentum::none>, kernel<T, kNumerics, Momentum::first>,              \
            kernel<T, kNumerics, Momentum::running>};                                                 \
  }                                                                                                   \
  template <class T>                                                                                  \
  constexpr std::array<std::array<UpdateFlat, 3>, 2> by_numerics() {                                  \
    return {by_momentum<T, Numerics::torch>(), by_momentum<T, Numerics::opmath>()};                   \
  }                                                                                                   \
  constexpr KernelTable table = {by_numerics<float>(), by_numerics<double>(), by_numerics<Float16>(), \
                                 by_numerics<BFloat16>()};                                            \
  }

// No AVX-512: a step waits for memory, and on a Zen 4 core its wider accesses stream 30 M float32 elements 6 % slower
// than AVX2's, and are equal within the caches.
#if defined(__x86_64__) && defined(__GNUC__)
#define WD_FUSED_X86_TARGETS 1
WD_FUSED_KERNELS(avx2, true, __attribute__((target("avx2,fma"))))
#endif
WD_FUSED_KERNELS(baseline, true, )
WD_FUSED_KERNELS(separate, false, )
#undef WD_FUSED_KERNELS

CpuIsa isa_in_use = best_cpu_isa();

const KernelTable& kernels(bool fused_multiply_add) {
  if (!fused_multiply_add) return separate::table;
#if defined(WD_FUSED_X86_TARGETS)
  if (isa_in_use == CpuIsa::avx2) return avx2::table;
#endif
  return baseline::table;
}

UpdateFlat kernel_for(const CpuStep& step, Storage storage, Momentum momentum) {
#if defined(WD_FUSED_HALF_LANES)
  const bool is_half = storage == Storage::float16 || storage == Storage::bfloat16;
  if (is_half && step.fused_multiply_add && isa_in_use == CpuIsa::avx2)
    return half_update(storage, step.numerics, momentum);
#endif
  return kernels(step.fused_multiply_add)[static_cast<size_t>(storage)][static_cast<size_t>(step.numerics)]
                                         [static_cast<size_t>(momentum)];
}

// Strided operands are stepped through small flat copies, so that there is one arithmetic. Word is an unsigned integer
// of the storage's size.
template <class Word>
void update_strided(UpdateFlat update, const Row& row, const RowInput& input, const GroupScalars& group, int64_t begin,
                    int64_t count) {
  constexpr int64_t kChunk = 256;
  alignas(64) Word p[kChunk], g[kChunk], b[kChunk];
  const StridedLayout& layout = *input.layout;
  const bool reads_buffer = input.momentum == Momentum::running;
  const bool writes_buffer = input.momentum != Momentum::none;
  auto* params = static_cast<Word*>(row.param);
  auto* buffers = static_cast<Word*>(row.momentum_buffer);
  const auto* gradients = static_cast<const Word*>(input.gradient);

  using Layout = StridedLayout;
  Position reading(layout, begin), writing(layout, begin);
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t chunk = std::min(kChunk, count - done);
    for_runs(reading, chunk, [&](const Position& at, int64_t place, int64_t length) {
      gather(p + place, params + at.offset(Layout::param), layout.strides[Layout::param].back(), length);
      gather(g + place, gradients + at.offset(Layout::gradient), layout.strides[Layout::gradient].back(), length);
      if (reads_buffer)
        gather(b + place, buffers + at.offset(Layout::momentum_buffer), layout.strides[Layout::momentum_buffer].back(),
               length);
    });
    update(p, g, b, chunk, group);
    for_runs(writing, chunk, [&](const Position& at, int64_t place, int64_t length) {
      scatter(params + at.offset(Layout::param), p + place, layout.strides[Layout::param].back(), length);
      if (writes_buffer)
        scatter(buffers + at.offset(Layout::momentum_buffer), b + place, layout.strides[Layout::momentum_buffer].back(),
                length);
    });
  }
}

void update_piece(const CpuStep& step, int32_t row_index, int64_t begin, int64_t count) {
  if (!step.tails.empty() && step.tails[static_cast<size_t>(row_index)].is_used)
    return tail_cpu_piece(step, row_index, begin, count);
  const Row& row = step.table.rows()[static_cast<size_t>(row_index)];
  const RowInput& input = step.inputs[static_cast<size_t>(row_index)];
  if (input.gradient == nullptr) return;
  const UpdateFlat update = kernel_for(step, row.storage, input.momentum);
  const GroupScalars& group = step.groups[static_cast<size_t>(row.group)];
  if (input.layout == nullptr) {
    const int64_t offset = begin * bytes_of(row.storage);
    update(static_cast<char*>(row.param) + offset, static_cast<const char*>(input.gradient) + offset,
           input.momentum == Momentum::none ? nullptr : static_cast<char*>(row.momentum_buffer) + offset, count, group);
  } else if (row.storage == Storage::float64) {
    update_strided<uint64_t>(update, row, input, group, begin, count);
  } else if (row.storage == Storage::float32) {
    update_strided<uint32_t>(update, row, input, group, begin, count);
  } else {
    update_strided<uint16_t>(update, row, input, group, begin, count);
  }
}

}  // namespace

namespace {

// Small tensors lie anywhere: the processor cannot foresee where the next one is, but the table tells.
constexpr int64_t kTilesAhead = 8;
constexpr int64_t kLine = 64;
constexpr int64_t kBytesAhead = 4 * kLine;

void fetch(const CpuStep& step, const Tile& tile) {
  const Row& row = step.table.rows()[static_cast<size_t>(tile.row)];
  const RowInput& input = step.inputs[static_cast<size_t>(tile.row)];
  const int64_t bytes = std::min(kBytesAhead, tile.count * bytes_of(row.storage));
  for (int64_t at = tile.begin * bytes_of(row.storage), end = at + bytes; at < end; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(input.gradient) + at);
    __builtin_prefetch(static_cast<const char*>(row.param) + at, 1);
    __builtin_prefetch(static_cast<const char*>(row.momentum_buffer) + at, 1);
  }
}

}  // namespace

void sgd_cpu_tiles(const CpuStep& step, int64_t first_tile, int64_t last_tile) {
  const int64_t count = last_tile - first_tile, direction = step.backwards ? -1 : 1;
  const Tile* tiles = step.table.tiles().data() + (step.backwards ? last_tile - 1 : first_tile);
  for (int64_t t = 0; t < count; ++t) {
    if (t + kTilesAhead < count) fetch(step, tiles[(t + kTilesAhead) * direction]);
    const Tile& tile = tiles[t * direction];
    update_piece(step, tile.row, tile.begin, tile.count);
  }
}

void sgd_cpu_row(const CpuStep& step, int32_t row) {
  update_piece(step, row, 0, step.table.rows()[static_cast<size_t>(row)].numel);
}

void square_cpu_tiles(const CpuStep& step, int64_t first_tile, int64_t last_tile, double* sums) {
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const Tile& tile = step.table.tiles()[static_cast<size_t>(t)];
    sums[t] = squares_of_piece(step, tile.row, tile.begin, tile.count);
  }
}

double square_cpu_row(const CpuStep& step, int32_t row) {
  return squares_of_piece(step, row, 0, step.table.rows()[static_cast<size_t>(row)].numel);
}

CpuIsa best_cpu_isa() {
#if defined(WD_FUSED_X86_TARGETS)
  __builtin_cpu_init();
  const bool has_all =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has_all ? CpuIsa::avx2 : CpuIsa::baseline;
#else
  return CpuIsa::baseline;
#endif
}

CpuIsa cpu_isa() { return isa_in_use; }
void use_cpu_isa(CpuIsa isa) { isa_in_use = isa; }

}  // namespace wd_fused
