#include "control.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <utility>

#include "devices.h"
#include "graphs.h"
#include "memory.h"
#include "races.h"

namespace simulated_gpu {
namespace {

struct Notes {
  std::array<std::uint64_t, 7> counters{};
  std::string kernels, ran;
  bool recording = false, free_waits = true;
};
Notes& notes() {
  static auto* instance = new Notes;
  return *instance;
}

// A string that a C function returns, valid until the thread's next call.
const char* keep(std::string text) {
  thread_local auto* kept = new std::string;
  *kept = std::move(text);
  return kept->c_str();
}

std::shared_ptr<Stream> stream_of(void* handle, int device) {
  check_device(device);
  need_context(device);
  return handle == nullptr ? default_stream(device) : find_stream(static_cast<cudaStream_t>(handle));
}

struct Operation {  // what simulated_gpu_enqueue() was given
  const char* (*run)(void*);
  void (*destroy)(void*);
  void* data;
  Operation(const char* (*run)(void*), void (*destroy)(void*), void* data) : run(run), destroy(destroy), data(data) {}
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
  ~Operation() {
    if (destroy != nullptr) destroy(data);
  }
};

}  // namespace

void note_queued(const Work& work) {
  static constexpr std::array<int, 6> counter_of{-1, 0, 1, 2, -1, 4};
  const int counter = counter_of[static_cast<std::size_t>(work.kind)];
  if (counter >= 0) ++notes().counters[static_cast<std::size_t>(counter)];
  if (work.kind == Kind::kernel) notes().kernels += work.symbol + "\n";
}
void note_wait() { ++notes().counters[3]; }
void note_allocation() { ++notes().counters[5]; }
void note_graph_launch() { ++notes().counters[6]; }
void note_run(const Queue& queue, const Work& work) {
  if (notes().recording && work.kind != Kind::mark) notes().ran += queue.name + "\t" + work.name + "\n";
}
bool free_waits() { return notes().free_waits; }

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

int simulated_gpu_enqueue(void* stream, int device, const char* name, const char* (*run)(void*), void (*destroy)(void*),
                          void* data, const SimulatedGpuRange* ranges, std::size_t count) {
  const auto operation = std::make_shared<Operation>(run, destroy, data);
  return guarded([&](Lock& lock) {
    Work work;
    work.kind = Kind::operation;
    work.name = name;
    std::vector<Touched> touched;
    for (std::size_t r = 0; r < count; ++r)
      if (ranges[r].begin < ranges[r].end) touched.push_back({ranges[r].begin, ranges[r].end, ranges[r].writes != 0});
    work.run = [operation, touched = std::move(touched), name = work.name] {
      for (const Touched& range : touched) require_alive(name, range.begin, range.end, -1);
      if (const char* text = operation->run(operation->data)) {
        Fault fault{name + ": " + text};
        std::free(const_cast<char*>(text));
        throw fault;
      }
      return touched;
    };
    submit(lock, stream_of(stream, device), std::move(work));
  });
}

std::ptrdiff_t simulated_gpu_alias_distance() {
  is_device_address(0);  // makes the arena
  return alias_distance;
}

int simulated_gpu_hold(void* stream, int device) {
  return guarded([&](Lock& lock) {
    const auto held = stream_of(stream, device);
    Work work;
    work.name = "hold";
    if (held->capture == nullptr) work.held = std::make_shared<bool>(true);  // a graph's replays are not held
    submit(lock, held, std::move(work));
  });
}
int simulated_gpu_release(void* stream, int device) {
  return guarded<Sticky::ignored>([&](Lock&) { release_holds(*stream_of(stream, device)->queue); });
}

int simulated_gpu_allocated(void* handle, int device, std::uint64_t address, std::uint64_t bytes) {
  return guarded([&](Lock& lock) {
    const auto stream = stream_of(handle, device);
    if (stream->capture != nullptr || bytes == 0) return;
    Work work;
    work.name = "allocation of a tensor of " + std::to_string(bytes) + " bytes";
    work.run = [address, bytes] {
      require_alive("allocation of a tensor", address, address + bytes, -1);
      fill_with_garbage(address, std::min<std::uint64_t>(bytes, 1 << 16));
      return std::vector<Touched>{{address, address + bytes, true}};
    };
    submit(lock, stream, std::move(work));
  });
}

int simulated_gpu_drain() {
  return guarded([&](Lock& lock) { run_all(lock); });
}
void simulated_gpu_reset() {
  guarded<Sticky::ignored>([&](Lock& lock) {
    end_all_captures();
    drop_all_queued(lock);
    forget_all_accesses();
    clear_fault();
  });
}
const char* simulated_gpu_take_faults() { return keep(take_faults()); }

void simulated_gpu_set_seed(std::uint64_t seed) {
  guarded<Sticky::ignored>([&](Lock&) { set_seed(seed); });
}
std::uint64_t simulated_gpu_seed() {
  std::uint64_t now = 0;
  guarded<Sticky::ignored>([&](Lock&) { now = seed(); });
  return now;
}

void simulated_gpu_counters(std::uint64_t* counters) {
  guarded<Sticky::ignored>([&](Lock&) { std::copy(notes().counters.begin(), notes().counters.end(), counters); });
}
const char* simulated_gpu_kernels_run() {
  std::string names;
  guarded<Sticky::ignored>([&](Lock&) { names = std::exchange(notes().kernels, {}); });
  return keep(names);
}
void simulated_gpu_record(int on) {
  guarded<Sticky::ignored>([&](Lock&) {
    notes().recording = on != 0;
    notes().ran.clear();
  });
}
const char* simulated_gpu_ran() {
  std::string lines;
  guarded<Sticky::ignored>([&](Lock&) { lines = std::exchange(notes().ran, {}); });
  return keep(lines);
}

void simulated_gpu_free_waits(int waits) {
  guarded<Sticky::ignored>([&](Lock&) { notes().free_waits = waits != 0; });
}
int simulated_gpu_has_context(int device) { return device >= 0 && device < device_count() && has_context(device); }

std::uint64_t simulated_gpu_hash(const void* data, std::size_t bytes) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (std::size_t at = 0; at < bytes; ++at)
    hash = (hash ^ static_cast<const unsigned char*>(data)[at]) * 0x100000001b3ull;
  return hash;
}

}  // extern "C"
