// What translated kernels call for each access: who may touch what, with whom it races, and where the bytes are.
#include <cstdio>

#include "block.h"

namespace simulated_gpu {

static std::string hex(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(address));
  return text;
}

static std::string described(const Allocation& allocation) {
  return std::to_string(allocation.end - allocation.begin) + " bytes at " + hex(allocation.begin) +
         (allocation.device < 0 ? " of pinned host memory" : " of device " + std::to_string(allocation.device));
}

// Why an access is one that a GPU would not do.
static std::string why_not(const Thread& thread, uint64_t address, uint32_t size, const Allocation* allocation) {
  const std::string what = std::to_string(size) + " bytes at " + hex(address);
  if (allocation == nullptr) {
    for (uint64_t back = 1; back <= 65536 && back <= address; back *= 2)
      if (const Allocation* near = find_allocation(address - back); near != nullptr)
        return what + ": " + std::to_string(address - near->end) + " bytes beyond the end of " + described(*near);
    return what + ": no memory of a GPU is there";
  }
  if (allocation->freed) return what + ": in " + described(*allocation) + ", which have been freed";
  if (allocation->device >= 0 && allocation->device != thread.block->run.launch.device)
    return what + ": in " + described(*allocation) + ", and the kernel runs on device " +
           std::to_string(thread.block->run.launch.device);
  return what + ": across the end of " + described(*allocation);
}

static Region& find_region(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  Run& run = thread.block->run;
  auto found = run.regions.upper_bound(address);
  if (found != run.regions.begin()) {
    Region& region = *std::prev(found)->second;
    if (address - region.begin < region.bytes && region.bytes - (address - region.begin) >= size) return region;
  }
  const Allocation* allocation = find_allocation(address);
  if (allocation == nullptr || allocation->freed || allocation->end - address < size ||
      (allocation->device >= 0 && allocation->device != run.launch.device))
    fail(thread, site, why_not(thread, address, size, allocation));
  auto region = std::make_unique<Region>();
  region->begin = allocation->begin;
  region->bytes = allocation->end - allocation->begin;
  region->base = allocation->begin >> Shadow::kPageBits << Shadow::kPageBits;
  region->memory = static_cast<unsigned char*>(allocation->device < 0 ? reinterpret_cast<void*>(allocation->begin)
                                                                      : alias_of(allocation->begin));
  region->shadow = Shadow(allocation->end - region->base);
  return *(run.regions[region->begin] = std::move(region));
}

static inline void align(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  if (__builtin_expect(address & (size - 1), 0))
    fail(thread, site,
         std::to_string(size) + " bytes at " + hex(address) + ": not a multiple of " + std::to_string(size));
}

// The region of an address, by way of the one that this instruction touched last.
static inline Region& region_of(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  align(thread, address, size, site);
  Region*& last = thread.block->run.of_site[site];
  if (__builtin_expect(
          last == nullptr || address - last->begin >= last->bytes || last->bytes - (address - last->begin) < size, 0))
    last = &find_region(thread, address, size, site);
  return *last;
}

static inline void check_shared(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  align(thread, address, size, site);
  const uint64_t bytes = thread.block->shared.size();
  if (__builtin_expect(address >= bytes || bytes - address < size, 0))
    fail(thread, site,
         std::to_string(size) + " bytes at " + hex(address) + " of the " + std::to_string(bytes) + " of shared memory");
}

[[noreturn]] static void race(const Thread& thread, uint32_t site, bool writes, uint64_t address, const char* space,
                              const Conflict& conflict) {
  const Block& block = *thread.block;
  Thread other = thread;
  const Dim& grid = block.run.launch.grid;
  const uint64_t index = block.run.block_order[block_of(conflict.other)];
  other.ctaid[0] = uint32_t(index % grid.x), other.ctaid[1] = uint32_t(index / grid.x % grid.y);
  other.ctaid[2] = uint32_t(index / grid.x / grid.y);
  const auto& tid = block.threads[thread_of(conflict.other)].tid;
  const auto triple = [](const uint32_t (&at)[3]) {
    return "(" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")";
  };
  fail(thread, site,
       std::string("a race: ") + (writes ? "writes " : "reads ") + hex(address) + " of " + space +
           " memory, which block " + triple(other.ctaid) + ", thread " + triple(tid) +
           (conflict.other_writes ? " wrote" : " read") + (conflict.is_strong ? " by an atomic" : "") +
           ", and nothing orders the two",
       true);
}

template <class Function>
static inline void watched(Thread& thread, uint32_t site, bool writes, uint64_t address, const char* space,
                           Function function) {
  try {
    function();
  } catch (const Conflict& conflict) {
    race(thread, site, writes, address, space, conflict);
  }
}

static uint64_t window_of(uint64_t address) { return address < kWindowsEnd ? address >> 32 << 32 : 0; }

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

const void* simulated_gpu_read_global(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  Region& region = region_of(thread, address, size, site);
  watched(thread, site, false, address, "global", [&] {
    region.shadow.read(address - region.base, size, thread.epoch, thread.block->knowledge[thread.index]);
  });
  return region.memory + (address - region.begin);
}

