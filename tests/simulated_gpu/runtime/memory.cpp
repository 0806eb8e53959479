#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <shared_mutex>
#include <stdexcept>

#include "errors.h"

namespace simulated_gpu {

std::ptrdiff_t alias_distance = 0;

namespace {

constexpr std::uint64_t kArena = std::uint64_t{16} << 40;  // of addresses; what is not touched costs nothing
constexpr std::uint64_t kPage = 4096;
constexpr std::size_t kGarbage = std::size_t{4} << 20;  // of fresh memory, at most; the rest is zero

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return otherwise;
  char* end = nullptr;
  const std::uint64_t number = std::strtoull(value, &end, 10);
  if (*end != '\0' || number == 0)
    throw std::runtime_error(std::string(name) + " is '" + value + "': give a whole number above 0");
  return number;
}

struct Entry {
  Allocation allocation;
  bool registered = false;  // the program's own memory: nothing to give back
  std::uint64_t device_writes = 0;
};

class Memory {
 public:
  static Memory& get() {
    static auto* instance = new Memory;
    return *instance;
  }

  Entry* find(std::uint64_t address) {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    auto next = entries_.upper_bound(address);
    if (next == entries_.begin()) return nullptr;
    Entry* entry = std::prev(next)->second;
    return address < entry->allocation.end ? entry : nullptr;
  }

  const Allocation* allocate(int device, std::size_t bytes) {
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    std::size_t& used = used_.at(device);
    if (bytes > total_memory() - used)
      fail(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes on cuda:" + std::to_string(device) +
                                          ", of whose " + std::to_string(total_memory()) + " are used " +
                                          std::to_string(used));
    // A gap behind each, so that what runs over an end is in nobody's memory; aligned as CUDA promises and no better.
    const std::uint64_t begin = next_ + 512 * (next_id_ % 8);
    next_ = (begin + bytes + 2 * kPage - 1) / kPage * kPage + kPage;
    if (next_ > arena_ + kArena) fail(cudaErrorMemoryAllocation, "the simulated GPU has used all its addresses");
    used += bytes;
    return add({{begin, begin + bytes, device, false, next_id_++}});
  }

  const Allocation* allocate_pinned(std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes of pinned memory");
    const auto begin = reinterpret_cast<std::uint64_t>(memory);
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    return add({{begin, begin + bytes, -1, false, next_id_++}});
  }

  const Allocation* register_pinned(void* memory, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uint64_t>(memory);
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    for (auto at = entries_.begin(); at != entries_.end();) {  // what was registered here before is another buffer
      const Allocation& other = at->second->allocation;
      const bool overlaps = other.begin < begin + bytes && begin < other.end;
      if (overlaps && !other.freed) fail(cudaErrorHostMemoryAlreadyRegistered);
      at = overlaps ? entries_.erase(at) : std::next(at);
    }
    return add({{begin, begin + bytes, -1, false, next_id_++}, true});
  }

