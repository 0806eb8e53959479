// The limit of a GPU's memory: plain kernels that read and write what a step of SGD with momentum does, and compute
// next to nothing. Compiled and called by roofline.py, which tries them all and keeps the fastest.
//
// p and b are read and written back, g is read: p ^= g & mask, b ^= g & mask. mask is 0, which the compiler cannot
// know, so all of the memory is moved and none is changed; the values may be of any dtype, and may be those of a
// benchmark.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

enum class Hint { none, gradient, all };  // which accesses are marked as not to be used again

template <Hint kHint>
__device__ __forceinline__ uint4 read(const uint4* from) {
  return kHint == Hint::all ? __ldcs(from) : *from;
}
template <Hint kHint>
__device__ __forceinline__ uint4 read_gradient(const uint4* from) {
  return kHint == Hint::none ? *from : __ldcs(from);
}
template <Hint kHint>
__device__ __forceinline__ void write(uint4* to, uint4 value) {
  if (kHint == Hint::all)
    __stcs(to, value);
  else
    *to = value;
}

__device__ __forceinline__ uint4 mixed(uint4 value, uint4 g, uint32_t mask) {
  return make_uint4(value.x ^ (g.x & mask), value.y ^ (g.y & mask), value.z ^ (g.z & mask), value.w ^ (g.w & mask));
}

// One tile: kUnroll independent accesses of 16 bytes to each operand and thread. kFull: nothing of it lies past the
// end.
template <int kThreads, int kUnroll, Hint kHint, bool kFull>
__device__ __forceinline__ void tile16(uint4* p, const uint4* g, uint4* b, size_t first, size_t count, uint32_t mask) {
  uint4 p_units[kUnroll], g_units[kUnroll], b_units[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t at = first + u * kThreads;
    if (!kFull && at >= count) continue;
    g_units[u] = read_gradient<kHint>(g + at);
    p_units[u] = read<kHint>(p + at);
    b_units[u] = read<kHint>(b + at);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t at = first + u * kThreads;
    if (!kFull && at >= count) continue;
    write<kHint>(p + at, mixed(p_units[u], g_units[u], mask));
    write<kHint>(b + at, mixed(b_units[u], g_units[u], mask));
  }
}

// As many blocks as there are tiles, or fewer that go on to another tile when they are done.
template <int kThreads, int kUnroll, Hint kHint>
__global__ void __launch_bounds__(kThreads) stream16(uint4* p, const uint4* g, uint4* b, size_t count, uint32_t mask) {
  constexpr size_t kTile = size_t{kThreads} * kUnroll;
  for (size_t tile = blockIdx.x * kTile; tile < count; tile += gridDim.x * kTile) {
    if (tile + kTile <= count)
      tile16<kThreads, kUnroll, kHint, true>(p, g, b, tile + threadIdx.x, count, mask);
    else
      tile16<kThreads, kUnroll, kHint, false>(p, g, b, tile + threadIdx.x, count, mask);
  }
}

// The same with accesses of 32 bytes, which compute capability 10.0 brought.
struct alignas(32) Wide {
  uint32_t words[8];
};

__device__ __forceinline__ Wide read_wide(const Wide* from) {
  Wide w;
#if __CUDA_ARCH__ >= 1000
  asm volatile("ld.global.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(w.words[0]), "=r"(w.words[1]), "=r"(w.words[2]), "=r"(w.words[3]), "=r"(w.words[4]),
                 "=r"(w.words[5]), "=r"(w.words[6]), "=r"(w.words[7])
               : "l"(__cvta_generic_to_global(from)));
#else
  w = *from;
#endif
  return w;
}

__device__ __forceinline__ void write_wide(Wide* to, const Wide& w) {
#if __CUDA_ARCH__ >= 1000
  asm volatile("st.global.v8.b32 [%8], {%0, %1, %2, %3, %4, %5, %6, %7};" ::"r"(w.words[0]), "r"(w.words[1]),
               "r"(w.words[2]), "r"(w.words[3]), "r"(w.words[4]), "r"(w.words[5]), "r"(w.words[6]), "r"(w.words[7]),
               "l"(__cvta_generic_to_global(to))
               : "memory");
#else
  *to = w;
#endif
}

