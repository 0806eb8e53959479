// A thread as a translated kernel sees it, and what the executor does for it. Included by translated kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace simulated_gpu {

struct Block;  // block.h

// Generic addresses of what is not global memory. No program's memory lies so low.
inline constexpr uint64_t kSharedWindow = uint64_t(1) << 32;
inline constexpr uint64_t kLocalWindow = uint64_t(2) << 32;
inline constexpr uint64_t kParameterWindow = uint64_t(3) << 32;
inline constexpr uint64_t kConstantWindow = uint64_t(4) << 32;
inline constexpr uint64_t kWindowsEnd = uint64_t(5) << 32;

struct Thread {
  Block* block;
  uint32_t index;  // in its block
  uint32_t lane, warp;
  uint32_t tid[3], ntid[3], ctaid[3], nctaid[3];
  const unsigned char* parameters;
  uint32_t parameter_bytes;
  uint64_t epoch;        // block, thread and clock: who does what it does now; see block_races.h
  uint64_t garbage;      // what registers begin with
  unsigned char* local;  // as many bytes as the kernel has
  uint64_t* counts;      // executed instructions by opcode, where they are counted
  uint32_t random;       // for what is undefined
};

// What a kernel's library tells of it.
struct KernelTable {
  void (*run)(Thread&);
  const char* const* sites;  // instructions that can fault: "line 12: ld.global.u32 …"
  uint32_t site_count;
  const char* const* opcodes;  // what counts are of
  uint32_t opcode_count;
  bool waits;  // for other threads
  uint32_t shared_bytes, shared_alignment, local_bytes, register_bytes;
  const unsigned char* constants;
  uint32_t constant_bytes;
};

enum class Ordering { weak, relaxed, acquire, release, acquire_release };
enum class Scope { block, device };

extern "C" {
// Each looks for what is wrong with the access; reads give the memory.
const void* simulated_gpu_read_global(Thread&, uint64_t address, uint32_t size, uint32_t site);
void simulated_gpu_write_global(Thread&, uint64_t address, const void* value, uint32_t size, uint32_t site);
const void* simulated_gpu_read_shared(Thread&, uint64_t address, uint32_t size, uint32_t site);
void simulated_gpu_write_shared(Thread&, uint64_t address, const void* value, uint32_t size, uint32_t site);
const void* simulated_gpu_read_generic(Thread&, uint64_t address, uint32_t size, uint32_t site);
void simulated_gpu_write_generic(Thread&, uint64_t address, const void* value, uint32_t size, uint32_t site);
const void* simulated_gpu_read_local(Thread&, uint64_t address, uint32_t size, uint32_t site);
void simulated_gpu_write_local(Thread&, uint64_t address, const void* value, uint32_t size, uint32_t site);
const void* simulated_gpu_read_const(Thread&, uint64_t address, uint32_t size, uint32_t site);
// Of which only some bytes are looked at.
const void* simulated_gpu_read_some(Thread&, uint64_t address, uint32_t size, uint32_t site, uint32_t mask);
// A strong operation, of any address: one that others may race with, and that can order.
void* simulated_gpu_strong(Thread&, uint64_t address, uint32_t size, uint32_t site, bool reads, bool writes, Ordering);
void simulated_gpu_fence(Thread&, bool is_sequential, Scope);

[[noreturn]] void simulated_gpu_fault(Thread&, uint32_t site, const char* what);
[[noreturn]] void simulated_gpu_fault_at(Thread&, uint32_t site, const char* what, uint64_t address);

void simulated_gpu_barrier(Thread&, uint32_t barrier, uint32_t threads, uint32_t site, bool waits);
// Of what threads give, how many are true.
uint32_t simulated_gpu_barrier_count(Thread&, uint32_t barrier, uint32_t threads, uint32_t site, bool value);
// Waits for all lanes of the mask; what each gives is then in the result, by lane.
const uint64_t* simulated_gpu_meet(Thread&, uint32_t mask, uint64_t value, uint32_t site);
void simulated_gpu_warp_barrier(Thread&, uint32_t mask, uint32_t site);
}

