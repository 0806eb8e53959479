// Cuts rows with a tail into tiles and launches, and writes what the kernels read. Called by cuda_step.cpp.
#include "plan/options_table.h"

#include <algorithm>
#include <cstring>

namespace wd_fused {
namespace {

constexpr size_t words_of(int parameter_bytes) {
  return (static_cast<size_t>(parameter_bytes) - sizeof(CudaTailHeader)) / sizeof(uint64_t);
}

// Appends items, and returns where.
template <class T>
size_t append(std::vector<std::byte>& bytes, const std::vector<T>& items) {
  bytes.resize((bytes.size() + 15) / 16 * 16);
  const size_t at = bytes.size();
  const auto* begin = reinterpret_cast<const std::byte*>(items.data());
  bytes.insert(bytes.end(), begin, begin + items.size() * sizeof(T));
  return at;
}

char* moved(void* address, int64_t bytes) { return address == nullptr ? nullptr : static_cast<char*>(address) + bytes; }

template <class Op>
void set_numbers(CudaTailGroup& group, const TailScalars<Op>& scalars, double decoupled, bool lr_on_device) {
  group.l1 = to_word(scalars.l1);
  group.keep = to_word(lr_on_device ? static_cast<Op>(decoupled) : scalars.keep);
  group.average_weight = to_word(scalars.average_weight);
  group.clip = to_word(scalars.clip);
  group.penalizes = scalars.penalizes != 0;
  group.shrinks = scalars.shrinks != 0;
}

}  // namespace

void CudaTailTable::add_tiles(const std::vector<Row>& rows, const std::vector<RowTail>& tails,
                              const std::vector<int64_t>& layout_of, Numerics numerics, const PackedRows& of,
                              Launch& launch, std::vector<CudaTailTile>& tiles) {
  std::vector<CudaTailTile> for_warps;
  CudaTable::Launch& update = launch.update;
  update.first_tile = static_cast<int64_t>(tiles.size());
  launch.all_in_float32 = true;
  launch.any_float64 = false;
  for (size_t word = 0; word < update.rows.size(); ++word) {
    const auto row_number = static_cast<size_t>(update.rows[word]);
    const Row& row = rows[row_number];
    const RowTail& tail = tails[row_number];
    CudaTailTile tile{};
    tile.row = static_cast<int32_t>(word);
    tile.layout = static_cast<int32_t>(layout_of[row_number]);
    tile.group = static_cast<uint16_t>(of.place_of(row.group, row.storage));
    tile.position = tail.position;
    tile.storage = row.storage;
    tile.momentum = tail.is_used ? tail.momentum : row.storage;
    tile.weights = tail.weights;
    tile.stochastic = tail.stochastic;
    tile.zeroes = tail.zeroes;
    tile.rounds = tail.is_used ? tail.rounds : numerics == Numerics::torch && bytes_of(row.storage) == 2;
    tile.averages_floats = tail.averages && tail.average_storage == Storage::float32;
    launch.all_in_float32 &= row.storage == Storage::float32 && tile.momentum == Storage::float32;
    launch.any_float64 |= row.storage == Storage::float64;
    for (int64_t begin = 0; begin < row.numel; begin += kTailTileElements) {
      const int64_t at = tile.layout < 0 ? begin : 0;
      tile.param = moved(row.param, at * bytes_of(row.storage));
      tile.momentum_buffer = moved(row.momentum_buffer, at * bytes_of(tile.momentum));
      tile.extra = moved(tail.extra, at * bytes_of_extra(tail.weights, row.storage));
      tile.average = tail.averages ? moved(tail.average, at * bytes_of(tail.average_storage)) : nullptr;
      tile.momentum_scale = tail.momentum_scale == nullptr ? nullptr : tail.momentum_scale + begin / kMomentumBlock;
      tile.piece = static_cast<int32_t>(begin / kTailTileElements);
      tile.count = static_cast<uint16_t>(std::min<int64_t>(kTailTileElements, row.numel - begin));
      (tile.count > kWarpTileElements ? tiles : for_warps).push_back(tile);
    }
  }
  update.block_tiles = static_cast<int32_t>(static_cast<int64_t>(tiles.size()) - update.first_tile);
  const auto warp_tiles = static_cast<int32_t>(for_warps.size());
  tiles.insert(tiles.end(), for_warps.begin(), for_warps.end());
  update.tiles = update.block_tiles + warp_tiles;
  const int32_t warp_blocks = (warp_tiles + kCudaWarps - 1) / kCudaWarps;
  update.blocks = update.block_tiles + warp_blocks;
  launch.norm = update;
  const int32_t of_block = tiles_of_norm_block(update.block_tiles);
  launch.norm.blocks = (update.block_tiles + of_block - 1) / of_block + warp_blocks;
}

void CudaTailTable::add_slots(const std::vector<Row>& rows, const std::vector<RowTail>& tails,
                              const std::vector<CudaTailTile>& tiles) {
  struct Run {
    int32_t group;
    size_t first_tile;
    size_t end;
  };
  std::vector<Run> runs;
  slots_.assign(tiles.size(), -1);
  std::vector<bool> clips(groups_, false);
  for (size_t r = 0; r < rows.size(); ++r)
    if (tails[r].clips) clips[static_cast<size_t>(rows[r].group)] = true;
  for (Launch& launch : launches_) {
    const auto first = static_cast<size_t>(launch.update.first_tile);
    const auto block_tiles = static_cast<size_t>(launch.update.block_tiles);
    const auto of_block = static_cast<size_t>(tiles_of_norm_block(launch.update.block_tiles));
    launch.has_norm = false;
    for (size_t t = 0; t < static_cast<size_t>(launch.update.tiles); ++t) {
      const auto row = static_cast<size_t>(launch.update.rows[static_cast<size_t>(tiles[first + t].row)]);
      if (!tails[row].clips) continue;
      launch.has_norm = true;
      const bool continues = t < block_tiles && t % of_block != 0 && !runs.empty() && runs.back().end == first + t &&
                             runs.back().group == rows[row].group;
      if (continues)
        ++runs.back().end;
      else
        runs.push_back({rows[row].group, first + t, first + t + 1});
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.group < b.group; });
  norm_groups_.assign(groups_, CudaNormGroup{0, -1});
  for (size_t g = 0, run = 0; g < groups_; ++g) {
    const auto begin = static_cast<int32_t>(run);
    for (; run < runs.size() && runs[run].group == static_cast<int32_t>(g); ++run)
      std::fill(slots_.begin() + static_cast<std::ptrdiff_t>(runs[run].first_tile),
                slots_.begin() + static_cast<std::ptrdiff_t>(runs[run].end), static_cast<int32_t>(run));
    if (clips[g]) norm_groups_[g] = {begin, static_cast<int32_t>(run)};
  }
  partials_ = runs.size();
}

CudaTailTable::CudaTailTable(const std::vector<Row>& rows, const std::vector<RowTail>& tails,
                             const std::vector<bool>& serial, const std::vector<const StridedLayout*>& layouts,
                             size_t groups, Numerics numerics)
    : groups_(groups) {
  for (size_t r = 0; r < rows.size(); ++r)
    storages_.push_back(tails[r].is_used ? std::nullopt : std::optional(rows[r].storage));
  const PackedLayouts packed_layouts = packed(layouts);
  std::vector<CudaTailTile> tiles;
  for (const PackedRows& of : packed(rows, serial, words_of(kLargeParameters), kWordsOfTailGroup)) {
    Launch& launch = launches_.emplace_back();
    launch.update.rows = of.rows;
    launch.groups = of.groups;
    add_tiles(rows, tails, packed_layouts.at, numerics, of, launch, tiles);
    const int bytes = of.words(kWordsOfTailGroup) <= words_of(kSmallParameters) ? kSmallParameters : kLargeParameters;
    const TailRows any_of = launch.any_float64      ? TailRows::any
                            : launch.all_in_float32 ? TailRows::float32
                                                    : TailRows::opmath_float;
    launch.update.kernel = {false, Storage::float32, Numerics::torch, bytes, KernelKind::tail, any_of};
    launch.norm.kernel = {false, Storage::float32, Numerics::torch, bytes, KernelKind::norm, any_of};
    launch.parameters.resize(static_cast<size_t>(bytes) / sizeof(uint64_t));
  }
  add_slots(rows, tails, tiles);
  append(bytes_, tiles);
  layouts_at_ = append(bytes_, packed_layouts.words);
  slots_at_ = append(bytes_, slots_);
  norm_groups_at_ = append(bytes_, norm_groups_);
  norm_state_at_ = append(bytes_, std::vector<CudaNormState>(1));
  sums_at_ = append(bytes_, std::vector<double>(groups_));
  norms_at_ = append(bytes_, std::vector<uint64_t>(std::max<size_t>(groups_, 1), ~uint64_t{0}));  // NaN in either type
  partials_at_ = append(bytes_, std::vector<double>(partials_));
}

CudaTailGroup in_words(const PackedRows::Group& of, const TailStepInput& step) {
  const auto g = static_cast<size_t>(of.group);
  CudaGroupInput input = step.groups[g];
  if (!step.steps[g].l2) input.weight_decay = {};  // the number, which does nothing
  CudaTailGroup group{};
  group.sgd = in_words(step.scalars[g], input, of.storage);
  const bool lr_on_device = input.lr.kind != ScalarKind::value;
  if (of.storage == Storage::float64)
    set_numbers(group, step.tails[g].in_double, step.steps[g].decoupled, lr_on_device);
  else
    set_numbers(group, step.tails[g].in_float, step.steps[g].decoupled, lr_on_device);
  std::memcpy(group.random_key, step.tails[g].random_key, sizeof(group.random_key));
  group.clips = step.norm.is_used && step.steps[g].clips();
  group.norm = -1;
  if (group.clips && CudaTailTable::forms_norm(step.norm)) {
    group.norm = step.norm.per_group ? of.group : 0;
    const double max_norm = step.steps[g].max_norm;
    group.clip = step.norm.in_double ? to_word(max_norm) : to_word(static_cast<float>(max_norm));
  }
  return group;
}

const void* CudaTailTable::parameters(size_t launch_number, const void* on_device, const TailStepInput& step) {
  Launch& launch = launches_[launch_number];
  auto* device_bytes = static_cast<std::byte*>(const_cast<void*>(on_device));
  const auto at = [&](size_t offset) { return static_cast<void*>(device_bytes + offset); };
  CudaTailHeader header{};
  header.tiles = static_cast<const CudaTailTile*>(on_device) + launch.update.first_tile;
  header.layouts = static_cast<const int64_t*>(at(layouts_at_));
  header.grad_scale = step.amp.grad_scale;
  header.found_inf = step.amp.found_inf;
  header.slots = static_cast<const int32_t*>(at(slots_at_)) + launch.update.first_tile;
  header.partials = static_cast<double*>(at(partials_at_));
  header.norm_groups = static_cast<const CudaNormGroup*>(at(norm_groups_at_));
  header.sums = static_cast<double*>(at(sums_at_));
  header.norms = at(norms_at_);
  header.norm_state = static_cast<CudaNormState*>(at(norm_state_at_));
  header.block_tiles = launch.update.block_tiles;
  header.tiles_in_launch = launch.update.tiles;
  header.rows = static_cast<int32_t>(launch.update.rows.size());
  header.group_count = static_cast<int32_t>(groups_);
  header.tiles_of_norm_block = tiles_of_norm_block(launch.update.block_tiles);
  header.norm_per_group = step.norm.per_group;
  header.norm_in_double = step.norm.in_double;
  header.finishes_norm = launch_number + 1 == launches_.size();
  header.backwards = step.norm.is_used;
  // As torch.amp.GradScaler would, if it were left to it.
  header.skips_nonfinite = forms_norm(step.norm) && step.amp.grad_scale != nullptr && step.amp.found_inf == nullptr;
  std::memcpy(launch.parameters.data(), &header, sizeof(header));

  uint64_t* word = launch.parameters.data() + sizeof(header) / sizeof(uint64_t);
  launch.steps = false;
  bool other_gradients = false;
  for (const int32_t row : launch.update.rows) {
    const RowInput& input = step.rows[static_cast<size_t>(row)];
    *word = 0;
    if (input.gradient != nullptr) {
      const Storage storage = storages_[static_cast<size_t>(row)].value_or(input.gradient_storage);
      *word = reinterpret_cast<uint64_t>(input.gradient) | static_cast<uint64_t>(storage) << kGradientStorageBits |
              (input.momentum == Momentum::first ? kFirstStep : 0);
      other_gradients |= storage != Storage::float32;
    } else if (input.is_averaged) {
      *word = kIsAveraged;
    }
    launch.steps |= *word++ != 0;
  }
  for (const PackedRows::Group& of : launch.groups) {
    const CudaTailGroup group = in_words(of, step);
    std::memcpy(word, &group, sizeof(group));
    word += kWordsOfTailGroup;
  }
  TailRows& rows = launch.update.kernel.tail_rows;
  if (launch.any_float64 || (step.norm.in_double && forms_norm(step.norm)))
    rows = TailRows::any;
  else
    rows = launch.all_in_float32 && !other_gradients ? TailRows::float32 : TailRows::opmath_float;
  launch.sums = step.norm.is_used && (launch.has_norm || header.finishes_norm != 0);
  return launch.parameters.data();
}

}  // namespace wd_fused
