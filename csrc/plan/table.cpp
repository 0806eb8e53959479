// Cuts rows into tiles and launches. Called by the backends' steps.
#include "plan/table.h"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace wd_fused {
namespace {

const RowOptions& options_of(const std::vector<RowOptions>& row_options, size_t row) {
  static const RowOptions none;
  return row_options.empty() ? none : row_options[row];
}

void* moved(void* address, int64_t bytes) { return address == nullptr ? nullptr : static_cast<char*>(address) + bytes; }

// Small tiles before the others, each in their order; returns how many.
template <class T>
int32_t small_first(std::vector<T>& tiles, int32_t most) {
  const auto end = std::stable_partition(tiles.begin(), tiles.end(), [&](const T& tile) { return tile.count <= most; });
  return static_cast<int32_t>(end - tiles.begin());
}

}  // namespace

Kind kind_of(const Row& row, const RowOptions& options, Numerics numerics) {
  Kind kind;
  kind.param = kind.momentum = row.storage;
  kind.rounds = numerics == Numerics::torch && bytes_of(row.storage) == 2;
  if (!options.is_used) return kind;
  kind.options = true;
  kind.momentum = options.momentum;
  kind.weights = options.weights;
  kind.averages = options.averages;
  if (options.averages) kind.average = options.average_storage;
  kind.stochastic = options.stochastic;
  kind.rounds = options.rounds;
  return kind;
}

PackedLayouts packed(const std::vector<const StridedLayout*>& layouts, const std::vector<RowOptions>& row_options) {
  PackedLayouts packed;
  for (size_t r = 0; r < layouts.size(); ++r) {
    const StridedLayout* layout = layouts[r];
    const int64_t first = options_of(row_options, r).first_index;
    if (layout == nullptr && first == 0) {
      packed.at.push_back(-1);
      continue;
    }
    packed.words.push_back(layout == nullptr || !layout->strides[StridedLayout::place].empty() ? first : -1);
    const auto at = static_cast<int64_t>(packed.words.size());
    packed.at.push_back(layout == nullptr ? ~at : at);
    if (layout == nullptr) continue;
    const size_t dims = layout->sizes.size();
    packed.words.push_back(static_cast<int64_t>(dims));
    packed.words.insert(packed.words.end(), layout->sizes.begin(), layout->sizes.end());
    for (const auto& strides : layout->strides) {
      packed.words.insert(packed.words.end(), strides.begin(), strides.end());
      packed.words.resize(packed.words.size() + dims - strides.size());  // an operand that is not there
    }
  }
  return packed;
}

void Table::pack_row(int32_t row, const Row& of, const KernelFormat& kernel, size_t words_of_group, bool alone) {
  const Group group{of.group, of.storage};
  const auto has = [&](const Launch& launch) {
    return std::find(launch.groups.begin(), launch.groups.end(), group) != launch.groups.end();
  };
  const auto fits = [&](const Launch& launch) {
    const size_t groups = launch.groups.size() + (has(launch) ? 0 : 1);
    return launch.kernel.id == kernel.id && launch.rows.size() + 1 + groups * words_of_group <= kernel.words;
  };
  // The last of its kernel, if it has room.
  auto last = launches_.rbegin();
  while (last != launches_.rend() && last->kernel.id != kernel.id) ++last;
  if (alone || last == launches_.rend() || !fits(*last)) {
    launches_.emplace_back().kernel = kernel;
    last = launches_.rbegin();
  }
  if (!has(*last)) last->groups.push_back(group);
  last->rows.push_back(row);
}

template <class T>
void Table::add_tiles(Launch& launch, const std::vector<Row>& rows, const std::vector<RowOptions>& row_options,
                      Numerics numerics, const TableFormat& format) {
  std::vector<T> tiles;
  for (size_t word = 0; word < launch.rows.size(); ++word) {
    const auto r = static_cast<size_t>(launch.rows[word]);
    const Row& row = rows[r];
    const RowOptions& options = options_of(row_options, r);
    const Kind kind = kind_of(row, options, numerics);
    const auto group = std::find(launch.groups.begin(), launch.groups.end(), Group{row.group, row.storage});
    const int32_t full = format.tile_elements(kind);
    T tile{};
    tile.row = static_cast<int32_t>(word);
    tile.layout = static_cast<int32_t>(layout_of_[r]);
    tile.group = static_cast<uint16_t>(group - launch.groups.begin());
    for (int64_t begin = 0; begin < row.numel; begin += full) {
      const int64_t at = tile.layout < 0 ? begin : 0;
      tile.param = moved(row.param, at * bytes_of(row.storage));
      tile.momentum_buffer = moved(row.momentum_buffer, at * bytes_of(kind.momentum));
      tile.piece = static_cast<int32_t>(begin / full);
      tile.count = static_cast<uint16_t>(std::min<int64_t>(full, row.numel - begin));
      if constexpr (std::is_same_v<T, OptionsTile>) {
        tile.extra = moved(options.extra, at * bytes_of_extra(kind.weights, row.storage));
        tile.average = kind.averages ? moved(options.average, at * bytes_of(kind.average)) : nullptr;
        if (options.momentum_scale != nullptr) tile.momentum_scale = options.momentum_scale + begin / kMomentumBlock;
        tile.position = options.position;
        tile.kind = kind.code() | (options.zeroes ? kZeroesGradient : 0);
      }
      tiles.push_back(tile);
    }
  }
  launch.small_tiles = small_first(tiles, format.small_tile_elements);
  launch.tiles = static_cast<int32_t>(tiles.size());
  launch.tiles_at = append(tiles);
}

