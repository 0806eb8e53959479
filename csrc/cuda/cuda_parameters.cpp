// Which kernel takes which rows, and what every launch of a step is given. Called by cuda_step.cpp.
#include "cuda/cuda_parameters.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace wd_fused {
namespace {

constexpr size_t words_of(int parameter_bytes) {
  return (static_cast<size_t>(parameter_bytes) - sizeof(CudaHeader)) / sizeof(uint64_t);
}

template <size_t kCount>
bool is_among(const Kind (&kinds)[kCount], uint32_t code) {
  return std::any_of(std::begin(kinds), std::end(kinds), [&](const Kind& kind) { return kind.code() == code; });
}

KernelFormat kernel_of(const Kind& kind, bool is_strided) {
  if (!is_strided && is_among(kPlainKinds, kind.code())) return {kind.code(), words_of(kLargeParameters), false};
  if (!is_strided && is_among(kOptionKinds, kind.code())) return {kind.code(), words_of(kSmallParameters), true};
  return {kGeneralKernel, words_of(kSmallParameters), true};
}

int32_t tile_elements(const Kind& kind) { return static_cast<int32_t>(kCudaTileBytes / bytes_of(kind.param)); }

const char* name_of(Storage storage) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int8"};
  return kNames[static_cast<size_t>(storage)];
}

int blocks_of(int32_t small_tiles, int32_t tiles) {
  return (small_tiles + kCudaWarps - 1) / kCudaWarps + tiles - small_tiles;
}

uint64_t word_of(const RowInput& input, Storage storage) {
  if (input.gradient == nullptr) return input.is_averaged ? kIsAveraged : 0;
  return reinterpret_cast<uint64_t>(input.gradient) | static_cast<uint64_t>(storage) << kGradientStorageBits |
         (input.momentum == Momentum::first ? kFirstStep : 0);
}

}  // namespace

std::string name_of(const CudaKernel& kernel) {
  const std::string bytes = std::to_string(kernel.parameter_bytes);
  if (kernel.id == kNormKernel) return "norm_kernel<" + bytes + ">";
  if (kernel.id == kGeneralKernel) return "general_kernel<" + bytes + ">";
  const Kind kind = Kind::of(kernel.id);
  const bool is_half = bytes_of(kind.param) == 2;
  std::string name = std::string("sgd_kernel<") + name_of(kind.param);
  if (!kind.options) return name + (is_half && !kind.rounds ? ", opmath, " : ", torch, ") + bytes + ">";
  name += ", options";
  if (kind.weights != Weights::parameter) name += std::string(", ") + kWeightsNames[static_cast<size_t>(kind.weights)];
  if (kind.stochastic) name += ", stochastic";
  if (kind.momentum != kind.param) name += std::string(", momentum ") + name_of(kind.momentum);
  if (kind.averages) name += std::string(", average ") + name_of(kind.average);
  return name + ", " + bytes + ">";
}

CudaPlan::CudaPlan(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options,
                   const std::vector<bool>& serial, const std::vector<const StridedLayout*>& layouts, size_t groups,
                   Numerics numerics)
    : table_(rows, row_options, serial, layouts, numerics,
             {[&layouts](size_t row, const Kind& kind) { return kernel_of(kind, layouts[row] != nullptr); },
              tile_elements, static_cast<size_t>(kWordsOfGroupOptions), kWarpTileElements}),
      has_options_(!row_options.empty()) {
  for (size_t r = 0; r < rows.size(); ++r) {
    storages_.push_back(rows[r].storage);
    takes_any_gradient_.push_back(has_options_ && row_options[r].is_used);
  }
  for (const Table::Launch& of : table_.launches()) {
    Launch& launch = launches_.emplace_back();
    const size_t words = of.rows.size() + of.groups.size() * static_cast<size_t>(kWordsOfGroupOptions);
    launch.kernel = {of.kernel.id, words <= words_of(kSmallParameters) ? kSmallParameters : kLargeParameters};
    launch.blocks = blocks_of(of.small_tiles, of.tiles);
    launch.tensors = of.rows.size();
    launch.tiles = of.tiles;
    launch.parameters.resize(static_cast<size_t>(launch.kernel.parameter_bytes) / sizeof(uint64_t));
  }
  if (!has_options_ || is_empty()) return;
  norm_tiles_ = norm_tiles(
      rows, row_options, table_.layout_of(), groups, numerics,
      {/*kernel_of=*/{}, std::size(CudaNormParameters{}.words), kNormTiles, kNormTileElements, kWarpTileElements});
  for (const NormTiles::Launch& of : norm_tiles_.launches)
    norm_launches_.push_back({{kNormKernel, kSmallParameters},
                              std::max(blocks_of(of.small_tiles, of.tiles), 1),
                              of.rows.size(),
                              of.tiles,
                              std::vector<uint64_t>(kSmallParameters / sizeof(uint64_t))});
  norm_tiles_at_ = table_.append(norm_tiles_.tiles);
  norm_groups_at_ = table_.append(norm_tiles_.groups);
  norm_state_at_ = table_.append(std::vector<CudaNormState>(1));
  sums_at_ = table_.append(std::vector<double>(groups));
  norms_at_ = table_.append(std::vector<uint64_t>(std::max<size_t>(groups, 1), ~uint64_t{0}));  // NaN in either type
  partials_at_ = table_.append(std::vector<double>(norm_tiles_.slots));
}

