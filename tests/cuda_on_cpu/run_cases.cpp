// `run_cases cases results`: steps every case of a file through CudaTable and the kernel; `run_cases --conversions`:
// compares the kernel's conversions of scalars with the processor's; `run_cases --many-elements`. Built with
// AddressSanitizer and UBSan, and started, by test_cuda_kernel_on_cpu.py, which writes the cases and says there what a
// case is.
#include "cuda_on_cpu.h"

// After the stand-in for CUDA, whose Order it takes.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/sgd_cuda.h"
#include "plan/cuda_table.h"

namespace wd_fused {
namespace {

constexpr size_t kAlignment = 16;
constexpr unsigned char kFill = 0xa5;

// A malloc block of its own that ends with the last byte: AddressSanitizer sees any access behind it, and all but a few
// bytes before it; in those a write is seen by what stands there.
class Block {
 public:
  Block(const std::string& bytes, size_t off) : off_(off), size_(bytes.size()), all_(std::malloc(off + bytes.size())) {
    std::memset(all_.get(), kFill, off);
    if (size_ != 0) std::memcpy(data(), bytes.data(), size_);
    ASAN_POISON_MEMORY_REGION(all_.get(), off & ~size_t{7});
  }
  Block(Block&&) = default;
  ~Block() {
    if (all_ != nullptr) ASAN_UNPOISON_MEMORY_REGION(all_.get(), off_);
  }
  char* data() const { return static_cast<char*>(all_.get()) + off_; }
  std::string bytes() const {
    for (size_t i = off_ & ~size_t{7}; i < off_; ++i)
      if (static_cast<unsigned char*>(all_.get())[i] != kFill)
        throw std::runtime_error("a write in front of a tensor's first element");
    return std::string(data(), size_);
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  size_t off_;
  size_t size_;
  std::unique_ptr<void, Free> all_;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }
  template <class T>
  T value() {
    T value;
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  int64_t integer() { return value<int64_t>(); }
  double number() { return value<double>(); }
  std::vector<int64_t> integers(int64_t count) {
    std::vector<int64_t> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(integer());
    return result;
  }
  std::string bytes(int64_t count) {
    std::string result(static_cast<size_t>(count), '\0');
    if (count != 0) file_.read(result.data(), count);
    return result;
  }

 private:
  std::ifstream file_;
};

class Writer {
 public:
  explicit Writer(const char* path) : file_(path, std::ios::binary) { file_.exceptions(std::ios::badbit); }
  void integer(int64_t value) { file_.write(reinterpret_cast<const char*>(&value), sizeof(value)); }
  void bytes(const std::string& bytes) { file_.write(bytes.data(), static_cast<std::streamsize>(bytes.size())); }

 private:
  std::ofstream file_;
};

// A group's hyperparameters, as Python holds them.
struct Hyperparameters {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;

  template <class Op>
  Scalars<Op> in() const {
    Scalars<Op> scalars;
    scalars.minus_lr = static_cast<Op>(-lr);
    scalars.momentum = static_cast<Op>(momentum);
    scalars.one_minus_dampening = static_cast<Op>(1 - dampening);
    scalars.weight_decay = static_cast<Op>(weight_decay);
    scalars.decays = weight_decay != 0;
    scalars.nesterov = nesterov;
    scalars.maximize = maximize;
    return scalars;
  }
};

class Case {
 public:
  explicit Case(Reader& from) {
    numerics_ = static_cast<Numerics>(from.integer());
    cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(from.integer());
    read_blocks(from);
    amp_.grad_scale = reinterpret_cast<const float*>(address(from));
    amp_.found_inf = reinterpret_cast<const float*>(address(from));
    read_groups(from);
    read_rows(from);
  }

