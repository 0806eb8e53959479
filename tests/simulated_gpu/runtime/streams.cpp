#include "streams.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <random>

#include "control.h"
#include "devices.h"
#include "graphs.h"
#include "memory.h"
#include "races.h"

namespace simulated_gpu {
namespace {

std::uint64_t first_seed() {
  const char* given = std::getenv("SIMULATED_GPU_SEED");
  return given != nullptr && *given != '\0' ? std::strtoull(given, nullptr, 10) : std::random_device()();
}

// In vectors, in the order of their making, so that what the seed draws does not depend on addresses.
struct Streams {
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<std::shared_ptr<Stream>> defaults;  // by device
  std::vector<std::shared_ptr<Queue>> queues;     // of streams, of graphs' branches, and of streams gone with work left
  Clock host;                                     // what the host has waited for
  std::thread::id running;                        // the thread in which an entry runs now
  std::string running_name;                       // that entry
  std::condition_variable ran;
  std::uint64_t seed = first_seed(), host_functions = 0, created = 0;
  std::mt19937_64 random{seed};
};
Streams& state() {
  static auto* instance = new Streams;
  return *instance;
}

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (std::size_t lane = 0; lane < other.size(); ++lane) clock[lane] = std::max(clock[lane], other[lane]);
}

std::uint64_t checksum_of(const Work& work) {
  const auto* bytes = static_cast<const unsigned char*>(host_view(work.pinned_source));
  std::uint64_t sum = 0xcbf29ce484222325ull, word = 0;
  std::uint64_t at = 0;
  for (; at + 8 <= work.pinned_bytes; at += 8) {
    std::memcpy(&word, bytes + at, 8);
    sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
    sum ^= sum >> 29;
  }
  for (; at < work.pinned_bytes; ++at) sum = (sum ^ bytes[at]) * 0x100000001b3ull;
  return sum;
}

void check_pinned_source(const Queue& queue, const Entry& entry) {
  const Work& work = *entry.work;
  if (work.pinned_bytes == 0 || entry.device_writes != device_writes(work.pinned_source) ||
      entry.host_functions != state().host_functions)
    return;  // written by other entries since, as it may be
  require_alive(work.name, work.pinned_source, work.pinned_source + work.pinned_bytes, -1);
  if (checksum_of(work) == entry.checksum) return;
  throw Fault{work.name + " on " + queue.name + " reads " +
                  describe(work.pinned_source, work.pinned_source + work.pinned_bytes) +
                  ", which the host wrote again between the call and the copy",
              true};
}

// The queue whose head has to run for the point to be passed, found through what stands in its way.
std::shared_ptr<Queue> next_towards(const Point& point) {
  std::shared_ptr<Queue> queue = point.queue;
  for (;;) {
    const Entry& head = queue->entries.front();
    if (head.work->held != nullptr) *head.work->held = false;
    std::vector<const Point*> unmet;
    for (const Point& before : head.after)
      if (!has_passed(before)) unmet.push_back(&before);
    if (unmet.empty()) return queue;
    queue = unmet[draw() % unmet.size()]->queue;
  }
}

std::shared_ptr<Queue> any_that_may_run() {
  std::vector<std::shared_ptr<Queue>> may;
  for (const auto& queue : state().queues) {
    if (queue->entries.empty()) continue;
    const Entry& head = queue->entries.front();
    if (head.work->held != nullptr && *head.work->held) continue;
    if (std::all_of(head.after.begin(), head.after.end(), has_passed)) may.push_back(queue);
  }
  return may.empty() ? nullptr : may[draw() % may.size()];
}

bool runs_elsewhere() { return state().running != std::thread::id() && state().running != std::this_thread::get_id(); }

void forbid_in_host_functions() {
  if (state().running == std::this_thread::get_id())
    fail(cudaErrorNotPermitted,
         "a function that an entry of a queue runs waits for the device: " + state().running_name);
}

void run_head(Lock& lock, const std::shared_ptr<Queue>& queue) {
  Streams& s = state();
  auto entry = std::make_shared<Entry>(queue->entries.front());  // others look at what is there meanwhile
  if (entry->work->run && !has_fault()) {
    s.running = std::this_thread::get_id();
    s.running_name = entry->work->name + " on " + queue->name;
    if (entry->work->kind == Kind::host) ++s.host_functions;
    note_run(*queue, *entry->work);
    lock.unlock();
    try {
      check_pinned_source(*queue, *entry);
      const std::vector<Touched> touched = entry->work->run();
      look_for_races(*queue, *entry, touched);
      for (const Touched& range : touched)
        if (range.writes) note_device_write(range.begin);
    } catch (const Fault& fault) {
      set_fault(fault);
    } catch (const CudaError& error) {
      set_fault({entry->work->name + ": " + error.text});
    } catch (const std::exception& error) {
      set_fault({entry->work->name + " on " + queue->name + ": " + error.what()});
    }
    lock.lock();
    s.running = {};
  }
  queue->entries.pop_front();
  ++queue->done;
  s.ran.notify_all();
  destroy_later(std::move(entry));
}

}  // namespace

