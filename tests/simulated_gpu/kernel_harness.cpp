// Kernels without a device: memory that is only host memory, and one function that launches. For kernel_support.py.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "runtime/kernel.h"

namespace simulated_gpu {

std::ptrdiff_t alias_distance = 0;
static std::map<std::uint64_t, Allocation> allocations;

const Allocation* find_allocation(std::uint64_t address) {
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) return nullptr;
  --found;
  return address < found->second.end ? &found->second : nullptr;
}

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

std::uint64_t harness_allocate(std::uint64_t bytes, int device) {
  const auto address = reinterpret_cast<std::uint64_t>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096));
  std::memset(reinterpret_cast<void*>(address), 0xcd, bytes);
  allocations[address] = {address, address + bytes, device, false, allocations.size()};
  return address;
}
void harness_free(std::uint64_t address) { allocations.at(address).freed = true; }

// "" or a fault; "race: " before one.
const char* harness_run(const char* ptx, const char* name, const unsigned* shape, unsigned shared,
                        const void* parameters, int device, std::uint64_t seed, Touched* touched,
                        unsigned* touched_count) {
  static std::string result;
  Launch launch;
  launch.grid = {shape[0], shape[1], shape[2]};
  launch.block = {shape[3], shape[4], shape[5]};
  launch.dynamic_shared_bytes = shared;
  launch.parameters = parameters;
  launch.device = device;
  launch.seed = seed;
  try {
    const auto ranges = run_kernel(load_kernel(ptx, name), launch);
    for (std::size_t i = 0; i < ranges.size() && i < *touched_count; ++i) touched[i] = ranges[i];
    *touched_count = static_cast<unsigned>(ranges.size());
    result.clear();
  } catch (const Fault& fault) {
    result = (fault.is_race ? "race: " : "") + fault.text;
  } catch (const std::exception& error) {
    result = std::string("error: ") + error.what();
  }
  return result.c_str();
}
unsigned harness_parameter_bytes(const char* ptx, const char* name) {
  return facts_of(load_kernel(ptx, name)).parameter_bytes;
}
const char* harness_counts() {
  static std::string counts;
  counts = counts_as_json();
  return counts.c_str();
}
}
