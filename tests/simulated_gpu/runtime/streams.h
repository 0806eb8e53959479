// Streams: queues whose entries run as late as they may, in an order that the seed draws among those that CUDA allows.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "kernel.h"

namespace simulated_gpu {

struct Capture;
struct Event;
struct Node;
struct Queue;

// How much of each lane (a stream, or a branch of a graph) has happened before something: entry [lane] is a number of
// entries. What a clock does not cover is not ordered before, whatever the schedule was.
using Clock = std::vector<std::uint32_t>;

// A place in a queue, which may be waited for. Without a queue: a place already passed.
struct Point {
  std::shared_ptr<Queue> queue;
  std::uint64_t number = 0;  // passed once so many entries of the queue have run
  std::shared_ptr<const Clock> clock;
};

enum class Kind { mark, kernel, copy, memset, host, operation };

// What an entry of a queue does. A node of a graph has one too, which runs at every replay.
struct Work {
  Kind kind = Kind::mark;
  std::string name;
  std::string symbol;                                 // of kernels
  std::function<std::vector<Touched>()> run;          // empty: a mark
  std::uint64_t pinned_source = 0, pinned_bytes = 0;  // must not change between the call and the run
  std::shared_ptr<Event> records, waits_for;          // of marks in graphs
  std::shared_ptr<bool> held;                         // a sleep, while true: ends when released or waited for
};

struct Entry {
  std::shared_ptr<const Work> work;
  std::vector<Point> after;
  std::shared_ptr<const Clock> clock;
  std::uint64_t number = 0;
  std::uint64_t checksum = 0, device_writes = 0, host_functions = 0;  // of the pinned source, at the call
};

struct Queue {
  std::uint32_t lane = 0;
  int device = 0;
  std::string name;  // "stream 7 of cuda:0"
  std::deque<Entry> entries;
  std::uint64_t enqueued = 0, done = 0;
  std::shared_ptr<const Clock> clock;  // of the last entry
};

struct Stream {
  std::shared_ptr<Queue> queue;
  int device = 0, priority = 0;
  unsigned flags = 0;
  bool legacy = false;
  std::shared_ptr<Capture> capture;
  std::vector<Node*> leaves;  // of the capture: what the next node comes after

  bool blocking() const { return legacy || (flags & cudaStreamNonBlocking) == 0; }
};

std::shared_ptr<Queue> make_queue(int device, std::string name);

cudaStream_t make_stream(int device, unsigned flags, int priority);
void destroy_stream(cudaStream_t handle);
std::shared_ptr<Stream> find_stream(cudaStream_t handle);  // null: the current device's default stream
std::shared_ptr<Stream> default_stream(int device);
std::vector<std::shared_ptr<Stream>> all_streams();

// Work for a stream: into its queue, or into the graph that is being captured from it.
void submit(Lock& lock, const std::shared_ptr<Stream>& stream, Work work);
// Into the queue, whatever is captured; of a stream, with the rules of the default stream.
Point enqueue(const std::shared_ptr<Queue>& queue, std::shared_ptr<const Work> work, std::vector<Point> after = {});
Point enqueue_in_stream(const Stream& stream, std::shared_ptr<const Work> work, std::vector<Point> after = {});

Point end_of(const std::shared_ptr<Queue>& queue);
Point end_of_stream(const Stream& stream);  // with what the default stream waits for
bool has_passed(const Point& point);

// The host waits: runs what it must, and now and then something else. What was waited for, all of the host knows.
void wait_for(Lock& lock, const Point& point);
void wait_for_device(Lock& lock, int device);
bool query(Lock& lock, const Point& point);  // may let something run before it answers
void run_all(Lock& lock);                    // holds end
void release_holds(Queue& queue);
void run_at_random(Lock& lock);  // now and then, something

void drop_all_queued(Lock& lock);  // after a fault

std::uint64_t draw();  // from the seed
void set_seed(std::uint64_t seed);
std::uint64_t seed();

}  // namespace simulated_gpu