std::shared_ptr<Queue> make_queue(int device, std::string name) {
  // The lane of a queue that is gone is used again, or clocks would grow with every graph; it goes on counting.
  auto& queues = state().queues;
  auto found = std::find_if(queues.begin(), queues.end(),
                            [](const auto& queue) { return queue.use_count() == 1 && queue->entries.empty(); });
  if (found == queues.end()) {
    found = queues.insert(found, std::make_shared<Queue>());
    (*found)->lane = static_cast<std::uint32_t>(queues.size() - 1);
    (*found)->clock = std::make_shared<Clock>();
  }
  (*found)->device = device;
  (*found)->name = std::move(name);
  return *found;
}

std::shared_ptr<Stream> default_stream(int device) {
  auto& defaults = state().defaults;
  if (defaults.empty()) defaults.resize(static_cast<std::size_t>(device_count()));
  auto& stream = defaults.at(device);
  if (stream == nullptr) {
    stream = std::make_shared<Stream>();
    stream->device = device;
    stream->legacy = true;
    stream->queue = make_queue(device, "the default stream of cuda:" + std::to_string(device));
  }
  return stream;
}

cudaStream_t make_stream(int device, unsigned flags, int priority) {
  if (flags != cudaStreamDefault && flags != cudaStreamNonBlocking) fail(cudaErrorInvalidValue);
  auto stream = std::make_shared<Stream>();
  stream->device = device;
  stream->flags = flags;
  stream->priority = std::clamp(priority, kHighestPriority, 0);
  stream->queue =
      make_queue(device, "stream " + std::to_string(++state().created) + " of cuda:" + std::to_string(device));
  state().streams.push_back(stream);
  return reinterpret_cast<cudaStream_t>(stream.get());
}

void destroy_stream(cudaStream_t handle) {
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream->legacy) fail(cudaErrorInvalidResourceHandle, "the default stream cannot be destroyed");
  if (stream->capture != nullptr) leave_capture(*stream);
  auto& streams = state().streams;
  streams.erase(std::find(streams.begin(), streams.end(), stream));
}

std::shared_ptr<Stream> find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream(current_device());
  if (handle == cudaStreamPerThread) fail(cudaErrorNotSupported, "the per-thread default stream is not simulated");
  for (const auto& stream : state().streams)
    if (reinterpret_cast<cudaStream_t>(stream.get()) == handle) return stream;
  fail(cudaErrorInvalidResourceHandle, "a stream that there is not");
}

std::vector<std::shared_ptr<Stream>> all_streams() {
  std::vector<std::shared_ptr<Stream>> all;
  for (const auto& stream : state().defaults)
    if (stream != nullptr) all.push_back(stream);
  all.insert(all.end(), state().streams.begin(), state().streams.end());
  return all;
}

bool has_passed(const Point& point) { return point.queue == nullptr || point.queue->done >= point.number; }

Point end_of(const std::shared_ptr<Queue>& queue) { return {queue, queue->enqueued, queue->clock}; }