void simulated_gpu_write_global(Thread& thread, uint64_t address, const void* value, uint32_t size, uint32_t site) {
  Region& region = region_of(thread, address, size, site);
  unsigned char* memory = region.memory + (address - region.begin);
  watched(thread, site, true, address, "global", [&] {
    region.shadow.write(address - region.base, size, thread.epoch, thread.block->knowledge[thread.index], memory,
                        value);
  });
  std::memcpy(memory, value, size);
}

const void* simulated_gpu_read_shared(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  check_shared(thread, address, size, site);
  watched(thread, site, false, address, "shared", [&] {
    thread.block->shared_shadow.read(address, size, thread.epoch, thread.block->knowledge[thread.index]);
  });
  return thread.block->shared.data() + address;
}

void simulated_gpu_write_shared(Thread& thread, uint64_t address, const void* value, uint32_t size, uint32_t site) {
  check_shared(thread, address, size, site);
  Block& block = *thread.block;
  unsigned char* memory = block.shared.data() + address;
  watched(thread, site, true, address, "shared", [&] {
    block.shared_shadow.write(address, size, thread.epoch, block.knowledge[thread.index], memory, value);
  });
  std::memcpy(memory, value, size);
}

const void* simulated_gpu_read_local(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  align(thread, address, size, site);
  const uint64_t bytes = thread.block->run.code.table->local_bytes;
  if (address >= bytes || bytes - address < size)
    fail(thread, site,
         std::to_string(size) + " bytes at " + hex(address) + " of the " + std::to_string(bytes) + " of local memory");
  return thread.local + address;
}

void simulated_gpu_write_local(Thread& thread, uint64_t address, const void* value, uint32_t size, uint32_t site) {
  simulated_gpu_read_local(thread, address, size, site);
  std::memcpy(thread.local + address, value, size);
}

const void* simulated_gpu_read_const(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  align(thread, address, size, site);
  const KernelTable& table = *thread.block->run.code.table;
  if (address >= table.constant_bytes || table.constant_bytes - address < size)
    fail(thread, site, std::to_string(size) + " bytes at " + hex(address) + " of constant memory");
  return table.constants + address;
}

const void* simulated_gpu_read_generic(Thread& thread, uint64_t address, uint32_t size, uint32_t site) {
  switch (window_of(address)) {
    case kSharedWindow:
      return simulated_gpu_read_shared(thread, address - kSharedWindow, size, site);
    case kLocalWindow:
      return simulated_gpu_read_local(thread, address - kLocalWindow, size, site);
    case kConstantWindow:
      return simulated_gpu_read_const(thread, address - kConstantWindow, size, site);
    case kParameterWindow:
      read_parameter<unsigned char>(thread, address - kParameterWindow, size, site, 0);
      return thread.parameters + (address - kParameterWindow);
    default:
      return simulated_gpu_read_global(thread, address, size, site);
  }
}

void simulated_gpu_write_generic(Thread& thread, uint64_t address, const void* value, uint32_t size, uint32_t site) {
  switch (window_of(address)) {
    case kSharedWindow:
      return simulated_gpu_write_shared(thread, address - kSharedWindow, value, size, site);
    case kLocalWindow:
      return simulated_gpu_write_local(thread, address - kLocalWindow, value, size, site);
    case kConstantWindow:
    case kParameterWindow:
      fail(thread, site, "writes " + hex(address) + ", which is constant");
    default:
      return simulated_gpu_write_global(thread, address, value, size, site);
  }
}

const void* simulated_gpu_read_some(Thread& thread, uint64_t address, uint32_t size, uint32_t site, uint32_t mask) {
  const bool is_shared = window_of(address) == kSharedWindow;
  const void* memory = nullptr;
  if (is_shared) {
    check_shared(thread, address - kSharedWindow, size, site);
    memory = thread.block->shared.data() + (address - kSharedWindow);
  } else {
    const Region& region = region_of(thread, address, size, site);
    memory = region.memory + (address - region.begin);
  }
  for (uint32_t at = 0; at < size;) {
    const uint32_t step = at % 4 == 0 && (mask >> at & 15) == 15 ? 4 : 1;
    if (mask >> at & 1) simulated_gpu_read_generic(thread, address + at, step, site);
    at += step;
  }
  return memory;
}

void* simulated_gpu_strong(Thread& thread, uint64_t address, uint32_t size, uint32_t site, bool reads, bool writes,
                           Ordering ordering) {
  Knowledge& knowledge = thread.block->knowledge[thread.index];
  if (window_of(address) == kSharedWindow) {
    address -= kSharedWindow;
    check_shared(thread, address, size, site);
    watched(thread, site, writes, address, "shared", [&] {
      thread.block->shared_shadow.strong(address, size, thread.epoch, knowledge, reads, writes, ordering);
    });
    return thread.block->shared.data() + address;
  }
  if (window_of(address) != 0) fail(thread, site, "an atomic at " + hex(address) + ", which is not global or shared");
  Region& region = region_of(thread, address, size, site);
  watched(thread, site, writes, address, "global",
          [&] { region.shadow.strong(address - region.base, size, thread.epoch, knowledge, reads, writes, ordering); });
  return region.memory + (address - region.begin);
}

void simulated_gpu_fence(Thread& thread, bool is_sequential, Scope scope) {
  if (scope == Scope::device) fence(thread.epoch, thread.block->knowledge[thread.index], is_sequential);
}
}
