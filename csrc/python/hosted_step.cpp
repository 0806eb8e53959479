// Cuts rows into tiles as Triton's kernels want them, and tells the host of them and of each step. Called by
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
constexpr int kMomentumBits = 61;                      // of a row's word: what Momentum says, above any address
constexpr uint64_t kOnlyAveraged = uint64_t{1} << 60;  // of the same
constexpr int64_t kFewSums = 32;                       // of a group's tiles, that are added up with other groups'
constexpr size_t kWordsOfOptions = kWordsOfGroupOptions + 1;  // and where the coefficient lies
static_assert(static_cast<int>(Momentum::first) == 1 && static_cast<int>(Momentum::running) == 2);

py::bytes as_bytes(const void* words, size_t count) {
  return py::bytes(static_cast<const char*>(words), count * sizeof(uint64_t));
}

int64_t word(const void* address, int64_t bytes = 0) {
  return address == nullptr ? 0 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)) + bytes;
}

const char* name_of(Weights weights) {
  constexpr const char* kNames[] = {"parameter", "full", "split", "split24", "kahan"};
  return kNames[static_cast<size_t>(weights)];
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

// --- kernels

bool HostedStep::Kind::operator==(const Kind& other) const {
  const RowOptions &a = options, &b = other.options;
  return storage == other.storage && rounds == other.rounds && a.is_used == b.is_used && a.weights == b.weights &&
         a.stochastic == b.stochastic && a.gradient == b.gradient && a.momentum == b.momentum &&
         a.averages == b.averages && a.average_storage == b.average_storage && a.zeroes == b.zeroes;
}

py::tuple HostedStep::Kind::in_python(bool strided) const {
  if (!options.is_used) return py::make_tuple(dtype_of(storage), rounds, strided);
  return py::make_tuple(dtype_of(storage), rounds, strided, true, name_of(options.weights), options.stochastic,
                        dtype_of(options.gradient), dtype_of(options.momentum),
                        dtype_of(options.averages ? options.average_storage : storage), options.averages,
                        options.zeroes);
}

bool HostedStep::Kind::has_norm_of(const Kind& other) const {
  const auto is_double = [](const Kind& kind) { return kind.storage == Storage::float64; };
  return options.gradient == other.options.gradient && is_double(*this) == is_double(other) && rounds == other.rounds;
}

py::tuple HostedStep::Kind::norm_in_python(bool strided) const {
  return py::make_tuple(dtype_of(options.gradient), storage == Storage::float64, rounds, strided);
}

HostedStep::Kind HostedStep::kind_of(size_t row) const {
  const Storage storage = rows_[row].storage;
  if (!has_options() || !row_options_[row].is_used)
    return {storage, numerics_ == Numerics::torch && bytes_of(storage) == 2, {}};
  const RowOptions& options = row_options_[row];
  return {storage, options.rounds && options.gradient == storage, options};
}

std::vector<HostedStep::Launch> HostedStep::launches(const std::vector<const StridedLayout*>& layouts) const {
  std::vector<Launch> together;
  std::vector<Launch> alone;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (rows_[r].numel == 0) continue;
    const Kind kind = kind_of(r);
    auto& launches = serial_[r] ? alone : together;
    auto launch =
        std::find_if(launches.begin(), launches.end(), [&](const Launch& other) { return other.kind == kind; });
    if (serial_[r] || launch == launches.end()) launch = launches.insert(launches.end(), Launch{kind});
    launch->rows.push_back(r);
    launch->strided |= layouts[r] != nullptr;
  }
  together.insert(together.end(), alone.begin(), alone.end());
  return together;
}

// Where no row counts in a norm, one launch of a tile without elements: its sums and norms are 0 all the same.
std::vector<HostedStep::Launch> HostedStep::norm_launches(const std::vector<const StridedLayout*>& layouts) const {
  std::vector<Launch> launches;
  for (size_t r = 0; r < rows_.size() && has_options(); ++r) {
    if (rows_[r].numel == 0 || !row_options_[r].clips) continue;
    const Kind kind = kind_of(r);
    auto launch = std::find_if(launches.begin(), launches.end(),
                               [&](const Launch& other) { return other.kind.has_norm_of(kind); });
    if (launch == launches.end()) launch = launches.insert(launches.end(), Launch{kind});
    launch->rows.push_back(r);
    launch->strided |= layouts[r] != nullptr;
  }
  if (launches.empty() && has_options()) launches.push_back({{Storage::float32, false, {}}});
  return launches;
}

