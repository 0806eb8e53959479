// Walks the tiles of a table on the CPU: which loop a piece of a row gets, and where its operands lie. Called by
// step_plan.cpp.
#include "cpu/walk.h"

#include <algorithm>

#include "cpu/chunk.h"
#include "cpu/flat_cpu.h"
#include "cpu/strided_cpu.h"

namespace wd_fused {
namespace {

CpuIsa isa_in_use = best_cpu_isa();

// --- pieces

void move_by(void*& address, int64_t bytes) {
  if (address != nullptr) address = static_cast<char*>(address) + bytes;
}
// Flat operands, some elements further on.
void advance(Chunk& chunk, int64_t elements) {
  move_by(chunk.param, elements * bytes_of(chunk.storage));
  move_by(chunk.gradient, elements * bytes_of(chunk.gradient_storage));
  move_by(chunk.momentum_buffer, elements * bytes_of(chunk.options->momentum));
  move_by(chunk.extra, elements * bytes_of_extra(chunk.options->weights, chunk.storage));
  move_by(chunk.average, elements * bytes_of(chunk.options->average_storage));
  if (chunk.momentum_scale != nullptr) chunk.momentum_scale += elements / kMomentumBlock;
  chunk.index += static_cast<uint64_t>(elements);
}

// Of a row without options.
RowOptions no_options(Storage storage) {
  RowOptions none;
  none.momentum = storage;
  return none;
}
bool has_options_of(const CpuStep& step, int32_t row) {
  return !step.row_options.empty() && step.row_options[static_cast<size_t>(row)].is_used;
}

const RowOptions kNoOptions[kStorages] = {no_options(Storage::float32), no_options(Storage::float64),
                                          no_options(Storage::float16), no_options(Storage::bfloat16)};

// All of a row; of a flat one from `begin` on.
Chunk chunk_of(const CpuStep& step, int32_t row_index, int64_t begin, int64_t count) {
  const Row& row = step.table.rows()[static_cast<size_t>(row_index)];
  const RowInput& input = step.inputs[static_cast<size_t>(row_index)];
  const bool has_options = has_options_of(step, row_index);
  const RowOptions& options =
      has_options ? step.row_options[static_cast<size_t>(row_index)] : kNoOptions[static_cast<size_t>(row.storage)];
  Chunk chunk;
  chunk.param = row.param;
  chunk.gradient = const_cast<void*>(input.gradient);
  chunk.momentum_buffer = input.momentum == Momentum::none ? nullptr : row.momentum_buffer;
  chunk.extra = options.extra;
  chunk.average = options.average;
  chunk.momentum_scale = options.momentum_scale;
  chunk.count = count;
  chunk.index = static_cast<uint64_t>(options.first_index);
  chunk.places = nullptr;
  chunk.storage = row.storage;
  chunk.gradient_storage = has_options ? input.gradient_storage : row.storage;
  chunk.momentum = input.momentum;
  chunk.rounds = options.rounds && step.numerics == Numerics::torch && chunk.gradient_storage == row.storage;
  chunk.options = &options;
  chunk.group = &step.groups[static_cast<size_t>(row.group)];
  chunk.of_options = has_options ? &step.of_options[static_cast<size_t>(row.group)] : nullptr;
  if (begin != 0 && input.layout == nullptr) advance(chunk, begin);
  return chunk;
}

void*& operand_of(Chunk& chunk, int operand) {
  switch (operand) {
    case StridedLayout::param:
      return chunk.param;
    case StridedLayout::gradient:
      return chunk.gradient;
    case StridedLayout::momentum_buffer:
      return chunk.momentum_buffer;
    case StridedLayout::extra:
      return chunk.extra;
    default:
      return chunk.average;
  }
}

// A strided row's operands, and small flat copies of them.
class FlatCopies {
 public:
  using Layout = StridedLayout;
  FlatCopies(const Chunk& all, const Layout& layout, int64_t begin)
      : all_(all), layout_(layout), reading_(layout, begin), writing_(layout, begin) {}

