// sgd_cuda.h without a GPU: a launch runs the very kernel, a thread at a time, on memory of the host. Linked instead of
// sgd_cuda.cu, into run_cases.cpp's program and into a test build of the extension module.
#include "cuda_on_cpu.h"

// After the stand-in for CUDA.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "block_on_cpu.h"
#include "cuda/options_cuda.cuh"
#include "cuda/sgd_cuda.cuh"
#include "cuda/sgd_cuda.h"

namespace wd_fused {
namespace {

// 0, 1, 2, ... count - 1 in the order asked for. 101 is prime and above the number of warps and threads in question,
// but for many blocks: those that it divides are run backwards.
int in_order(int i, int count) {
  switch (cuda_on_cpu::order) {
    case cuda_on_cpu::Order::backwards:
      return count - 1 - i;
    case cuda_on_cpu::Order::scattered:
      return count % 101 == 0 ? count - 1 - i : static_cast<int>(int64_t{i} * 101 % count);
    default:
      return i;
  }
}

using Kernel = void (*)(const void* parameters, int blocks);

template <class Storages, Numerics kNumerics, int kBytes>
void run(const void* parameters, int blocks) {
  // A launch has copied the parameters before it returns; whatever is written to them later must not matter.
  const auto copied = std::make_unique<CudaParameters<kBytes>>();
  std::memcpy(copied.get(), parameters, kBytes);
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < kCudaThreads; ++t) {
      blockIdx.x = static_cast<unsigned>(in_order(b, blocks));
      threadIdx.x = static_cast<unsigned>(in_order(t, kCudaThreads));
      sgd_kernel<Storages, kNumerics, kBytes>(*copied);
    }
}

// Blocks in the order asked for; of each, threads in that order, by turns where they wait for each other.
template <int kBytes, class Call>
void run_blocks(const void* parameters, int blocks, const Call& call) {
  const auto copied = std::make_unique<CudaTailParameters<kBytes>>();
  std::memcpy(copied.get(), parameters, kBytes);
  gridDim.x = static_cast<unsigned>(blocks);
  const std::function<void()> kernel = [&] { call(*copied); };
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(in_order(b, blocks));
    cuda_on_cpu::Block::of_this_thread(kCudaThreads).run(kernel, [](int i) { return in_order(i, kCudaThreads); });
  }
}
template <class Rows, int kBytes>
void run_tail(const void* parameters, int blocks) {
  run_blocks<kBytes>(parameters, blocks, [](const CudaTailParameters<kBytes>& all) { tail_kernel<Rows, kBytes>(all); });
}
template <int kBytes>
void run_norm(const void* parameters, int blocks) {
  run_blocks<kBytes>(parameters, blocks, [](const CudaTailParameters<kBytes>& all) { norm_kernel<kBytes>(all); });
}
template <class Rows>
Kernel tail_by_size(const CudaKernel& kernel) {
  return kernel.parameter_bytes == kLargeParameters ? &run_tail<Rows, kLargeParameters>
                                                    : &run_tail<Rows, kSmallParameters>;
}

template <class Storages, Numerics kNumerics>
Kernel by_size(const CudaKernel& kernel) {
  return kernel.parameter_bytes == kLargeParameters ? &run<Storages, kNumerics, kLargeParameters>
                                                    : &run<Storages, kNumerics, kSmallParameters>;
}

template <class Storages>
Kernel by_numerics(const CudaKernel& kernel) {
  return kernel.numerics == Numerics::torch ? by_size<Storages, Numerics::torch>(kernel)
                                            : by_size<Storages, Numerics::opmath>(kernel);
}

