// Cuts rows into tiles and launches, and writes what the kernel reads. Called by cuda_step.cpp.
#include "plan/cuda_table.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace wd_fused {
namespace {

constexpr size_t words_of(int parameter_bytes) {
  return (static_cast<size_t>(parameter_bytes) - sizeof(CudaHeader)) / sizeof(uint64_t);
}

const char* name_of(Storage storage) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};
  return kNames[static_cast<size_t>(storage)];
}

template <class Op>
CudaGroup in_words(const Scalars<Op>& scalars, const CudaGroupInput& input, Storage storage) {
  const auto word = [](Op value, const DeviceScalar& on_device) {
    return on_device.kind == ScalarKind::value ? to_word(value) : reinterpret_cast<uint64_t>(on_device.address);
  };
  CudaGroup group{};
  group.lr = word(scalars.minus_lr, input.lr);
  group.weight_decay = word(scalars.weight_decay, input.weight_decay);
  group.momentum = to_word(scalars.momentum);
  group.one_minus_dampening = to_word(scalars.one_minus_dampening);
  group.lr_kind = input.lr.kind;
  group.weight_decay_kind = input.weight_decay.kind;
  group.storage = storage;
  group.has_momentum = input.has_momentum;
  group.decays = scalars.decays != 0;
  group.nesterov = scalars.nesterov != 0;
  group.maximize = scalars.maximize != 0;
  return group;
}

template <class T>
void append(std::vector<std::byte>& bytes, const std::vector<T>& items) {
  const auto* begin = reinterpret_cast<const std::byte*>(items.data());
  bytes.insert(bytes.end(), begin, begin + items.size() * sizeof(T));
}

}  // namespace

CudaGroup in_words(const GroupScalars& scalars, const CudaGroupInput& input, Storage storage) {
  return storage == Storage::float64 ? in_words(scalars.in_double, input, storage)
                                     : in_words(scalars.in_float, input, storage);
}

std::string name_of(const CudaKernel& kernel) {
  constexpr const char* kTailRows[] = {"float32", "opmath float", "any"};
  const std::string bytes = std::to_string(kernel.parameter_bytes);
  if (kernel.kind == KernelKind::norm) return "norm_kernel<" + bytes + ">";
  if (kernel.kind == KernelKind::tail)
    return std::string("tail_kernel<") + kTailRows[static_cast<size_t>(kernel.tail_rows)] + ", " + bytes + ">";
  return std::string("sgd_kernel<") + (kernel.mixed ? "mixed" : name_of(kernel.storage)) + ", " +
         (kernel.numerics == Numerics::torch ? "torch" : "opmath") + ", " + bytes + ">";
}

int32_t PackedRows::place_of(int32_t group, Storage storage) const {
  const auto place = std::find_if(groups.begin(), groups.end(),
                                  [&](const Group& other) { return other.group == group && other.storage == storage; });
  return static_cast<int32_t>(place - groups.begin());
}

std::vector<PackedRows> packed(const std::vector<Row>& rows, const std::vector<bool>& serial, size_t words,
                               size_t words_of_group) {
  std::vector<PackedRows> launches;
  const auto add = [&](size_t r, bool alone) {
    const Row& row = rows[r];
    if (row.numel == 0) return;
    const auto is_new = [&](const PackedRows& to) {
      return static_cast<size_t>(to.place_of(row.group, row.storage)) == to.groups.size();
    };
    const auto fits = [&](const PackedRows& to) {
      return to.words(words_of_group) + 1 + (is_new(to) ? words_of_group : 0) <= words;
    };
    if (alone || launches.empty() || !fits(launches.back())) launches.emplace_back();
    PackedRows& launch = launches.back();
    if (is_new(launch)) launch.groups.push_back({row.group, row.storage});
    launch.rows.push_back(static_cast<int32_t>(r));
  };
  for (size_t r = 0; r < rows.size(); ++r)
    if (!serial[r]) add(r, false);
  for (size_t r = 0; r < rows.size(); ++r)
    if (serial[r]) add(r, true);
  return launches;
}

