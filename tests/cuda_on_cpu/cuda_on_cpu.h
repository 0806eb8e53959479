// Stands for what sgd_cuda.cuh uses of CUDA, so that a C++ compiler takes it: the kernel is a function that one thread
// of one block after another calls. Included before sgd_cuda.cuh by sgd_cuda_on_cpu.cpp, and by nothing that ships.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// Not forced: the kernels would then each have a copy of everything, and take minutes to compile with sanitizers.
#define __forceinline__ inline
// What the compiler of the GPU's code may take for granted is checked here.
#define __builtin_assume(condition) ((condition) ? static_cast<void>(0) : std::abort())

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

template <class T>
inline T __ldcs(const T* from) {
  return *from;
}

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