Point enqueue(const std::shared_ptr<Queue>& queue, std::shared_ptr<const Work> work, std::vector<Point> after) {
  static const auto* nothing = new std::shared_ptr<const Work>(std::make_shared<Work>());
  if (work == nullptr) work = *nothing;
  auto clock = std::make_shared<Clock>(*queue->clock);
  join(*clock, state().host);
  for (const Point& point : after)
    if (point.clock != nullptr) join(*clock, *point.clock);
  if (clock->size() <= queue->lane) clock->resize(queue->lane + 1);
  (*clock)[queue->lane] = static_cast<std::uint32_t>(++queue->enqueued);
  queue->clock = clock;
  after.erase(std::remove_if(after.begin(), after.end(), has_passed), after.end());
  Entry entry{std::move(work), std::move(after), clock, queue->enqueued};
  if (entry.work->pinned_bytes != 0) {
    entry.checksum = checksum_of(*entry.work);
    entry.device_writes = device_writes(entry.work->pinned_source);
    entry.host_functions = state().host_functions;
  }
  queue->entries.push_back(std::move(entry));
  return end_of(queue);
}

Point enqueue_in_stream(const Stream& stream, std::shared_ptr<const Work> work, std::vector<Point> after) {
  if (stream.legacy) {
    for (const auto& other : all_streams())
      if (!other->legacy && other->device == stream.device && other->blocking()) after.push_back(end_of(other->queue));
  } else if (stream.blocking()) {
    after.push_back(end_of(default_stream(stream.device)->queue));
  }
  return enqueue(stream.queue, std::move(work), std::move(after));
}

Point end_of_stream(const Stream& stream) {
  return stream.legacy ? enqueue_in_stream(stream, nullptr) : end_of(stream.queue);
}

void submit(Lock& lock, const std::shared_ptr<Stream>& stream, Work work) {
  if (stream->capture != nullptr) {
    add_to_capture(*stream, std::make_shared<Work>(std::move(work)));
    return;
  }
  forbid_implicit_capture(*stream);
  note_queued(work);
  enqueue_in_stream(*stream, std::make_shared<Work>(std::move(work)));
  run_at_random(lock);
}

void wait_for(Lock& lock, const Point& point) {
  forbid_in_host_functions();
  while (!has_passed(point)) {
    if (runs_elsewhere()) {
      state().ran.wait(lock);
      continue;
    }
    const std::shared_ptr<Queue> other = draw() % 4 == 0 ? any_that_may_run() : nullptr;
    run_head(lock, other != nullptr ? other : next_towards(point));
  }
  if (point.clock != nullptr) join(state().host, *point.clock);
}

void wait_for_device(Lock& lock, int device) {
  const std::vector<std::shared_ptr<Queue>> queues = state().queues;
  for (const auto& queue : queues)
    if (queue->device == device) wait_for(lock, end_of(queue));
}

bool query(Lock& lock, const Point& point) {
  if (!has_passed(point) && !runs_elsewhere() && state().running == std::thread::id() && draw() % 2 == 0) {
    const std::shared_ptr<Queue> queue = any_that_may_run();
    if (queue != nullptr) run_head(lock, queue);
  }
  if (!has_passed(point)) return false;
  if (point.clock != nullptr) join(state().host, *point.clock);
  return true;
}

void run_all(Lock& lock) {
  forbid_in_host_functions();
  for (const auto& queue : state().queues) release_holds(*queue);
  for (;;) {
    if (runs_elsewhere()) {
      state().ran.wait(lock);
      continue;
    }
    const std::shared_ptr<Queue> queue = any_that_may_run();
    if (queue == nullptr) return;
    run_head(lock, queue);
  }
}

void run_at_random(Lock& lock) {
  if (state().running != std::thread::id() || draw() % 8 != 0) return;
  for (std::uint64_t entries = 1 + draw() % 4; entries > 0 && state().running == std::thread::id(); --entries) {
    const std::shared_ptr<Queue> queue = any_that_may_run();
    if (queue == nullptr) return;
    run_head(lock, queue);
  }
}

void release_holds(Queue& queue) {
  for (const Entry& entry : queue.entries)
    if (entry.work->held != nullptr) *entry.work->held = false;
}

void drop_all_queued(Lock& lock) {
  while (runs_elsewhere()) state().ran.wait(lock);
  for (const auto& queue : state().queues) {
    queue->done = queue->enqueued;
    for (Entry& entry : queue->entries) destroy_later(std::make_shared<Entry>(std::move(entry)));
    queue->entries.clear();
  }
}

std::uint64_t draw() { return state().random(); }
std::uint64_t seed() { return state().seed; }
void set_seed(std::uint64_t seed) {
  state().seed = seed;
  state().random.seed(seed);
}

}  // namespace simulated_gpu
