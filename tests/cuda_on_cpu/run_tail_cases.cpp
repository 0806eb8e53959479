// `run_tail_cases SEED COUNT`: random rows with and without a tail, stepped by the CUDA kernels and by the CPU's loops
// (csrc/tail_cpu.cpp); every byte must be the same, and sums of squares the same in double. Built with AddressSanitizer
// and UBSan, and started, by test_cuda_kernel_on_cpu.py.
#include "cuda_on_cpu.h"

// After the stand-in for CUDA, whose Order it takes.
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/walk.h"
#include "cuda/sgd_cuda.h"
#include "plan/options_table.h"

namespace wd_fused {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  int below(int count) { return static_cast<int>(bits_() % static_cast<uint64_t>(count)); }
  bool once_in(int count) { return below(count) == 0; }
  template <class T>
  T one_of(std::initializer_list<T> items) {
    return items.begin()[below(static_cast<int>(items.size()))];
  }
  uint64_t bits() { return bits_(); }
  // A small multiple of 1/16: squares of many add up exactly, in any order.
  double number() { return (below(65) - 32) / 16.0; }

 private:
  std::mt19937_64 bits_;
};

// The same bytes twice, each in a malloc block that ends with the last: one for the kernels, one for the CPU's loops.
class Twins {
 public:
  Twins(size_t bytes, size_t off) : off_(off), bytes_(bytes) {
    for (char*& block : blocks_) {
      block = static_cast<char*>(std::malloc(off + bytes));
      std::memset(block, 0, off + bytes);
      ASAN_POISON_MEMORY_REGION(block, off & ~size_t{7});
    }
  }
  Twins(Twins&& other) noexcept : off_(other.off_), bytes_(other.bytes_) { std::swap(blocks_, other.blocks_); }
  ~Twins() {
    for (char* block : blocks_) {
      if (block != nullptr) ASAN_UNPOISON_MEMORY_REGION(block, off_);
      std::free(block);
    }
  }
  char* data(int which) const { return blocks_[which] + off_; }
  void fill(const std::string& bytes) {
    for (int which = 0; which < 2; ++which) std::memcpy(data(which), bytes.data(), bytes_);
  }
  bool are_equal() const { return std::memcmp(data(0), data(1), bytes_) == 0; }
  size_t bytes() const { return bytes_; }

 private:
  size_t off_;
  size_t bytes_;
  char* blocks_[2] = {};
};