  // The next elements, copied. only_gradient: nothing else is looked at.
  Chunk read(int64_t begin, int64_t count, bool only_gradient) {
    Chunk chunk = all_;
    chunk.index = static_cast<uint64_t>(begin);
    chunk.count = count;
    const bool has_places = !layout_.strides[Layout::place].empty() && !only_gradient;
    if (has_places) chunk.places = places_;
    if (all_.momentum_scale != nullptr) chunk.momentum_scale = all_.momentum_scale + begin / kMomentumBlock;
    for_runs(reading_, count, [&](const Position& at, int64_t place, int64_t length) {
      for (int o = 0; o < kOperands; ++o)
        if (operand_of(all_, o) != nullptr && (!only_gradient || o == Layout::gradient))
          copy(o, at, place, length, /*to_copies=*/true);
      if (!has_places) return;
      uint64_t in_whole = all_.index + static_cast<uint64_t>(at.offset(Layout::place));
      for (int64_t i = 0; i < length; ++i, in_whole += static_cast<uint64_t>(layout_.strides[Layout::place].back()))
        places_[place + i] = in_whole;
    });
    for (int o = 0; o < kOperands; ++o)
      if (operand_of(all_, o) != nullptr) operand_of(chunk, o) = copies_[o];
    return chunk;
  }
  void write(int64_t count) {
    for_runs(writing_, count, [&](const Position& at, int64_t place, int64_t length) {
      for (int o = 0; o < kOperands; ++o)
        if (operand_of(all_, o) != nullptr && (o != Layout::gradient || all_.options->zeroes))
          copy(o, at, place, length, /*to_copies=*/false);
    });
  }

 private:
  static constexpr int kOperands = static_cast<int>(Layout::place);  // those in memory

  int64_t bytes(int operand) const {
    switch (operand) {
      case Layout::param:
        return bytes_of(all_.storage);
      case Layout::gradient:
        return bytes_of(all_.gradient_storage);
      case Layout::momentum_buffer:
        return bytes_of(all_.options->momentum);
      case Layout::extra:
        return bytes_of_extra(all_.options->weights, all_.storage);
      default:
        return bytes_of(all_.options->average_storage);
    }
  }
  void copy(int operand, const Position& at, int64_t place, int64_t length, bool to_copies) {
    const auto which = static_cast<Layout::Operand>(operand);
    const int64_t size = bytes(operand);
    char* strided = static_cast<char*>(operand_of(all_, operand)) + at.offset(which) * size;
    char* flat = copies_[operand] + place * size;
    const int64_t stride = layout_.strides[which].back();
    const auto as = [&](auto* type) {
      using Word = std::remove_pointer_t<decltype(type)>;
      if (to_copies)
        gather(reinterpret_cast<Word*>(flat), reinterpret_cast<const Word*>(strided), stride, length);
      else
        scatter(reinterpret_cast<Word*>(strided), reinterpret_cast<const Word*>(flat), stride, length);
    };
    if (size == 8) return as(static_cast<uint64_t*>(nullptr));
    if (size == 4) return as(static_cast<uint32_t*>(nullptr));
    if (size == 2) return as(static_cast<uint16_t*>(nullptr));
    as(static_cast<uint8_t*>(nullptr));
  }

