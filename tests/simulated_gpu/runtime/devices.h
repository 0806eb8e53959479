// The devices, as programs ask for them: an H100 each, and which of them the calling thread uses.
#pragma once

#include <cuda_runtime_api.h>

#include "memory.h"

namespace simulated_gpu {

constexpr int kHighestPriority = -5;
constexpr int kDriverVersion = CUDART_VERSION;
constexpr std::size_t kSharedPerBlock = 49152, kSharedPerBlockOptIn = 232448, kSharedPerProcessor = 233472;
constexpr int kThreadsPerBlock = 1024, kThreadsPerProcessor = 2048, kBlocksPerProcessor = 32, kProcessors = 132;

int current_device();  // of this thread; does not make a context
void set_current_device(int device);
void check_device(int device);

// A context is made by the first call that needs one, and is then the calling thread's.
void make_context(int device);
void need_context(int device);
bool has_context(int device);
bool thread_has_context();

}  // namespace simulated_gpu