  void run(Writer& to) {
    CudaTable table(rows_, serial_, layouts_, numerics_);
    const Block device(std::string(table.bytes().size(), '\0'), 0);
    copy_to_device_and_wait(device.data(), table.bytes().data(), table.bytes().size(), make_upload_stream());
    to.integer(static_cast<int64_t>(table.launches().size()));
    for (size_t l = 0; l < table.launches().size(); ++l) {
      const auto& launch = table.launches()[l];
      const void* parameters = table.parameters(l, device.data(), inputs_, scalars_, groups_, amp_);
      if (parameters != nullptr) launch_sgd(launch.kernel, parameters, launch.blocks, nullptr);
      const std::string name = parameters == nullptr ? "" : name_of(launch.kernel);
      to.integer(static_cast<int64_t>(name.size()));
      to.bytes(name);
      to.integer(launch.blocks);
      to.integer(static_cast<int64_t>(launch.rows.size()));
    }
    for (const Block& block : blocks_) to.bytes(block.bytes());
  }

 private:
  void read_blocks(Reader& from) {
    const int64_t count = from.integer();
    for (int64_t i = 0; i < count; ++i) {
      const auto off = static_cast<size_t>(from.integer());
      blocks_.emplace_back(from.bytes(from.integer()), off);
      if (reinterpret_cast<uintptr_t>(blocks_.back().data()) % kAlignment != off % kAlignment)
        throw std::runtime_error("malloc gave memory that is not aligned");
    }
  }
  char* address(Reader& from) {
    const int64_t block = from.integer();
    const int64_t offset = from.integer();
    return block < 0 ? nullptr : blocks_[static_cast<size_t>(block)].data() + offset;
  }
  DeviceScalar scalar(Reader& from) {
    DeviceScalar scalar;
    scalar.kind = static_cast<ScalarKind>(from.integer());
    scalar.address = address(from);
    return scalar;
  }
  void read_groups(Reader& from) {
    const int64_t count = from.integer();
    for (int64_t i = 0; i < count; ++i) {
      Hyperparameters of{};
      of.lr = from.number();
      of.momentum = from.number();
      of.dampening = from.number();
      of.weight_decay = from.number();
      of.nesterov = from.integer() != 0;
      of.maximize = from.integer() != 0;
      scalars_.push_back({of.in<float>(), of.in<double>()});
      CudaGroupInput group{};
      group.lr = scalar(from);
      group.weight_decay = scalar(from);
      group.has_momentum = of.momentum != 0;
      groups_.push_back(group);
    }
  }
  void read_rows(Reader& from) {
    const int64_t count = from.integer();
    for (int64_t i = 0; i < count; ++i) {
      Row row{};
      RowInput input{};
      row.storage = static_cast<Storage>(from.integer());
      row.numel = from.integer();
      row.group = static_cast<int32_t>(from.integer());
      input.momentum = static_cast<Momentum>(from.integer());
      serial_.push_back(from.integer() != 0);
      row.param = address(from);
      input.gradient = address(from);
      row.momentum_buffer = address(from);
      StridedLayout layout;
      const int64_t dims = from.integer();
      const bool simplify = from.integer() != 0;
      layout.sizes = from.integers(dims);
      for (const auto operand : {StridedLayout::param, StridedLayout::gradient, StridedLayout::momentum_buffer})
        layout.strides[operand] = from.integers(dims);
      if (simplify) layout = simplified(layout);
      if (!simplify || !is_flat(layout)) owned_.push_back(std::make_unique<StridedLayout>(layout));
      input.layout = !simplify || !is_flat(layout) ? owned_.back().get() : nullptr;
      layouts_.push_back(input.layout);
      rows_.push_back(row);
      inputs_.push_back(input);
    }
  }