Kernel kernel_of(const CudaKernel& kernel) {
  if (kernel.kind == KernelKind::norm)
    return kernel.parameter_bytes == kLargeParameters ? &run_norm<kLargeParameters> : &run_norm<kSmallParameters>;
  if (kernel.kind == KernelKind::tail) {
    if (kernel.tail_rows == TailRows::float32) return tail_by_size<FloatRows>(kernel);
    if (kernel.tail_rows == TailRows::opmath_float) return tail_by_size<OpmathFloatRows>(kernel);
    return tail_by_size<AnyRows>(kernel);
  }
  if (kernel.mixed) return by_numerics<Mixed>(kernel);
  switch (kernel.storage) {
    case Storage::float32:
      return by_size<Only<float>, Numerics::torch>(kernel);
    case Storage::float64:
      return by_size<Only<double>, Numerics::torch>(kernel);
    case Storage::float16:
      return by_numerics<Only<Float16>>(kernel);
    default:
      return by_numerics<Only<BFloat16>>(kernel);
  }
}

void require(bool holds, const CudaKernel& kernel, const char* what) {
  if (!holds) throw std::runtime_error(name_of(kernel) + " was launched wrongly: " + what);
}

// What the kernel takes for granted about its parameters. A GPU would read and write elsewhere, and not always tell.
void require_sound(const CudaKernel& kernel, const void* parameters, int blocks) {
  CudaHeader header;
  std::memcpy(&header, parameters, sizeof(header));
  const auto* words = static_cast<const char*>(parameters) + sizeof(header);
  const int64_t room = (kernel.parameter_bytes - int64_t{sizeof(header)}) / int64_t{sizeof(uint64_t)};
  const int warp_tiles = header.tiles_in_launch - header.block_tiles;
  require(reinterpret_cast<uintptr_t>(header.tiles) % alignof(CudaTile) == 0, kernel, "tiles off 16 bytes");
  require(header.block_tiles >= 0 && warp_tiles >= 0, kernel, "tiles miscounted");
  require(blocks > 0 && blocks == header.block_tiles + (warp_tiles + kCudaWarps - 1) / kCudaWarps, kernel,
          "blocks miscounted");
  for (int i = 0; i < header.tiles_in_launch; ++i) {
    const CudaTile& tile = header.tiles[i];
    require(tile.row >= 0 && tile.row < header.rows, kernel, "a tile of no row");
    const int64_t group_at = header.rows + int64_t{tile.group} * kWordsOfGroup;
    require(group_at + kWordsOfGroup <= room, kernel, "a tile of no group");
    uint64_t gradient;
    std::memcpy(&gradient, words + static_cast<size_t>(tile.row) * sizeof(gradient), sizeof(gradient));
    if (gradient == 0) continue;
    CudaGroup group;
    std::memcpy(&group, words + static_cast<size_t>(group_at) * sizeof(uint64_t), sizeof(group));
    require(kernel.mixed || group.storage == kernel.storage, kernel, "a group of another storage");
    require(tile.count > 0 && tile.count <= cuda_tile_elements(group.storage), kernel, "a tile empty or too large");
    require(i < header.block_tiles || tile.count <= kWarpTileElements, kernel, "a warp's tile too large");
    require(!group.has_momentum || tile.momentum_buffer != nullptr, kernel, "a row without its momentum buffer");
  }
}

