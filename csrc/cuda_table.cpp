// Cuts rows into tiles and launches, and writes what the kernel reads. Called by cuda_step.cpp.
#include "cuda_table.h"

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

bool CudaTable::fits(const Launch& launch, const Row& row) {
  const bool known = std::any_of(launch.groups.begin(), launch.groups.end(), [&](const Launch::Group& group) {
    return group.group == row.group && group.storage == row.storage;
  });
  const size_t groups = launch.groups.size() + (known ? 0 : 1);
  return launch.rows.size() + 1 + groups * kWordsOfGroup <= words_of(kLargeParameters);
}

int32_t CudaTable::place_of_group(Launch& launch, int32_t group, Storage storage) {
  const auto place = std::find_if(launch.groups.begin(), launch.groups.end(), [&](const Launch::Group& other) {
    return other.group == group && other.storage == storage;
  });
  const auto index = static_cast<int32_t>(place - launch.groups.begin());
  if (place == launch.groups.end()) launch.groups.push_back({group, storage});
  return index;
}

void CudaTable::add_tiles(const std::vector<Row>& rows, const std::vector<int64_t>& layout_of, Launch& launch,
                          std::vector<CudaTile>& tiles) {
  std::vector<CudaTile> for_warps;
  launch.first_tile = static_cast<int64_t>(tiles.size());
  for (size_t word = 0; word < launch.rows.size(); ++word) {
    const auto row_number = static_cast<size_t>(launch.rows[word]);
    const Row& row = rows[row_number];
    const int64_t elements = cuda_tile_elements(row.storage);
    CudaTile tile{};
    tile.row = static_cast<int32_t>(word);
    tile.layout = static_cast<int32_t>(layout_of[row_number]);
    tile.group = static_cast<uint16_t>(place_of_group(launch, row.group, row.storage));
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
  std::vector<int64_t> layout_words;
  std::vector<int64_t> layout_of(rows.size(), -1);
  for (size_t r = 0; r < rows.size(); ++r) {
    if (layouts[r] == nullptr) continue;
    layout_of[r] = static_cast<int64_t>(layout_words.size());
    layout_words.push_back(static_cast<int64_t>(layouts[r]->sizes.size()));
    layout_words.insert(layout_words.end(), layouts[r]->sizes.begin(), layouts[r]->sizes.end());
    for (const auto& strides : layouts[r]->strides)
      layout_words.insert(layout_words.end(), strides.begin(), strides.end());
  }

  const auto add_row = [&](int32_t r, bool alone) {
    const Row& row = rows[static_cast<size_t>(r)];
    if (row.numel == 0) return;
    if (alone || launches_.empty() || !fits(launches_.back(), row)) launches_.emplace_back();
    Launch& launch = launches_.back();
    place_of_group(launch, row.group, row.storage);
    launch.rows.push_back(r);
  };
  for (size_t r = 0; r < rows.size(); ++r)
    if (!serial[r]) add_row(static_cast<int32_t>(r), false);
  for (size_t r = 0; r < rows.size(); ++r)
    if (serial[r]) add_row(static_cast<int32_t>(r), true);

  std::vector<CudaTile> tiles;
  for (Launch& launch : launches_) {
    const size_t words = launch.rows.size() + launch.groups.size() * kWordsOfGroup;
    const Storage storage = launch.groups.front().storage;
    const bool mixed = std::any_of(launch.groups.begin(), launch.groups.end(),
                                   [&](const Launch::Group& group) { return group.storage != storage; });
    // In float32 and float64 nothing lies between storage and opmath: both numerics are one kernel.
    const bool is_half = storage == Storage::float16 || storage == Storage::bfloat16;
    launch.kernel = {mixed, storage, mixed || is_half ? numerics : Numerics::torch,
                     words <= words_of(kSmallParameters) ? kSmallParameters : kLargeParameters};
    launch.parameters.resize(static_cast<size_t>(launch.kernel.parameter_bytes) / sizeof(uint64_t));
    add_tiles(rows, layout_of, launch, tiles);
  }
  append(bytes_, tiles);
  layouts_at_ = bytes_.size();
  append(bytes_, layout_words);
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
  for (const Launch::Group& of : launch.groups) {
    const auto g = static_cast<size_t>(of.group);
    const CudaGroup group = in_words(scalars[g], groups[g], of.storage);
    std::memcpy(word, &group, sizeof(group));
    word += kWordsOfGroup;
  }
  return launch.parameters.data();
}

}  // namespace wd_fused