  Numerics numerics_;
  CudaAmp amp_;
  std::vector<Block> blocks_;
  std::vector<GroupScalars> scalars_;
  std::vector<CudaGroupInput> groups_;
  std::vector<Row> rows_;
  std::vector<RowInput> inputs_;
  std::vector<bool> serial_;
  std::vector<std::unique_ptr<StridedLayout>> owned_;
  std::vector<const StridedLayout*> layouts_;
};

void run_cases(const char* cases, const char* results) {
  Reader from(cases);
  Writer to(results);
  const int64_t count = from.integer();
  for (int64_t i = 0; i < count; ++i) Case(from).run(to);
}

// --- more elements than fit into 32 bits -----------------------------------------------------------------------------

// Zeros that take no memory until they are touched.
class Zeros {
 public:
  explicit Zeros(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::runtime_error("no address space");
  }
  Zeros(const Zeros&) = delete;
  ~Zeros() { munmap(data_, bytes_); }
  uint16_t* elements() const { return static_cast<uint16_t*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// Cuts a bfloat16 row of so many elements into tiles, and steps the last of them. The layout, if any, is of two
// dimensions, contiguous but for the gradient, which is transposed.
void check_many_elements(const StridedLayout* layout, int64_t numel) {
  constexpr uint16_t kOne = 0x3f80, kMinusHalf = 0xbf00;
  const Zeros p(2 * static_cast<size_t>(numel)), g(2 * static_cast<size_t>(numel)), b(2 * static_cast<size_t>(numel));
  const std::vector<Row> rows = {{p.elements(), b.elements(), numel, 0, Storage::bfloat16}};
  CudaTable table(rows, {false}, {layout}, Numerics::torch);
  const int64_t full = cuda_tile_elements(Storage::bfloat16);
  const auto& launch = table.launches().at(0);
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
  };
  require(table.launches().size() == 1 && launch.tiles == (numel + full - 1) / full, "tiles miscounted");
  std::vector<CudaTile> tiles(static_cast<size_t>(launch.tiles));
  std::memcpy(tiles.data(), table.bytes().data(), tiles.size() * sizeof(CudaTile));
  int64_t next = 0;
  for (const CudaTile& tile : tiles) {
    require(tile.piece * full == next, "a tile that does not follow the one before it");
    const int64_t offset = layout == nullptr ? next : 0;
    require(tile.param == p.elements() + offset && tile.momentum_buffer == b.elements() + offset, "a tile elsewhere");
    next += tile.count;
  }
  require(next == numel, "tiles that do not cover the row");

  const int64_t last = int64_t{tiles.back().piece} * full;
  for (int64_t i = last - 8; i < numel; ++i) {
    const int64_t at = layout == nullptr ? i : i / layout->sizes[1] + i % layout->sizes[1] * layout->sizes[0];
    g.elements()[at] = kOne;
  }
  const std::vector<RowInput> inputs = {{g.elements(), layout, Momentum::running}};
  const Hyperparameters of{0.5, 0.5, 0, 0, false, false};
  const std::vector<GroupScalars> scalars = {{of.in<float>(), of.in<double>()}};
  std::vector<char> parameters(static_cast<size_t>(launch.kernel.parameter_bytes));
  std::memcpy(parameters.data(), table.parameters(0, table.bytes().data(), inputs, scalars, {{{}, {}, true}}, {}),
              parameters.size());
  CudaHeader header;
  std::memcpy(&header, parameters.data(), sizeof(header));
  header.tiles = &tiles.back();
  header.tiles_in_launch = 1;
  header.block_tiles = tiles.back().count > kWarpTileElements;
  std::memcpy(parameters.data(), &header, sizeof(header));
  launch_sgd(launch.kernel, parameters.data(), 1, nullptr);
  for (int64_t i = last - 8; i < numel; ++i) {
    require(p.elements()[i] == (i < last ? 0 : kMinusHalf), "a parameter of the last tile");
    require(b.elements()[i] == (i < last ? 0 : kOne), "a momentum buffer of the last tile");
  }
}

void check_many_elements() {
  check_many_elements(nullptr, 5'000'000'001);
  check_many_elements(nullptr, 5'000'008'192);
  const StridedLayout transposed{{50'000, 100'000}, {{{100'000, 1}, {1, 50'000}, {100'000, 1}}}};
  check_many_elements(&transposed, 5'000'000'000);
}

// --- conversions -----------------------------------------------------------------------------------------------------

bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : bits_as<uint32_t>(a) == bits_as<uint32_t>(b); }

void require_rounded_as_by_the_processor(double x) {
  const float ours = to_opmath<float>(bits_as<uint64_t>(x));
  const float expected = static_cast<float>(x);
  if (same(ours, expected)) return;
  char text[200];
  std::snprintf(text, sizeof(text), "to_opmath<float> of %.17g (%a) is %.9g (%a), expected %.9g (%a)", x, x, ours, ours,
                expected, expected);
  throw std::runtime_error(text);
}

// x, and what lies next to it as a double, with both signs.
void check_around(double x) {
  for (const double sign : {1.0, -1.0}) {
    require_rounded_as_by_the_processor(sign * x);
    require_rounded_as_by_the_processor(sign * std::nextafter(x, 0.0));
    require_rounded_as_by_the_processor(sign * std::nextafter(x, std::numeric_limits<double>::infinity()));
  }
}

int64_t check_conversions(uint64_t seed) {
  using Float = std::numeric_limits<float>;
  int64_t checked = 0;
  const auto check = [&](double x) {
    check_around(x);
    ++checked;
  };
  for (const double x : {0.0, 1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN(),
                         std::numeric_limits<double>::signaling_NaN(), std::numeric_limits<double>::max(),
                         std::numeric_limits<double>::min(), std::numeric_limits<double>::denorm_min()})
    check(x);
  // Every power of two, and the middle between it and the float below.
  for (int exponent = -1074; exponent < 1024; ++exponent) {
    check(std::ldexp(1.0, exponent));
    check(std::ldexp(1.0 - std::ldexp(1.0, -25), exponent));
  }
  std::mt19937_64 random(seed);
  for (int i = 0; i < 1'000'000; ++i) {
    const uint64_t bits = random();
    check(bits_as<double>(bits));  // mostly zeros and infinities as floats
    // As many where a float has something to round: its subnormal and normal exponents, and a few beyond.
    const uint64_t exponent = 1023 - 155 + bits % (155 + 132);
    check(bits_as<double>((random() >> 12) | (exponent << 52)));
    // The middle of two neighbours: a tie.
    const float low = std::fabs(bits_as<float>(static_cast<uint32_t>(bits >> 32)));
    if (low < Float::max()) check((double{low} + double{std::nextafter(low, Float::infinity())}) / 2);
  }
  check(double{Float::max()});
  check(double{Float::max()} + std::ldexp(1.0, 103));  // the middle between the largest float and what is infinite
  check(double{Float::min()});
  check(double{Float::denorm_min()} / 2);
  return checked;
}

// A gradient's unscaling, against numbers wide enough to hold the product exactly.
void check_unscaling(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int i = 0; i < 100'000; ++i) {
    const auto scale = bits_as<float>(static_cast<uint32_t>(random()) & 0x7fffffffu);
    const auto g = bits_as<float>(static_cast<uint32_t>(random()));
    const float inverse = reciprocal(scale);
    // As torch.amp.GradScaler does it: in double, then rounded.
    if (!same(inverse, static_cast<float>(1 / double{scale}))) throw std::runtime_error("reciprocal");
    const auto product = static_cast<float>(double{g} * double{inverse});
    if (!same(unscaled<float, Numerics::torch>(g, inverse), product)) throw std::runtime_error("unscaled<float>");
    if (!same(unscaled<BFloat16, Numerics::opmath>(g, inverse), product))
      throw std::runtime_error("unscaled<BFloat16, opmath>");
    if (!same(unscaled<Float16, Numerics::torch>(g, inverse), rounded<Float16>(product)))
      throw std::runtime_error("unscaled<Float16, torch>");
  }
}

}  // namespace
}  // namespace wd_fused

int main(int argc, char** argv) {
  try {
    if (argc == 3 && std::strcmp(argv[1], "--conversions") == 0) {
      const uint64_t seed = std::stoull(argv[2]);
      const int64_t checked = wd_fused::check_conversions(seed);
      wd_fused::check_unscaling(seed);
      std::printf("%lld numbers and their neighbours converted\n", static_cast<long long>(checked));
      return 0;
    }
    if (argc == 2 && std::strcmp(argv[1], "--many-elements") == 0) {
      wd_fused::check_many_elements();
      std::printf("5 billion elements cut into tiles\n");
      return 0;
    }
    if (argc == 3) {
      wd_fused::run_cases(argv[1], argv[2]);
      return 0;
    }
    std::fprintf(stderr, "usage: run_cases CASES RESULTS | run_cases --conversions SEED | run_cases --many-elements\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_cases: %s\n", error.what());
  }
  return 1;
}