// --- the table

void HostedStep::find_places() {
  places_.clear();
  group_word_.clear();
  const size_t words = has_options() ? kWordsOfOptions : kWordsOfGroup;
  for (const Row& row : rows_) {
    const Place own{row.group, row.storage};
    const auto place = std::find(places_.begin(), places_.end(), own);
    group_word_.push_back(rows_.size() + static_cast<size_t>(place - places_.begin()) * words);
    if (place == places_.end()) places_.push_back(own);
  }
}

void HostedStep::add_tiles(Launch& launch, const std::vector<int64_t>& layout_of, std::vector<int64_t>& table) const {
  launch.at = static_cast<int64_t>(table.size());
  for (const size_t r : launch.rows) {
    const Row& row = rows_[r];
    const RowOptions& options = launch.kind.options;
    const Storage momentum = options.is_used ? options.momentum : row.storage;
    for (int64_t begin = 0; begin < row.numel; begin += launch.elements) {
      const int64_t at = layout_of[r] < 0 ? begin : 0;
      const RowOptions own = has_options() ? row_options_[r] : RowOptions{};
      table.insert(table.end(),
                   {word(row.param, at * bytes_of(row.storage)), word(row.momentum_buffer, at * bytes_of(momentum)),
                    word(own.extra, at * bytes_of_extra(own.weights, row.storage)),
                    word(own.averages ? own.average : nullptr, at * bytes_of(own.average_storage)),
                    word(own.momentum_scale, begin / kMomentumBlock * static_cast<int64_t>(sizeof(float))), begin,
                    std::min(launch.elements, row.numel - begin), static_cast<int64_t>(r),
                    static_cast<int64_t>(group_word_[r]), layout_of[r], own.position});
      ++launch.tiles;
    }
  }
}

// A group's sums lie together, in the order of its tiles. Behind the tiles: of each group the first of its sums and
// their number, then the groups with many.
void HostedStep::add_norm(std::vector<Launch>& launches, const std::vector<int64_t>& layout_of,
                          std::vector<int64_t>& table) {
  std::vector<int64_t> numbers(group_count_);
  const auto tiles_of = [](int64_t numel, const Launch& launch) {
    return (numel + launch.elements - 1) / launch.elements;
  };
  for (const Launch& launch : launches)
    for (const size_t r : launch.rows) numbers[static_cast<size_t>(rows_[r].group)] += tiles_of(rows_[r].numel, launch);
  std::vector<int64_t> ranges;
  std::vector<int64_t> next;
  std::vector<int64_t> large;
  int64_t sums = 0;
  for (size_t g = 0; g < group_count_; ++g) {
    ranges.insert(ranges.end(), {sums, numbers[g]});
    next.push_back(sums);
    sums += numbers[g];
    if (numbers[g] > kFewSums) large.push_back(static_cast<int64_t>(g));
  }
  for (Launch& launch : launches) {
    launch.at = static_cast<int64_t>(table.size());
    for (const size_t r : launch.rows)
      for (int64_t begin = 0; begin < rows_[r].numel; begin += launch.elements, ++launch.tiles)
        table.insert(table.end(), {begin, std::min(launch.elements, rows_[r].numel - begin), static_cast<int64_t>(r),
                                   layout_of[r], next[static_cast<size_t>(rows_[r].group)]++});
    if (launch.rows.empty()) {
      table.insert(table.end(), {0, 0, 0, -1, 0});
      launch.tiles = 1;
    }
  }
  ranges_at_ = static_cast<int64_t>(table.size());
  large_groups_ = static_cast<int64_t>(large.size());
  table.insert(table.end(), ranges.begin(), ranges.end());
  table.insert(table.end(), large.begin(), large.end());
}