  void release(const Allocation* allocation) {
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    Entry* entry = entries_.at(allocation->begin);
    entry->allocation.freed = true;
    const std::uint64_t bytes = allocation->end - allocation->begin;
    if (allocation->device >= 0) {
      used_.at(allocation->device) -= bytes;
      const std::uint64_t first = allocation->begin / kPage * kPage;  // whole pages: allocations share none
      const std::uint64_t last = (allocation->end + kPage - 1) / kPage * kPage;
      madvise(alias_of(first), last - first, MADV_REMOVE);
    } else if (!entry->registered) {
      // Kept as an address that nobody can touch, so that it is not used twice.
      mmap(reinterpret_cast<void*>(allocation->begin), bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    }
  }

  bool in_arena(std::uint64_t address) const { return arena_ <= address && address < arena_ + kArena; }

  std::size_t used(int device) {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    return used_.at(device);
  }

 private:
  Memory() : used_(static_cast<std::size_t>(device_count())) {
    const int file = memfd_create("simulated_gpu", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, kArena) != 0) throw std::runtime_error("no memory file for the simulated GPU");
    void* seen = mmap(nullptr, kArena, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    void* alias = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    close(file);
    if (seen == MAP_FAILED || alias == MAP_FAILED) throw std::runtime_error("no addresses for the simulated GPU");
    madvise(alias, kArena, MADV_DONTDUMP);
    arena_ = reinterpret_cast<std::uint64_t>(seen);
    next_ = arena_ + (std::uint64_t{1} << 21);
    alias_distance = static_cast<char*>(alias) - static_cast<char*>(seen);
  }

  const Allocation* add(Entry entry) {
    auto* kept = new Entry(entry);  // for ever: kernel.h says so
    entries_[entry.allocation.begin] = kept;
    return &kept->allocation;
  }

  std::shared_mutex mutex_;
  std::map<std::uint64_t, Entry*> entries_;  // by the first address
  std::vector<std::size_t> used_;
  std::uint64_t arena_ = 0, next_ = 0, next_id_ = 1;
};

}  // namespace

int device_count() {
  static const int count = static_cast<int>(from_environment("SIMULATED_GPU_DEVICES", 2));
  return count;
}

std::size_t total_memory() {
  static const std::size_t bytes = from_environment("SIMULATED_GPU_MEMORY", std::uint64_t{80} << 30);
  return bytes;
}

std::size_t used_memory(int device) { return Memory::get().used(device); }

const Allocation* find_allocation(std::uint64_t address) {
  const Entry* entry = Memory::get().find(address);
  return entry == nullptr ? nullptr : &entry->allocation;
}

const Allocation* allocate(int device, std::size_t bytes) {
  const Allocation* allocation = Memory::get().allocate(device, bytes);
  fill_with_garbage(allocation->begin, std::min(bytes, kGarbage));
  return allocation;
}

const Allocation* allocate_pinned(std::size_t bytes) {
  const Allocation* allocation = Memory::get().allocate_pinned(bytes);
  fill_with_garbage(allocation->begin, std::min(bytes, kGarbage));
  return allocation;
}

const Allocation* register_pinned(void* memory, std::size_t bytes) {
  return Memory::get().register_pinned(memory, bytes);
}

void release(const Allocation* allocation) { Memory::get().release(allocation); }

bool is_device_address(std::uint64_t address) { return Memory::get().in_arena(address); }

void* host_view(std::uint64_t address) {
  return is_device_address(address) ? alias_of(address) : reinterpret_cast<void*>(address);
}

void fill_with_garbage(std::uint64_t address, std::size_t bytes) {
  // A NaN as float32, bfloat16 and float16; 1e307 as float64; far outside as an index.
  auto* words = static_cast<unsigned char*>(host_view(address));
  std::uint32_t pattern = 0x7fc5e3a1u ^ (static_cast<std::uint32_t>(address >> 9) & 0xffu);
  std::size_t at = 0;
  for (; at + 4 <= bytes; at += 4) std::memcpy(words + at, &pattern, 4);
  std::memcpy(words + at, &pattern, bytes - at);
}

void require_alive(const std::string& who, std::uint64_t begin, std::uint64_t end, int device) {
  const Allocation* allocation = find_allocation(begin);
  const auto wrong = [&](const char* what) { throw Fault{who + " touches " + describe(begin, end) + what}; };
  if (allocation == nullptr) wrong(", which nobody allocated");
  if (allocation->freed) wrong(", which was freed before it ran");
  if (end > allocation->end) wrong(", beyond its end");
  if (device >= 0 && allocation->device >= 0 && allocation->device != device) wrong(", of another device");
}

std::string describe(std::uint64_t begin, std::uint64_t end) {
  const Allocation* allocation = find_allocation(begin);
  char text[256];
  if (allocation == nullptr) {
    std::snprintf(text, sizeof text, "bytes 0x%llx to 0x%llx", static_cast<unsigned long long>(begin),
                  static_cast<unsigned long long>(end));
    return text;
  }
  const std::string where = allocation->device < 0 ? "pinned" : "on cuda:" + std::to_string(allocation->device);
  std::snprintf(text, sizeof text, "bytes %llu to %llu of allocation %llu (%llu bytes %s at 0x%llx)",
                static_cast<unsigned long long>(begin - allocation->begin),
                static_cast<unsigned long long>(end - allocation->begin),
                static_cast<unsigned long long>(allocation->id),
                static_cast<unsigned long long>(allocation->end - allocation->begin), where.c_str(),
                static_cast<unsigned long long>(allocation->begin));
  return text;
}

std::uint64_t device_writes(std::uint64_t address) {
  const Entry* entry = Memory::get().find(address);
  return entry == nullptr ? 0 : entry->device_writes;
}

void note_device_write(std::uint64_t address) {
  Entry* entry = Memory::get().find(address);
  if (entry != nullptr && entry->allocation.device < 0) ++entry->device_writes;
}

}  // namespace simulated_gpu