PackedLayouts packed(const std::vector<const StridedLayout*>& layouts) {
  PackedLayouts packed;
  for (const StridedLayout* layout : layouts) {
    packed.at.push_back(layout == nullptr ? -1 : static_cast<int64_t>(packed.words.size()));
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

void CudaTable::add_tiles(const std::vector<Row>& rows, const std::vector<int64_t>& layout_of, const PackedRows& of,
                          Launch& launch, std::vector<CudaTile>& tiles) {
  std::vector<CudaTile> for_warps;
  launch.first_tile = static_cast<int64_t>(tiles.size());
  for (size_t word = 0; word < launch.rows.size(); ++word) {
    const auto row_number = static_cast<size_t>(launch.rows[word]);
    const Row& row = rows[row_number];
    const int64_t elements = cuda_tile_elements(row.storage);
    CudaTile tile{};
    tile.row = static_cast<int32_t>(word);
    tile.layout = static_cast<int32_t>(layout_of[row_number]);
    tile.group = static_cast<uint16_t>(of.place_of(row.group, row.storage));
    for (int64_t begin = 0; begin < row.numel; begin += elements) {
      const int64_t offset = tile.layout < 0 ? begin * bytes_of(row.storage) : 0;
      tile.param = static_cast<char*>(row.param) + offset;
      tile.momentum_buffer =
          row.momentum_buffer == nullptr ? nullptr : static_cast<char*>(row.momentum_buffer) + offset;
      tile.piece = static_cast<int32_t>(begin / elements);
      tile.count = static_cast<uint16_t>(std::min(elements, row.numel - begin));
      (tile.count > kWarpTileElements ? tiles : for_warps).push_back(tile);
    }
  }
  launch.block_tiles = static_cast<int32_t>(static_cast<int64_t>(tiles.size()) - launch.first_tile);
  const auto warp_tiles = static_cast<int32_t>(for_warps.size());
  tiles.insert(tiles.end(), for_warps.begin(), for_warps.end());
  launch.tiles = launch.block_tiles + warp_tiles;
  launch.blocks = launch.block_tiles + (warp_tiles + kCudaWarps - 1) / kCudaWarps;
}

CudaTable::CudaTable(const std::vector<Row>& rows, const std::vector<bool>& serial,
                     const std::vector<const StridedLayout*>& layouts, Numerics numerics) {
  const PackedLayouts packed_layouts = packed(layouts);
  std::vector<CudaTile> tiles;
  for (const PackedRows& of : packed(rows, serial, words_of(kLargeParameters), kWordsOfGroup)) {
    Launch& launch = launches_.emplace_back();
    launch.rows = of.rows;
    launch.groups = of.groups;
    const Storage storage = launch.groups.front().storage;
    const bool mixed = std::any_of(launch.groups.begin(), launch.groups.end(),
                                   [&](const PackedRows::Group& group) { return group.storage != storage; });
    // In float32 and float64 nothing lies between storage and opmath: both numerics are one kernel.
    const bool is_half = storage == Storage::float16 || storage == Storage::bfloat16;
    launch.kernel = {mixed, storage, mixed || is_half ? numerics : Numerics::torch,
                     of.words(kWordsOfGroup) <= words_of(kSmallParameters) ? kSmallParameters : kLargeParameters};
    launch.parameters.resize(static_cast<size_t>(launch.kernel.parameter_bytes) / sizeof(uint64_t));
    add_tiles(rows, packed_layouts.at, of, launch, tiles);
  }
  append(bytes_, tiles);
  layouts_at_ = bytes_.size();
  append(bytes_, packed_layouts.words);
}

const void* CudaTable::parameters(size_t launch_number, const void* on_device, const std::vector<RowInput>& inputs,
                                  const std::vector<GroupScalars>& scalars, const std::vector<CudaGroupInput>& groups,
                                  const CudaAmp& amp) {
  Launch& launch = launches_[launch_number];
  const auto* device_bytes = static_cast<const std::byte*>(on_device);
  CudaHeader header{};
  header.tiles = reinterpret_cast<const CudaTile*>(device_bytes) + launch.first_tile;
  header.layouts = reinterpret_cast<const int64_t*>(device_bytes + layouts_at_);
  header.grad_scale = amp.grad_scale;
  header.found_inf = amp.found_inf;
  header.block_tiles = launch.block_tiles;
  header.tiles_in_launch = launch.tiles;
  header.rows = static_cast<int32_t>(launch.rows.size());
  std::memcpy(launch.parameters.data(), &header, sizeof(header));

  uint64_t* word = launch.parameters.data() + sizeof(CudaHeader) / sizeof(uint64_t);
  uint64_t any = 0;
  for (const int32_t row : launch.rows) {
    const RowInput& input = inputs[static_cast<size_t>(row)];
    const auto address = reinterpret_cast<uint64_t>(input.gradient);
    *word = address != 0 && input.momentum == Momentum::first ? address | kFirstStep : address;
    any |= *word++;
  }
  if (any == 0) return nullptr;
  for (const PackedRows::Group& of : launch.groups) {
    const auto g = static_cast<size_t>(of.group);
    const CudaGroup group = in_words(scalars[g], groups[g], of.storage);
    std::memcpy(word, &group, sizeof(group));
    word += kWordsOfGroup;
  }
  return launch.parameters.data();
}

}  // namespace wd_fused
