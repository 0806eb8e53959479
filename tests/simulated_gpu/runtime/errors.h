// CUDA's error codes: thrown inside the simulator, returned by its C functions. A fault of a kernel is sticky: every
// later call returns it.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"

namespace simulated_gpu {

struct CudaError {
  cudaError_t code;
  std::string text;  // what CUDA does not tell; becomes part of cudaGetErrorString()
};
[[noreturn]] void fail(cudaError_t code, std::string text = {});

// Everything that streams, events and graphs know is guarded by one mutex, held during each call of the interface. It
// is let go while an entry of a queue runs.
using Lock = std::unique_lock<std::mutex>;
Lock lock_state();

// What may hold the last reference to somebody's memory is destroyed only once the mutex is free: a tensor's end calls
// the allocator, which may call back.
void destroy_later(std::shared_ptr<const void> garbage);
void destroy_garbage();

// The sticky fault. Setting it prints it; only the first counts.
void set_fault(const Fault& fault);
bool has_fault();
void clear_fault();
std::string take_faults();  // the texts since the last call, one a paragraph

// Of the calling thread, as cudaGetLastError() tells it.
cudaError_t note_error(const CudaError& error);
cudaError_t last_error(bool clear);
void set_last_error(cudaError_t error);

enum class Sticky { returned, ignored };

// The body of every function of the interface: what it throws becomes its result.
template <Sticky sticky = Sticky::returned, class Body>
cudaError_t guarded(Body&& body) {
  cudaError_t result = cudaSuccess;
  {
    Lock lock = lock_state();
    try {
      if (sticky == Sticky::returned && has_fault()) fail(last_error(false));
      body(lock);
      if (sticky == Sticky::returned && has_fault()) fail(last_error(false));
    } catch (const CudaError& error) {
      result = note_error(error);
    } catch (const std::exception& error) {
      result = note_error({cudaErrorUnknown, error.what()});
    }
  }
  destroy_garbage();
  return result;
}

// What the generated stubs return. The driver's functions leave cudaGetLastError() alone.
int not_simulated(const char* function);
int driver_not_simulated(const char* function);

}  // namespace simulated_gpu
