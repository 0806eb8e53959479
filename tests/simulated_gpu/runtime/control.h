// What tests and torch's operators ask of the simulated GPU beside CUDA's own functions. Callable from C++ and, by
// ctypes, from Python. A stream is a cudaStream_t, 0 the default stream of `device`; functions that return int return a
// cudaError_t.
#pragma once

#include <cstddef>
#include <cstdint>

#include "streams.h"

extern "C" {

struct SimulatedGpuRange {  // bytes of device or pinned memory, at the addresses that programs see
  std::uint64_t begin, end;
  int writes;
};

// An entry of the stream's queue or, while it is captured, a node of its graph, run at every replay. `run` is called
// without any lock; what it returns, unless null, is a malloc'ed text that becomes a fault. `destroy` is called once
// nobody can run it again. The ranges must be alive when it runs.
int simulated_gpu_enqueue(void* stream, int device, const char* name, const char* (*run)(void*), void (*destroy)(void*),
                          void* data, const SimulatedGpuRange* ranges, std::size_t count);
std::ptrdiff_t simulated_gpu_alias_distance();

// What is put into the stream's queue after a hold runs only once it is released, or somebody waits for it: the host
// runs ahead. Queries and chance do not end it.
int simulated_gpu_hold(void* stream, int device);
int simulated_gpu_release(void* stream, int device);

// torch's allocator gives these bytes to a new tensor on this stream: from here on that is where they are used. Fills
// them with garbage, and finds who still uses them elsewhere. Does nothing in a capture.
int simulated_gpu_allocated(void* stream, int device, std::uint64_t address, std::uint64_t bytes);

int simulated_gpu_drain();                // ends holds, runs all that is queued; the sticky error, if there is one
void simulated_gpu_reset();               // after a fault: drops what is queued and captured, clears the error
const char* simulated_gpu_take_faults();  // texts of faults and races since the last call; "" if none
void simulated_gpu_set_seed(std::uint64_t seed);
std::uint64_t simulated_gpu_seed();

// Of what was put into queues so far, by replays of graphs too: 0 kernels, 1 copies, 2 memsets, 3 waits of the host, 4
// operators of torch, 5 allocations, 6 launches of graphs.
void simulated_gpu_counters(std::uint64_t* counters);
const char* simulated_gpu_kernels_run();  // likewise, since the last call: mangled names, one a line
// What has run since the last call, in its order, one a line: queue, tab, name. Recorded once it is switched on.
void simulated_gpu_record(int on);
const char* simulated_gpu_ran();

// With 0, cudaFree() and cudaFreeHost() do not wait for the device, as CUDA's in fact do without promising it: memory
// freed under a queued kernel is then a fault.
void simulated_gpu_free_waits(int waits);
int simulated_gpu_has_context(int device);
// Returned by `times` calls to come that launch a kernel or ask about one, once `after` others of them have passed.
void simulated_gpu_fail_kernel(int error, int after, int times);
// Of launches from now on only the blocks from this one on are run: the end of a tensor that takes too long as a whole.
void simulated_gpu_first_block(std::uint64_t block);
std::uint64_t simulated_gpu_hash(const void* data, std::size_t bytes);  // FNV-1a, which names a cubin's PTX file

}  // extern "C"

namespace simulated_gpu {

void note_queued(const Work& work);
void note_wait();
void note_allocation();
void note_graph_launch();
void note_run(const Queue& queue, const Work& work);
bool free_waits();

}  // namespace simulated_gpu