template <class T>
void append(std::string& bytes, const T& value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string numbers(Random& random, Storage storage, int64_t count) {
  std::string bytes;
  for (int64_t i = 0; i < count; ++i) {
    const double x = random.number();
    switch (storage) {
      case Storage::float64:
        append(bytes, x);
        break;
      case Storage::float16:
        append(bytes, pack<Float16>(static_cast<float>(x)));
        break;
      case Storage::bfloat16:
        append(bytes, pack<BFloat16>(static_cast<float>(x)));
        break;
      case Storage::int8:
        append(bytes, static_cast<int8_t>(random.below(255) - 127));
        break;
      default:
        append(bytes, static_cast<float>(x));
    }
  }
  return bytes;
}

// A plan's rows, twice.
class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed) {
    cuda_on_cpu::order =
        random_.one_of({cuda_on_cpu::Order::forwards, cuda_on_cpu::Order::backwards, cuda_on_cpu::Order::scattered});
    only_floats_ = random_.once_in(3);
    numerics_ = random_.one_of({Numerics::torch, Numerics::opmath});
    const int groups = 1 + random_.below(3);
    for (int g = 0; g < groups; ++g) add_group();
    tails_on_cpu_ = tails_;
    norm_.is_used = std::any_of(steps_.begin(), steps_.end(), [](const GroupStep& step) { return step.clips(); });
    norm_.per_group = random_.once_in(2);
    const int rows = 1 + random_.below(6);
    for (int r = 0; r < rows; ++r) add_row();
    for (const Row& row : rows_[0]) norm_.in_double |= row.storage == Storage::float64;
  }

  void run() {
    if (norm_.is_used) check_sums();
    step_on_cpu();
    launch(/*norm=*/false);
    for (const Twins& twins : memory_)
      if (!twins.are_equal()) throw std::runtime_error("bytes differ: " + what(twins));
  }

 private:
  void add_group() {
    GroupStep step;
    if (random_.once_in(2)) step.max_norm = random_.one_of({0.5, 1.0, 1e6});
    if (random_.once_in(2)) step.l1 = 0.001;
    if (random_.once_in(2)) step.decoupled = 0.01;
    step.l2 = random_.once_in(2);
    step.average_weight = random_.one_of({1.0, 0.1, 0.75});
    step.random_key = random_.bits();
    steps_.push_back(step);
    const double lr = 0.125, momentum = random_.one_of({0.0, 0.9}), decay = step.l2 ? 0.01 : 0.0;
    const bool nesterov = momentum != 0 && random_.once_in(2), maximize = random_.once_in(3);
    const auto scalars = [&](auto op) {
      using Op = decltype(op);
      return Scalars<Op>{static_cast<Op>(-lr),
                         static_cast<Op>(momentum),
                         Op{1},
                         static_cast<Op>(decay),
                         decay != 0,
                         nesterov,
                         maximize};
    };
    scalars_.push_back({scalars(0.0f), scalars(0.0)});
    const auto tail = [&](auto op) {
      using Op = decltype(op);
      return TailScalars<Op>{1,
                             1,
                             static_cast<Op>(step.l1),
                             static_cast<Op>(1 - lr * step.decoupled),
                             static_cast<Op>(step.average_weight),
                             step.l1 != 0,
                             step.decoupled != 0};
    };
    tails_.push_back({tail(0.0f),
                      tail(0.0),
                      {static_cast<uint32_t>(step.random_key), static_cast<uint32_t>(step.random_key >> 32)}});
    groups_.push_back({{}, {}, momentum != 0});
  }

  // New memory of `count` elements, at an odd place now and then; where each twin has it.
  std::pair<void*, void*> memory(Storage storage, int64_t count) {
    const auto size = static_cast<size_t>(bytes_of(storage));
    const size_t off = random_.once_in(3) ? size * static_cast<size_t>(random_.below(16)) : 0;
    memory_.emplace_back(static_cast<size_t>(count) * size, off);
    memory_.back().fill(numbers(random_, storage, count));
    return {memory_.back().data(0), memory_.back().data(1)};
  }

  void add_row() {
    const auto group = static_cast<int32_t>(random_.below(static_cast<int>(steps_.size())));
    const GroupStep& step = steps_[static_cast<size_t>(group)];
    Row row{};
    RowTail tail;
    RowInput input{};
    row.group = group;
    row.storage = only_floats_ ? Storage::float32
                               : random_.one_of({Storage::float32, Storage::float64, Storage::float16,
                                                 Storage::bfloat16, Storage::bfloat16});
    row.numel = random_.one_of({1, 3, 4, 31, 127, 128, 129, 500, 1023, 1024, 1025, 2000, 8191, 8192, 8193, 17000});
    tail.is_used = true;
    tail.position = random_.below(1000);
    tail.clips = step.clips();
    tail.averages = random_.once_in(2);
    tail.zeroes = random_.once_in(4);
    const bool is_half = bytes_of(row.storage) == 2;
    if (row.storage == Storage::bfloat16)
      tail.weights =
          random_.one_of({Weights::parameter, Weights::full, Weights::split, Weights::split24, Weights::kahan});
    else if (is_half)
      tail.weights = random_.one_of({Weights::parameter, Weights::full, Weights::kahan});
    tail.stochastic = row.storage == Storage::bfloat16 && tail.weights == Weights::parameter && random_.once_in(2);
    tail.momentum = row.storage;
    if (!only_floats_ && row.storage != Storage::float64 && random_.once_in(2))
      tail.momentum = random_.one_of({Storage::float32, Storage::bfloat16, Storage::int8});
    const bool is_master =
        tail.weights == Weights::full || tail.weights == Weights::split || tail.weights == Weights::split24;
    tail.average_storage = is_master ? Storage::float32 : row.storage;
    tail.rounds = is_half && numerics_ == Numerics::torch && tail.weights == Weights::parameter && !tail.stochastic &&
                  tail.momentum == row.storage;
    input.gradient_storage =
        only_floats_
            ? Storage::float32
            : random_.one_of({row.storage, row.storage, Storage::float32, Storage::bfloat16, Storage::float64});
    const bool has_momentum = groups_[static_cast<size_t>(group)].has_momentum;
    input.momentum = !has_momentum ? Momentum::none : random_.one_of({Momentum::first, Momentum::running});
    const bool has_gradient = !random_.once_in(6);
    input.is_averaged = !has_gradient && tail.averages;

    // Strided: the parameter's memory transposed against the others', with gaps.
    const bool strided = random_.once_in(4) && row.numel % 4 == 0;
    const int64_t span = strided ? 2 * row.numel : row.numel;
    std::unique_ptr<StridedLayout>& layout = layouts_.emplace_back();
    if (strided) {
      layout = std::make_unique<StridedLayout>();
      layout->sizes = {row.numel / 4, 4};
      for (auto& strides : layout->strides) strides = {8, 2};
      layout->strides[StridedLayout::gradient] = {1, row.numel / 4};
      layout->strides[StridedLayout::extra] = {4, 1};
    }
    input.layout = layout.get();
    const auto set = [&](int which, Row& of_row, RowTail& of_tail, RowInput& of_input, const auto& all) {
      const auto at = [&](size_t i) { return which == 0 ? all[i].first : all[i].second; };
      of_row.param = at(0);
      of_input.gradient = has_gradient ? at(1) : nullptr;
      of_row.momentum_buffer = has_momentum ? at(2) : nullptr;
      of_tail.extra = tail.weights == Weights::parameter ? nullptr : at(3);
      of_tail.average = tail.averages ? at(4) : nullptr;
      of_tail.momentum_scale = tail.momentum == Storage::int8 ? static_cast<float*>(at(5)) : nullptr;
    };
    const Storage extra = tail.weights == Weights::kahan     ? row.storage
                          : tail.weights == Weights::split   ? Storage::bfloat16  // any bits of two bytes
                          : tail.weights == Weights::split24 ? Storage::int8
                                                             : Storage::float32;
    const std::vector<std::pair<void*, void*>> all = {
        memory(row.storage, span),
        memory(input.gradient_storage, span),
        memory(tail.momentum, span),
        memory(extra, span),
        memory(tail.average_storage, span),
        memory(Storage::float32, (row.numel + kMomentumBlock - 1) / kMomentumBlock)};
    for (int which = 0; which < 2; ++which) {
      set(which, row, tail, input, all);
      rows_[which].push_back(row);
      row_tails_[which].push_back(tail);
      inputs_[which].push_back(input);
    }
    serial_.push_back(random_.once_in(8));
    described_.push_back("row of " + std::to_string(row.numel) + ", storage " +
                         std::to_string(static_cast<int>(row.storage)) + ", gradient " +
                         std::to_string(static_cast<int>(input.gradient_storage)) + ", momentum " +
                         std::to_string(static_cast<int>(tail.momentum)) + ", weights " +
                         std::to_string(static_cast<int>(tail.weights)) + (strided ? ", strided" : ""));
  }

  std::string what(const Twins& twins) const {
    constexpr const char* kNames[] = {"parameter", "gradient", "momentum buffer", "extra", "average", "scale"};
    const auto at = static_cast<size_t>(&twins - memory_.data());
    return std::string(kNames[at % 6]) + " of a " + described_[at / 6];
  }

  CpuStep on_cpu(const TensorTable& table) const {
    return {table, inputs_[1], scalars_, numerics_, true, row_tails_[1], tails_on_cpu_};
  }

  CudaTailTable& table() {
    if (!table_) {
      std::vector<const StridedLayout*> layouts;
      for (const auto& layout : layouts_) layouts.push_back(layout.get());
      table_ = std::make_unique<CudaTailTable>(rows_[0], row_tails_[0], serial_, layouts, steps_.size(), numerics_);
      device_.resize(table_->bytes().size() / 16 + 1);
      std::memcpy(device_.data(), table_->bytes().data(), table_->bytes().size());
    }
    return *table_;
  }
  void launch(bool norm) {
    const CudaAmp amp{grad_scale_, nullptr};
    const TailStepInput step{inputs_[0], scalars_, groups_, tails_, steps_, norm_, amp};
    for (size_t l = 0; l < table().launches().size(); ++l) {
      const void* parameters = table().parameters(l, device_.data(), step);
      const CudaTailTable::Launch& launch = table().launches()[l];
      if (norm ? !launch.sums : !launch.steps) continue;
      const CudaTable::Launch& one = norm ? launch.norm : launch.update;
      launch_sgd(one.kernel, parameters, one.blocks, nullptr);
    }
  }

  // The kernel's sums against the CPU's.
  void check_sums() {
    launch(/*norm=*/true);
    std::vector<double> sums(steps_.size());
    const TensorTable table_of_rows(rows_[1], serial_);
    const CpuStep step = on_cpu(table_of_rows);
    for (size_t r = 0; r < rows_[1].size(); ++r)
      if (row_tails_[1][r].clips)
        sums[static_cast<size_t>(rows_[1][r].group)] += square_cpu_row(step, static_cast<int32_t>(r));
    const auto* ours =
        reinterpret_cast<const double*>(reinterpret_cast<const char*>(device_.data()) + table().sums_at());
    for (size_t g = 0; g < sums.size(); ++g)
      if (ours[g] != sums[g])
        throw std::runtime_error("sum of squares " + std::to_string(ours[g]) + ", expected " + std::to_string(sums[g]));
    double total = 0;
    for (const double sum : sums) total += sum;
    for (size_t g = 0; g < sums.size(); ++g) {
      if (!steps_[g].clips()) continue;
      const double norm = std::sqrt(norm_.per_group ? sums[g] : total);
      const double max_norm = steps_[g].max_norm;
      const double coefficient = norm_.in_double
                                     ? clip_coefficient(norm, max_norm)
                                     : clip_coefficient(static_cast<float>(norm), static_cast<float>(max_norm));
      tails_on_cpu_[g].in_float.clip = static_cast<float>(coefficient);
      tails_on_cpu_[g].in_double.clip = coefficient;
    }
  }

  void step_on_cpu() {
    const TensorTable table_of_rows(rows_[1], serial_);
    const CpuStep step = on_cpu(table_of_rows);
    for (size_t r = 0; r < rows_[1].size(); ++r) sgd_cpu_row(step, static_cast<int32_t>(r));
  }

  Random random_;
  bool only_floats_;
  Numerics numerics_;
  std::vector<GroupStep> steps_;
  std::vector<GroupScalars> scalars_;
  std::vector<GroupTail> tails_;
  std::vector<GroupTail> tails_on_cpu_;  // with the coefficients of a norm
  std::vector<CudaGroupInput> groups_;
  Norm norm_;
  const float* grad_scale_ = nullptr;
  std::vector<Twins> memory_;
  std::vector<std::unique_ptr<StridedLayout>> layouts_;
  std::vector<Row> rows_[2];
  std::vector<RowTail> row_tails_[2];
  std::vector<RowInput> inputs_[2];
  std::vector<bool> serial_;
  std::vector<std::string> described_;
  std::unique_ptr<CudaTailTable> table_;
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  std::vector<Sixteen> device_;
};

}  // namespace
}  // namespace wd_fused

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_tail_cases SEED COUNT\n");
    return 1;
  }
  const uint64_t seed = std::stoull(argv[1]), count = std::stoull(argv[2]);
  for (uint64_t i = seed; i < seed + count; ++i) {
    try {
      wd_fused::Case(i).run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "run_tail_cases: case %llu: %s\n", static_cast<unsigned long long>(i), error.what());
      return 1;
    }
  }
  std::printf("%llu cases\n", static_cast<unsigned long long>(count));
}