  Chunk all_;
  const Layout& layout_;
  Position reading_;
  Position writing_;
  alignas(64) char copies_[kOperands][kChunk * sizeof(double)];
  uint64_t places_[kChunk];
};

// A strided piece, a chunk at a time through flat copies, so that there is one arithmetic.
template <class Step>
void step_strided(const Chunk& chunk, const StridedLayout& layout, int64_t begin, int64_t count, const Step& step) {
  FlatCopies copies(chunk, layout, begin);
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t length = std::min(kChunk, count - done);
    step(copies.read(begin + done, length, /*only_gradient=*/false));
    copies.write(length);
  }
}

void step_with_options(const CpuStep& step, int32_t row, int64_t begin, int64_t count) {
  const RowInput& input = step.inputs[static_cast<size_t>(row)];
  if (input.gradient == nullptr && !input.is_averaged) return;
  const StepChunk step_chunk = options_step(step.fused_multiply_add);
  Chunk chunk = chunk_of(step, row, begin, std::min(kChunk, count));
  if (input.layout != nullptr) return step_strided(chunk, *input.layout, begin, count, step_chunk);
  step_chunk(chunk);
  for (int64_t done = kChunk; done < count; done += kChunk) {
    advance(chunk, kChunk);
    chunk.count = std::min(kChunk, count - done);
    step_chunk(chunk);
  }
}

void step_piece(const CpuStep& step, const FlatKernels& kernels, int32_t row_index, int64_t begin, int64_t count) {
  if (has_options_of(step, row_index)) return step_with_options(step, row_index, begin, count);
  const Row& row = step.table.rows()[static_cast<size_t>(row_index)];
  const RowInput& input = step.inputs[static_cast<size_t>(row_index)];
  if (input.gradient == nullptr) return;
  const UpdateFlat update = kernels[static_cast<size_t>(row.storage)][static_cast<size_t>(input.momentum)];
  const GroupScalars& group = step.groups[static_cast<size_t>(row.group)];
  if (input.layout == nullptr) {
    const int64_t offset = begin * bytes_of(row.storage);
    update(static_cast<char*>(row.param) + offset, static_cast<const char*>(input.gradient) + offset,
           input.momentum == Momentum::none ? nullptr : static_cast<char*>(row.momentum_buffer) + offset, count, group);
    return;
  }
  step_strided(chunk_of(step, row_index, begin, count), *input.layout, begin, count, [&](const Chunk& chunk) {
    update(chunk.param, chunk.gradient, chunk.momentum_buffer, chunk.count, group);
  });
}

// --- sums of squares

// In the same order whatever there is to sum: lanes that have got nothing are zeros.
WD_FUSED_INLINE double sum_of(double* lanes, int64_t used) {
  int64_t half = kSumLanes / 2;
  while (half >= used) half /= 2;
  for (; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}
double squares_of_piece(const CpuStep& step, int32_t row, int64_t begin, int64_t count) {
  const RowInput& input = step.inputs[static_cast<size_t>(row)];
  if (input.gradient == nullptr || !step.row_options[static_cast<size_t>(row)].clips) return 0;
  const AddSquares add_squares = square_sums();
  alignas(64) double lanes[kSumLanes] = {};
  const Chunk chunk = chunk_of(step, row, begin, count);
  if (input.layout == nullptr) {
    add_squares(chunk, lanes);
    return sum_of(lanes, std::min(count, kSumLanes));
  }
  FlatCopies copies(chunk, *input.layout, begin);
  for (int64_t done = 0; done < count; done += kChunk)
    add_squares(copies.read(begin + done, std::min(kChunk, count - done), /*only_gradient=*/true), lanes);
  return sum_of(lanes, kSumLanes);
}

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
  const FlatKernels& kernels = flat_kernels(step.numerics, step.fused_multiply_add);
  const Tile* tiles = step.table.tiles().data() + (step.backwards ? last_tile - 1 : first_tile);
  for (int64_t t = 0; t < count; ++t) {
    if (t + kTilesAhead < count) fetch(step, tiles[(t + kTilesAhead) * direction]);
    const Tile& tile = tiles[t * direction];
    step_piece(step, kernels, tile.row, tile.begin, tile.count);
  }
}

void sgd_cpu_row(const CpuStep& step, int32_t row) {
  step_piece(step, flat_kernels(step.numerics, step.fused_multiply_add), row, 0,
             step.table.rows()[static_cast<size_t>(row)].numel);
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
