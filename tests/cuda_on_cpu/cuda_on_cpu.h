// Stands for what sgd_cuda.cuh and options_cuda.cuh use of CUDA, so that a C++ compiler takes them: a kernel is a
// function that one thread of one block after another calls; where threads wait for each other, block_on_cpu.h runs
// them by turns. Included before those by sgd_cuda_on_cpu.cpp, and by nothing that ships.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
// Not forced: the kernels would then each have a copy of everything, and take minutes to compile with sanitizers.
#define __forceinline__ inline
// What the compiler of the GPU's code may take for granted is checked here.
#define __builtin_assume(condition) ((condition) ? static_cast<void>(0) : std::abort())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

template <class T>
inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
inline T __ldcg(const T* from) {
  return *from;
}
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

// All memory is device memory.
inline bool __isGlobal(const void*) { return true; }

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// No order of blocks and threads may matter.
enum class Order { forwards, backwards, scattered };

// For a test to set: in which order the next launches run, and what the device answers.
inline Order order = Order::forwards;
inline bool is_capturing = false;
inline bool fails_once = false;  // the next launch does
inline std::string why_not_cuda;

}  // namespace cuda_on_cpu

inline thread_local cuda_on_cpu::Index threadIdx;
inline thread_local cuda_on_cpu::Index blockIdx;
inline thread_local cuda_on_cpu::Index gridDim;

namespace cuda_on_cpu {

// In block_on_cpu.h.
void wait_for_block();
void wait_for_warp();
uint64_t value_of_lane(uint64_t mine, unsigned lane);

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp() { cuda_on_cpu::wait_for_warp(); }
inline void __threadfence() {}
template <class T>
inline T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  if (lanes != 0xffffffffu) std::abort();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = cuda_on_cpu::value_of_lane(bits, threadIdx.x % 32 ^ static_cast<unsigned>(distance));
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}
