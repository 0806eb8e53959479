// Which of Triton's kernels takes which rows, and the words that each step brings. Called by
// step_plan.cpp.
#include "python/hosted_step.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "plan/group_words.h"

namespace py = pybind11;

namespace wd_fused {
namespace {

// triton_kernels/kernels.py has the same numbers.
constexpr int kMomentumBits = 61;                           // of a row's word: what Momentum says, above any address
constexpr uint64_t kOnlyAveraged = uint64_t{1} << 60;       // of the same
constexpr size_t kWordsOfGroup = kWordsOfGroupOptions + 1;  // and where the coefficient lies
constexpr int64_t kNormTileElements = 16384;                // at least
constexpr int32_t kFewSums = 32;                            // of a group's tiles, that are added up with other groups'
constexpr size_t kMostWords = 65535 * kWordsOfGroup;        // of a launch, whose groups have numbers of 16 bits
static_assert(static_cast<int>(Momentum::first) == 1 && static_cast<int>(Momentum::running) == 2);

py::bytes as_bytes(const void* data, size_t bytes) { return py::bytes(static_cast<const char*>(data), bytes); }

// Whether elements of the row have other places in the whole parameter than in the row.
bool is_placed(const RowOptions& options, const StridedLayout* layout) {
  return options.first_index != 0 || (layout != nullptr && !layout->strides[StridedLayout::place].empty());
}

// Beside a kind's code, what else a kernel is compiled for.
uint32_t kernel_id(const Kind& kind, const RowOptions& options, const StridedLayout* layout) {
  const uint32_t code = kind.code() | uint32_t{layout != nullptr} << 20;
  return kind.options ? code | static_cast<uint32_t>(options.gradient) << 21 | uint32_t{options.zeroes} << 24 |
                            uint32_t{is_placed(options, layout)} << 25
                      : code;
}

}  // namespace

HostedStep::~HostedStep() {
  const py::gil_scoped_acquire gil;
  host_ = {};
}

bool HostedStep::is_capturing() const {
  const py::gil_scoped_acquire gil;
  return host_.attr("is_capturing")().cast<bool>();
}

py::tuple HostedStep::kernel_of(size_t row, const StridedLayout* layout) const {
  const RowOptions options = row_options_.empty() ? RowOptions{} : row_options_[row];
  const Kind kind = kind_of(rows_[row], options, numerics_);
  const bool rounds = kind.rounds && (!kind.options || options.gradient == kind.param);
  if (!kind.options) return py::make_tuple(dtype_of(kind.param), rounds, layout != nullptr);
  return py::make_tuple(dtype_of(kind.param), rounds, layout != nullptr, true,
                        kWeightsNames[static_cast<size_t>(kind.weights)], kind.stochastic, dtype_of(options.gradient),
                        dtype_of(kind.momentum), dtype_of(kind.averages ? kind.average : kind.param), kind.averages,
                        options.zeroes, is_placed(options, layout));
}

// id: gradient storage, whether the norm is that of float64, rounds, strided.
py::tuple HostedStep::norm_kernel_of(uint32_t id) const {
  return py::make_tuple(dtype_of(static_cast<Storage>(id & 7)), (id & 8) != 0, (id & 16) != 0, (id & 32) != 0);
}

void HostedStep::make_ready(const std::vector<const StridedLayout*>& layouts) {
  const py::gil_scoped_acquire gil;
  const auto kernel = [&](size_t row, const Kind& kind) {
    const RowOptions options = row_options_.empty() ? RowOptions{} : row_options_[row];
    return KernelFormat{kernel_id(kind, options, layouts[row]), kMostWords, kind.options};
  };
  const auto tile_elements = [&](const Kind& kind) {
    return host_.attr("tile_elements")(dtype_of(kind.param), kind.options, kind.momentum == Storage::int8)
        .cast<int32_t>();
  };
  table_.emplace(rows_, row_options_, serial_, layouts, numerics_,
                 TableFormat{kernel, tile_elements, kWordsOfGroup, /*small_tile_elements=*/0});
  py::list launches;
  size_t words = 0;
  launches_ending_.clear();
  for (const Table::Launch& launch : table_->launches()) {
    const auto first = static_cast<size_t>(launch.rows.front());
    launches.append(py::make_tuple(kernel_of(first, layouts[first]), launch.tiles_at, launch.tiles, launch.rows.size(),
                                   words += launch.rows.size()));
    words += launch.groups.size() * kWordsOfGroup;
    launches_ending_.push_back(words);
  }
  py::list norms;
  size_t groups_at = 0;
  size_t large_at = 0;
  std::vector<int64_t> large;
  if (!row_options_.empty()) {
    const auto norm_kernel = [&](size_t row) {
      const RowOptions& options = row_options_[row];
      const bool rounds = options.rounds && options.gradient == rows_[row].storage;
      return static_cast<uint32_t>(options.gradient) | uint32_t{rows_[row].storage == Storage::float64} << 3 |
             uint32_t{rounds} << 4 | static_cast<uint32_t>(layouts[row] != nullptr) << 5;
    };
    norm_tiles_ = norm_tiles(rows_, row_options_, table_->layout_of(), group_count_, numerics_,
                             {norm_kernel, kMostWords, kNormTiles, kNormTileElements, /*small_tile_elements=*/0});
    // Where no row counts in a norm, a tile without elements: its sums and norms are 0 all the same.
    if (norm_tiles_.tiles.empty()) {
      norm_tiles_.tiles.push_back({});
      norm_tiles_.launches.front().tiles = 1;
    }
    for (size_t g = 0; g < group_count_; ++g)
      if (norm_tiles_.groups[g].end - norm_tiles_.groups[g].begin > kFewSums) large.push_back(static_cast<int64_t>(g));
    const size_t tiles_at = table_->append(norm_tiles_.tiles);
    for (const NormTiles::Launch& launch : norm_tiles_.launches) {
      norms.append(py::make_tuple(norm_kernel_of(launch.kernel), tiles_at + launch.first_tile * sizeof(NormTile),
                                  launch.tiles, launch.rows.size(), words += std::max<size_t>(launch.rows.size(), 1)));
    }
    groups_at = table_->append(norm_tiles_.groups);
    large_at = table_->append(large);
  }
  has_brought_ = false;
  const auto& bytes = table_->bytes();
  host_.attr("make_ready")(as_bytes(bytes.data(), bytes.size()), table_->layouts_at(), launches, norms, groups_at,
                           large_at, large.size(), group_count_, words);
  changed_ = false;
}

// --- a step

// For each launch its rows' words, backwards, and its groups'; for each of the norm its rows'; then the groups' largest
// norms.
std::vector<uint64_t> HostedStep::words_of(const Inputs& inputs) {
  std::vector<uint64_t> words;
  const auto add_rows = [&](const std::vector<int32_t>& rows) {
    if (rows.empty()) words.push_back(0);  // of the norm's tile without elements
    for (auto r = rows.rbegin(); r != rows.rend(); ++r) {
      const RowInput& input = inputs.rows[static_cast<size_t>(*r)];
      const auto address = reinterpret_cast<uint64_t>(input.gradient);
      words.push_back(address != 0 ? address | static_cast<uint64_t>(input.momentum) << kMomentumBits
                                   : (input.is_averaged ? kOnlyAveraged : 0));
    }
  };
  const std::vector<CudaGroupInput> groups = on_device(inputs.groups);
  const CudaAmp amp;
  const StepOptionsInput step{inputs.rows,         inputs.scalars, groups, inputs.of_options,
                              inputs.option_steps, inputs.norm,    amp};
  for (const Table::Launch& launch : table_->launches()) {
    add_rows(launch.rows);
    for (const Table::Group& of : launch.groups) {
      const CudaGroupOptions group = in_words(of, step);
      uint64_t own[kWordsOfGroup];
      std::memcpy(own, &group, sizeof(group));
      // In the device's memory float64 ones lie before the float32 ones.
      const int64_t at =
          of.storage == Storage::float64 ? 8 * of.group : 8 * static_cast<int64_t>(group_count_) + 4 * of.group;
      own[kWordsOfGroupOptions] = static_cast<uint64_t>(group.norm < 0 ? -1 : at);
      words.insert(words.end(), own, own + kWordsOfGroup);
    }
  }
  if (row_options_.empty()) return words;
  for (const NormTiles::Launch& launch : norm_tiles_.launches) add_rows(launch.rows);
  for (size_t g = 0; g < group_count_; ++g) words.push_back(to_word(inputs.option_steps[g].max_norm));
  return words;
}

void HostedStep::bring(const Inputs& inputs) {
  refuse_what_a_graph_would_repeat(inputs);
  const py::gil_scoped_acquire gil;
  copies_.clear();
  std::vector<uint64_t> words = words_of(inputs);
  const bool is_new = words != words_ || !has_brought_;
  words_ = std::move(words);
  has_brought_ = false;  // if this fails
  py::object changed = py::none();
  py::list launched;
  if (is_new) {
    changed = as_bytes(words_.data(), words_.size() * sizeof(uint64_t));
    const auto& launches = table_->launches();
    for (size_t l = 0; l < launches.size(); ++l) {
      const uint64_t* word = words_.data() + (l == 0 ? 0 : launches_ending_[l - 1]);
      if (std::any_of(word, word + launches[l].rows.size(), [](uint64_t of_row) { return of_row != 0; }))
        launched.append(l);
    }
  }
  host_.attr("bring")(changed, launched, inputs.norm.is_used);
  has_brought_ = true;
}

void HostedStep::measure(const Inputs& inputs, const CudaAmp& amp) {
  const auto& steps = inputs.option_steps;
  const auto first = std::find_if(steps.begin(), steps.end(), [](const GroupStep& step) { return step.clips(); });
  const int64_t norm_of = inputs.norm.per_group ? -1 : first - steps.begin();
  host_.attr("measure")(reinterpret_cast<uintptr_t>(amp.grad_scale), norm_of, inputs.norm.in_double);
}

void HostedStep::run(const Inputs& inputs) {
  const py::gil_scoped_acquire gil;
  const CudaAmp amp = on_device(inputs.amp);
  const bool forms_norm = wd_fused::forms_norm(inputs.norm);
  if (forms_norm) measure(inputs, amp);
  host_.attr("launch")(reinterpret_cast<uintptr_t>(amp.grad_scale), reinterpret_cast<uintptr_t>(amp.found_inf),
                       forms_norm && amp.grad_scale != nullptr && amp.found_inf == nullptr);
  copies_.clear();
}

at::Tensor HostedStep::sums(const Inputs& inputs) {
  refuse_norm_on_the_host();
  const py::gil_scoped_acquire gil;
  measure(inputs, on_device(inputs.amp));
  copies_.clear();
  return host_.attr("sums")().cast<at::Tensor>();
}

at::Tensor HostedStep::grad_norm() {
  const py::gil_scoped_acquire gil;
  const py::object norm = host_.attr("grad_norm")();
  return norm.is_none() ? at::Tensor() : norm.cast<at::Tensor>();
}

}  // namespace wd_fused