Table::Table(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options, const std::vector<bool>& serial,
             const std::vector<const StridedLayout*>& layouts, Numerics numerics, const TableFormat& format) {
  PackedLayouts packed_layouts = packed(layouts, row_options);
  layout_of_ = std::move(packed_layouts.at);
  for (const bool alone : {false, true})
    for (size_t r = 0; r < rows.size(); ++r)
      if (serial[r] == alone && rows[r].numel != 0)
        pack_row(static_cast<int32_t>(r), rows[r],
                 format.kernel_of(r, kind_of(rows[r], options_of(row_options, r), numerics)), format.words_of_group,
                 alone);
  for (Launch& launch : launches_) {
    if (launch.kernel.options)
      add_tiles<OptionsTile>(launch, rows, row_options, numerics, format);
    else
      add_tiles<DeviceTile>(launch, rows, row_options, numerics, format);
  }
  layouts_at_ = append(packed_layouts.words);
}

NormTiles norm_tiles(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options,
                     const std::vector<int64_t>& layout_of, size_t groups, Numerics numerics,
                     const NormFormat& format) {
  NormTiles result;
  int64_t elements = 0;
  const auto counts = [&](size_t r) { return options_of(row_options, r).clips && rows[r].numel != 0; };
  for (size_t r = 0; r < rows.size(); ++r)
    if (counts(r)) elements += rows[r].numel;
  const int64_t times = elements / format.full_tiles / format.tile_elements;
  const int64_t full = std::max<int64_t>(times, 1) * format.tile_elements;

  std::vector<std::vector<NormTile>> of_launch;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!counts(r)) continue;
    const uint32_t kernel = format.kernel_of ? format.kernel_of(r) : 0;
    size_t l = result.launches.size();  // the last of its kernel, if it has room
    while (l-- > 0 && result.launches[l].kernel != kernel) {
    }
    if (l >= result.launches.size() || result.launches[l].rows.size() == format.words) {
      l = result.launches.size();
      result.launches.emplace_back().kernel = kernel;
      of_launch.emplace_back();
    }
    NormTile tile{};
    tile.row = static_cast<int32_t>(result.launches[l].rows.size());
    tile.layout = static_cast<int32_t>(layout_of[r]);
    tile.kind = kind_of(rows[r], row_options[r], numerics).code();
    tile.slot = rows[r].group;  // until they are sorted
    for (; tile.begin < rows[r].numel; tile.begin += full) {
      tile.count = static_cast<int32_t>(std::min(full, rows[r].numel - tile.begin));
      of_launch[l].push_back(tile);
    }
    result.launches[l].rows.push_back(static_cast<int32_t>(r));
  }
  if (result.launches.empty()) {
    result.launches.emplace_back();
    of_launch.emplace_back();
  }
  for (size_t l = 0; l < of_launch.size(); ++l) {
    NormTiles::Launch& launch = result.launches[l];
    launch.small_tiles = small_first(of_launch[l], format.small_tile_elements);
    launch.tiles = static_cast<int32_t>(of_launch[l].size());
    launch.first_tile = result.tiles.size();
    result.tiles.insert(result.tiles.end(), of_launch[l].begin(), of_launch[l].end());
  }
  // A group's slots follow one another, in the order of its tiles.
  std::vector<int32_t> next(groups + 1);
  for (const NormTile& tile : result.tiles) ++next[static_cast<size_t>(tile.slot) + 1];
  for (size_t g = 0; g < groups; ++g) next[g + 1] += next[g];
  result.groups.assign(groups, NormGroup{0, -1});
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto g = static_cast<size_t>(rows[r].group);
    if (options_of(row_options, r).clips) result.groups[g] = {next[g], next[g + 1]};
  }
  for (NormTile& tile : result.tiles) tile.slot = next[static_cast<size_t>(tile.slot)]++;
  result.slots = result.tiles.size();
  return result;
}

}  // namespace wd_fused