void HostedStep::make_ready(const std::vector<const StridedLayout*>& layouts) {
  const py::gil_scoped_acquire gil;
  find_places();
  std::vector<Launch> steps = launches(layouts);
  std::vector<Launch> norms = norm_launches(layouts);
  py::list step_kernels;
  py::list norm_kernels;
  for (const Launch& launch : steps) step_kernels.append(launch.kind.in_python(launch.strided));
  for (const Launch& launch : norms) norm_kernels.append(launch.kind.norm_in_python(launch.strided));
  const auto elements = host_.attr("tile_elements")(step_kernels, norm_kernels)
                            .cast<std::pair<std::vector<int64_t>, std::vector<int64_t>>>();
  for (size_t l = 0; l < steps.size(); ++l) steps[l].elements = elements.first[l];
  for (size_t l = 0; l < norms.size(); ++l) norms[l].elements = elements.second[l];

  const PackedLayouts packed_layouts = packed(layouts);
  std::vector<int64_t> table;
  for (Launch& launch : steps) add_tiles(launch, packed_layouts.at, table);
  const size_t layouts_at = table.size();
  table.insert(table.end(), packed_layouts.words.begin(), packed_layouts.words.end());
  if (has_options()) add_norm(norms, packed_layouts.at, table);

  const auto told = [](const std::vector<Launch>& launches, const py::list& kernels) {
    py::list result;
    for (size_t l = 0; l < launches.size(); ++l)
      result.append(py::make_tuple(kernels[l], launches[l].at, launches[l].tiles, launches[l].rows.size()));
    return result;
  };
  has_brought_ = false;
  host_.attr("make_ready")(as_bytes(table.data(), table.size()), layouts_at, told(steps, step_kernels),
                           told(norms, norm_kernels), ranges_at_, large_groups_, group_count_,
                           rows_.size() + places_.size() * kWordsOfOptions);
  rows_of_launches_.clear();
  for (Launch& launch : steps) rows_of_launches_.push_back(std::move(launch.rows));
  changed_ = false;
}

// --- a step

std::vector<uint64_t> HostedStep::words_of(const Inputs& inputs) {
  const size_t words_of_group = has_options() ? kWordsOfOptions : kWordsOfGroup;
  std::vector<uint64_t> words(rows_.size() + places_.size() * words_of_group);
  for (size_t r = 0; r < rows_.size(); ++r) {
    const RowInput& input = inputs.rows[r];
    const auto address = reinterpret_cast<uint64_t>(input.gradient);
    if (address != 0)
      words[r] = address | static_cast<uint64_t>(input.momentum) << kMomentumBits;
    else if (input.is_averaged)
      words[r] = kOnlyAveraged;
  }
  const std::vector<CudaGroupInput> groups = on_device(inputs.groups);
  const CudaAmp amp;
  for (size_t p = 0; p < places_.size(); ++p) {
    const Place& place = places_[p];
    const auto g = static_cast<size_t>(place.group);
    uint64_t* const own = words.data() + rows_.size() + p * words_of_group;
    if (!has_options()) {
      const CudaGroup group = in_words(inputs.scalars[g], groups[g], place.storage);
      std::memcpy(own, &group, sizeof(group));
      continue;
    }
    const CudaGroupOptions group =
        in_words({place.group, place.storage},
                 {inputs.rows, inputs.scalars, groups, inputs.of_options, inputs.option_steps, inputs.norm, amp});
    std::memcpy(own, &group, sizeof(group));
    // In the device's memory float64 ones lie before the float32 ones.
    const int64_t at =
        place.storage == Storage::float64 ? 8 * place.group : 8 * static_cast<int64_t>(group_count_) + 4 * place.group;
    own[kWordsOfGroupOptions] = static_cast<uint64_t>(group.norm < 0 ? -1 : at);
  }
  for (size_t g = 0; g < group_count_ && has_options(); ++g) words.push_back(to_word(inputs.option_steps[g].max_norm));
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
    changed = as_bytes(words_.data(), words_.size());
    for (size_t l = 0; l < rows_of_launches_.size(); ++l) {
      const auto& rows = rows_of_launches_[l];
      if (std::any_of(rows.begin(), rows.end(), [this](size_t r) { return words_[r] != 0; })) launched.append(l);
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