template <class T>
inline T read_parameter(Thread& thread, uint64_t offset, uint32_t size, uint32_t site, unsigned at) {
  if (__builtin_expect(offset > thread.parameter_bytes || thread.parameter_bytes - offset < size || offset % size, 0))
    simulated_gpu_fault_at(thread, site, "parameters out of bounds or misaligned", offset);
  T value;
  std::memcpy(&value, thread.parameters + offset + at * sizeof(T), sizeof value);
  return value;
}
template <class T>
inline T get(const void* memory, unsigned at) {
  T value;
  std::memcpy(&value, static_cast<const T*>(memory) + at, sizeof value);
  return value;
}
template <class T>
inline void put(void* memory, unsigned at, T value) {
  std::memcpy(static_cast<T*>(memory) + at, &value, sizeof value);
}

// --- atomics: old value, operand, third operand

template <class T>
inline T atomic_inc(T old, T most) {
  return old >= most ? T(0) : T(old + 1);
}
template <class T>
inline T atomic_dec(T old, T most) {
  return old == 0 || old > most ? most : T(old - 1);
}
template <class T>
inline T atomic_exchange(T, T value) {
  return value;
}
template <class T>
inline T atomic_compare(T old, T expected, T value) {
  return old == expected ? value : old;
}

// --- lanes

inline uint32_t lane_mask(const Thread& thread, int kind) {
  const uint32_t own = 1u << thread.lane;
  switch (kind) {
    case 0:
      return own;
    case 1:
      return own - 1;
    case 2:
      return own | (own - 1);
    case 3:
      return ~(own | (own - 1));
    default:
      return ~(own - 1);
  }
}

enum class Shuffle { up, down, butterfly, index };

// What a lane that is not in the mask would give is undefined.
template <Shuffle kKind>
inline uint32_t shuffle(Thread& thread, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, uint32_t site,
                        bool& is_in_range) {
  const uint64_t* values = simulated_gpu_meet(thread, mask, value, site);
  const uint32_t lane = thread.lane, clamp = c & 31, segment = c >> 8 & 31;
  b &= 31;
  const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  uint32_t from = lane;
  switch (kKind) {
    case Shuffle::up:
      from = lane - b;
      is_in_range = int32_t(from) >= int32_t(last);
      break;
    case Shuffle::down:
      from = lane + b;
      is_in_range = from <= last;
      break;
    case Shuffle::butterfly:
      from = lane ^ b;
      is_in_range = from <= last;
      break;
    default:
      from = first | (b & ~segment);
      is_in_range = from <= last;
  }
  if (!is_in_range) from = lane;
  return mask >> from & 1 ? uint32_t(values[from]) : thread.random;
}

template <class T, class Function>
inline T reduce(Thread& thread, T value, uint32_t mask, uint32_t site, Function function) {
  const uint64_t* values = simulated_gpu_meet(thread, mask, uint64_t(value), site);
  T result{};
  bool is_first = true;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    result = is_first ? T(values[lane]) : function(result, T(values[lane]));
    is_first = false;
  }
  return result;
}
inline uint32_t ballot(Thread& thread, bool value, uint32_t mask, uint32_t site) {
  const uint64_t* values = simulated_gpu_meet(thread, mask, value, site);
  uint32_t result = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) result |= (mask >> lane & 1 && values[lane] ? 1u : 0u) << lane;
  return result;
}
template <class T>
inline uint32_t match_any(Thread& thread, T value, uint32_t mask, uint32_t site) {
  const uint64_t* values = simulated_gpu_meet(thread, mask, value, site);
  uint32_t result = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) result |= (mask >> lane & 1 && T(values[lane]) == value ? 1u : 0u) << lane;
  return result;
}

}  // namespace simulated_gpu
