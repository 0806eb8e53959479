// What translated kernels, the executor that runs them, and the device that launches them know of each other.
//
//   memory.h/.cpp    (device)    allocations: find_allocation()
//   executor.cpp     (kernels)   load_kernel(), run_kernel()
//   streams.cpp      (device)    calls run_kernel() when a launch's turn in its queue has come
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simulated_gpu {

// Device memory is mapped twice from one file: at the address that programs see, where every access by the host faults
// (PROT_NONE), and `alias_distance` bytes further on, where the simulator reads and writes it.
extern std::ptrdiff_t alias_distance;
inline void* alias_of(std::uint64_t address) { return reinterpret_cast<void*>(address + alias_distance); }

struct Allocation {
  std::uint64_t begin, end;  // addresses as programs see them
  int device;                // -1: pinned host memory, which every device may use, at its own address (no alias)
  bool freed;                // an address is never used twice
  std::uint64_t id;
};

// The allocation, alive or freed, that contains the address; null: none ever did. Valid until the process ends.
const Allocation* find_allocation(std::uint64_t address);

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Bytes that a kernel touched, merged; what races between streams are looked for in.
struct Touched {
  std::uint64_t begin, end;
  bool writes;
};

struct Fault {       // thrown by run_kernel(): becomes the sticky error of the context, as on a GPU
  std::string text;  // names kernel, block, thread, address and what is wrong
  bool is_race = false;
};

struct KernelCode;  // translated and loaded

struct KernelFacts {
  std::string name;  // mangled
  unsigned parameter_bytes = 0, static_shared_bytes = 0, local_bytes = 0;
  unsigned max_threads_per_block = 1024;
};
const KernelFacts& facts_of(const KernelCode&);

// The kernel of this mangled name in a PTX file, translated and compiled once for each state of PTX and translator,
// then taken from the cache. Throws std::runtime_error with the translator's or compiler's words.
const KernelCode& load_kernel(const std::string& ptx_path, const std::string& name);

struct Launch {
  Dim grid, block;
  unsigned dynamic_shared_bytes = 0;
  const void* parameters = nullptr;  // as the ABI packs them: parameter_bytes
  int device = 0;
  std::uint64_t seed = 0;  // of the order of blocks and threads, and of the garbage in registers and shared memory
};

// Runs all threads of the grid; returns what they touched in global memory. Throws Fault.
std::vector<Touched> run_kernel(const KernelCode&, const Launch&);

// Executed instructions of the last run_kernel() on this thread, by opcode as PTX spells it ("fma.rn.f32"), for one
// thread of the grid chosen by the caller or all of them; empty unless counting is on (SIMULATED_GPU_COUNT=1).
std::string counts_as_json();

}  // namespace simulated_gpu