std::vector<CudaKernel> CudaPlan::kernels() const {
  std::vector<CudaKernel> result;
  for (const Launch& launch : launches_) result.push_back(launch.kernel);
  if (!has_options_ || is_empty()) return result;
  // Where gradients come in another dtype, or the norm is in double, or only averages are updated.
  result.push_back({kGeneralKernel, kSmallParameters});
  result.push_back({kNormKernel, kSmallParameters});
  return result;
}

const std::vector<CudaPlan::Launch>& CudaPlan::norms(const void* on_device, const StepOptionsInput& step) {
  auto* bytes = static_cast<std::byte*>(const_cast<void*>(on_device));
  for (size_t l = 0; l < norm_launches_.size(); ++l) {
    const NormTiles::Launch& of = norm_tiles_.launches[l];
    CudaNormHeader header{};
    header.tiles = reinterpret_cast<const NormTile*>(bytes + norm_tiles_at_) + of.first_tile;
    header.layouts = reinterpret_cast<const int64_t*>(bytes + table_.layouts_at());
    header.grad_scale = step.amp.grad_scale;
    header.partials = reinterpret_cast<double*>(bytes + partials_at_);
    header.groups = reinterpret_cast<const NormGroup*>(bytes + norm_groups_at_);
    header.sums = reinterpret_cast<double*>(bytes + sums_at_);
    header.norms = bytes + norms_at_;
    header.state = reinterpret_cast<CudaNormState*>(bytes + norm_state_at_);
    header.small_tiles = of.small_tiles;
    header.tiles_in_launch = of.tiles;
    header.group_count = static_cast<int32_t>(norm_tiles_.groups.size());
    header.per_group = step.norm.per_group;
    header.in_double = step.norm.in_double;
    header.finishes = l + 1 == norm_launches_.size();
    uint64_t* word = norm_launches_[l].parameters.data();
    std::memcpy(word, &header, sizeof(header));
    word += sizeof(header) / sizeof(uint64_t);
    for (const int32_t row : of.rows) {
      const RowInput& input = step.rows[static_cast<size_t>(row)];
      *word++ = word_of(input, input.gradient_storage);
    }
  }
  return norm_launches_;
}

std::vector<const CudaPlan::Launch*> CudaPlan::updates(const void* on_device, const StepOptionsInput& step) {
  std::vector<const Launch*> result;
  const auto* bytes = static_cast<const std::byte*>(on_device);
  const bool has_norm = has_options_ && forms_norm(step.norm);
  for (size_t l = 0; l < launches_.size(); ++l) {
    Launch& launch = launches_[l];
    const Table::Launch& of = table_.launches()[l];
    CudaHeader header{};
    header.tiles = bytes + of.tiles_at;
    header.layouts = reinterpret_cast<const int64_t*>(bytes + table_.layouts_at());
    header.grad_scale = step.amp.grad_scale;
    header.found_inf = step.amp.found_inf;
    if (has_norm) header.norms = bytes + norms_at_;
    // As torch.amp.GradScaler would, if it were left to it.
    if (has_norm && step.amp.grad_scale != nullptr && step.amp.found_inf == nullptr)
      header.is_nonfinite = &reinterpret_cast<const CudaNormState*>(bytes + norm_state_at_)->is_nonfinite;
    header.small_tiles = of.small_tiles;
    header.tiles_in_launch = of.tiles;
    header.rows = static_cast<int32_t>(of.rows.size());
    header.norm_in_double = step.norm.in_double;
    header.backwards = step.norm.is_used;
    uint64_t* word = launch.parameters.data();
    std::memcpy(word, &header, sizeof(header));
    word += sizeof(header) / sizeof(uint64_t);

    bool steps = false;
    bool is_general = of.kernel.id == kGeneralKernel;
    for (const int32_t row : of.rows) {
      const RowInput& input = step.rows[static_cast<size_t>(row)];
      const Storage storage = storages_[static_cast<size_t>(row)];
      const bool takes_any = takes_any_gradient_[static_cast<size_t>(row)];
      const Storage of_gradient = takes_any ? input.gradient_storage : storage;
      *word = word_of(input, of_gradient);
      is_general |= *word != 0 && (of_gradient != storage || *word == kIsAveraged);
      steps |= *word++ != 0;
    }
    for (const Table::Group& group : of.groups) {
      const CudaGroupOptions words = in_words(group, step);
      std::memcpy(word, &words, sizeof(words));
      word += kWordsOfGroupOptions;
      is_general |= has_norm && step.norm.in_double && words.clips && group.storage != Storage::float64;
    }
    if (of.kernel.options) launch.kernel.id = is_general ? kGeneralKernel : of.kernel.id;
    if (steps) result.push_back(&launch);
  }
  return result;
}

}  // namespace wd_fused