template <int kThreads, int kUnroll, bool kFull>
__device__ __forceinline__ void tile32(Wide* p, const Wide* g, Wide* b, size_t first, size_t count, uint32_t mask) {
  Wide p_units[kUnroll], g_units[kUnroll], b_units[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t at = first + u * kThreads;
    if (!kFull && at >= count) continue;
    g_units[u] = read_wide(g + at);
    p_units[u] = read_wide(p + at);
    b_units[u] = read_wide(b + at);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t at = first + u * kThreads;
    if (!kFull && at >= count) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      p_units[u].words[i] ^= g_units[u].words[i] & mask;
      b_units[u].words[i] ^= g_units[u].words[i] & mask;
    }
    write_wide(p + at, p_units[u]);
    write_wide(b + at, b_units[u]);
  }
}

template <int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads) stream32(Wide* p, const Wide* g, Wide* b, size_t count, uint32_t mask) {
  constexpr size_t kTile = size_t{kThreads} * kUnroll;
  for (size_t tile = blockIdx.x * kTile; tile < count; tile += gridDim.x * kTile) {
    if (tile + kTile <= count)
      tile32<kThreads, kUnroll, true>(p, g, b, tile + threadIdx.x, count, mask);
    else
      tile32<kThreads, kUnroll, false>(p, g, b, tile + threadIdx.x, count, mask);
  }
}

struct Variant {
  const char* name;
  const void* kernel;
  int bytes;    // of an access
  int threads;  // of a block
  int unroll;
  bool stays;  // few blocks, each of which walks over tiles
};

#define STREAM16(threads, unroll, hint, stays)                                         \
  {"16 bytes, " #threads " threads x " #unroll ", streaming " #hint ", " stays##_name, \
   reinterpret_cast<const void*>(&stream16<threads, unroll, Hint::hint>),              \
   16,                                                                                 \
   threads,                                                                            \
   unroll,                                                                             \
   stays}
#define STREAM32(threads, unroll, stays)                          \
  {"32 bytes, " #threads " threads x " #unroll ", " stays##_name, \
   reinterpret_cast<const void*>(&stream32<threads, unroll>),     \
   32,                                                            \
   threads,                                                       \
   unroll,                                                        \
   stays}
#define ONCE_name "a block a tile"
#define STAYS_name "grid-stride"
constexpr bool ONCE = false;
constexpr bool STAYS = true;

const Variant kVariants[] = {
    STREAM16(256, 1, none, ONCE),     STREAM16(256, 2, none, ONCE),     STREAM16(256, 4, none, ONCE),
    STREAM16(512, 1, none, ONCE),     STREAM16(512, 2, none, ONCE),     STREAM16(512, 4, none, ONCE),
    STREAM16(256, 1, gradient, ONCE), STREAM16(256, 2, gradient, ONCE), STREAM16(256, 4, gradient, ONCE),
    STREAM16(256, 1, all, ONCE),      STREAM16(256, 2, all, ONCE),      STREAM16(256, 4, all, ONCE),
    STREAM16(512, 2, all, ONCE),      STREAM16(256, 1, none, STAYS),    STREAM16(256, 2, none, STAYS),
    STREAM16(256, 4, none, STAYS),    STREAM16(512, 2, none, STAYS),    STREAM16(256, 2, gradient, STAYS),
    STREAM16(256, 2, all, STAYS),     STREAM16(512, 4, all, STAYS),     STREAM32(256, 1, ONCE),
    STREAM32(256, 2, ONCE),           STREAM32(512, 1, ONCE),           STREAM32(256, 1, STAYS),
    STREAM32(256, 2, STAYS),
};
constexpr int kCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace

extern "C" {

int variants() { return kCount; }
const char* variant_name(int variant) { return kVariants[variant].name; }
int variant_bytes(int variant) { return kVariants[variant].bytes; }

// Streams `bytes` bytes of each operand, all aligned to 32 bytes, but for less than one access at the end; 0 or a
// cudaError_t.
int stream(int variant, void* p, const void* g, void* b, size_t bytes, uint32_t mask, void* cuda_stream) {
  const Variant& chosen = kVariants[variant];
  size_t count = bytes / static_cast<size_t>(chosen.bytes);
  if (count == 0) return 0;
  const size_t tile = static_cast<size_t>(chosen.threads) * static_cast<size_t>(chosen.unroll);
  size_t blocks = (count + tile - 1) / tile;
  if (chosen.stays) {
    int device = 0, processors = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, chosen.kernel, chosen.threads, 0);
    if (error != cudaSuccess) return error;
    const size_t at_once = static_cast<size_t>(processors) * static_cast<size_t>(resident);
    blocks = blocks < at_once ? blocks : at_once;
  }
  void* arguments[] = {&p, &g, &b, &count, &mask};
  return cudaLaunchKernel(chosen.kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(chosen.threads)), arguments, 0,
                          static_cast<cudaStream_t>(cuda_stream));
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