void require_sound_tail(const CudaKernel& kernel, const void* parameters, int blocks) {
  CudaTailHeader header;
  std::memcpy(&header, parameters, sizeof(header));
  const auto* words = static_cast<const char*>(parameters) + sizeof(header);
  const int64_t room = (kernel.parameter_bytes - int64_t{sizeof(header)}) / int64_t{sizeof(uint64_t)};
  const int warp_tiles = header.tiles_in_launch - header.block_tiles;
  const int of_block = kernel.kind == KernelKind::norm ? header.tiles_of_norm_block : 1;
  const int expected = (header.block_tiles + of_block - 1) / of_block + (warp_tiles + kCudaWarps - 1) / kCudaWarps;
  require(reinterpret_cast<uintptr_t>(header.tiles) % alignof(CudaTailTile) == 0, kernel, "tiles off 16 bytes");
  require(header.block_tiles >= 0 && warp_tiles >= 0 && of_block > 0, kernel, "tiles miscounted");
  require(blocks > 0 && blocks == expected, kernel, "blocks miscounted");
  require(header.norm_state->blocks_done == 0, kernel, "the last norm is not finished");
  for (int i = 0; i < header.tiles_in_launch; ++i) {
    const CudaTailTile& tile = header.tiles[i];
    require(tile.row >= 0 && tile.row < header.rows, kernel, "a tile of no row");
    const int64_t group_at = header.rows + int64_t{tile.group} * kWordsOfTailGroup;
    require(group_at + kWordsOfTailGroup <= room, kernel, "a tile of no group");
    require(tile.count > 0 && tile.count <= kTailTileElements, kernel, "a tile empty or too large");
    require(i < header.block_tiles || tile.count <= kWarpTileElements, kernel, "a warp's tile too large");
    uint64_t word;
    std::memcpy(&word, words + static_cast<size_t>(tile.row) * sizeof(word), sizeof(word));
    if (word == 0) continue;
    CudaTailGroup group;
    std::memcpy(&group, words + static_cast<size_t>(group_at) * sizeof(uint64_t), sizeof(group));
    require(group.sgd.storage == tile.storage, kernel, "a group of another storage");
    const bool is_averaged = (word & kIsAveraged) != 0;
    require(!is_averaged || (word == kIsAveraged && tile.average != nullptr), kernel, "a row with nothing to do");
    const bool has_momentum = !is_averaged && group.sgd.has_momentum;
    require(!has_momentum || tile.momentum_buffer != nullptr, kernel, "a row without its momentum buffer");
    require(!has_momentum || tile.momentum != Storage::int8 || tile.momentum_scale != nullptr, kernel,
            "a row without its scales");
    require(tile.weights == Weights::parameter || tile.extra != nullptr, kernel, "a row without its master weight");
    const auto gradient = static_cast<Storage>(word >> kGradientStorageBits & 3);
    const bool in_float32 = tile.storage == Storage::float32 && tile.momentum == Storage::float32 &&
                            tile.weights == Weights::parameter && (is_averaged || gradient == Storage::float32);
    if (kernel.kind == KernelKind::norm || kernel.tail_rows == TailRows::any) continue;
    require(tile.storage != Storage::float64, kernel, "a row in float64");
    require(kernel.tail_rows != TailRows::float32 || in_float32, kernel, "a row that is not all float32");
  }
}

}  // namespace

void launch_sgd(const CudaKernel& kernel, const void* parameters, int blocks, void*) {
  if (std::exchange(cuda_on_cpu::fails_once, false))
    throw std::runtime_error("CUDA error in the launch of " + name_of(kernel));
  (kernel.kind == KernelKind::sgd ? require_sound : require_sound_tail)(kernel, parameters, blocks);
  kernel_of(kernel)(parameters, blocks);
}

void load_kernel(const CudaKernel&) {}

bool is_capturing(void*) { return cuda_on_cpu::is_capturing; }

void* make_upload_stream() {
  static char stream;
  return &stream;
}

void copy_to_device_and_wait(void* to, const void* from, size_t bytes, void*) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

std::string why_not_cuda(int) { return cuda_on_cpu::why_not_cuda; }

}  // namespace wd_fused

// For a test in Python, by ctypes, of a module that this is linked into.
extern "C" {
__attribute__((visibility("default"))) void cuda_on_cpu_set_capturing(int capturing) {
  cuda_on_cpu::is_capturing = capturing != 0;
}
__attribute__((visibility("default"))) void cuda_on_cpu_fail_once() { cuda_on_cpu::fails_once = true; }
__attribute__((visibility("default"))) void cuda_on_cpu_set_why_not(const char* reason) {
  cuda_on_cpu::why_not_cuda = reason;
}
}
