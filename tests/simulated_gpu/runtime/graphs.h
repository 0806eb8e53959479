// Captures, graphs, and graphs ready to be launched.
#pragma once

#include "streams.h"

namespace simulated_gpu {

struct Node {
  std::shared_ptr<const Work> work;
  std::vector<Node*> after;  // made before this one
};

struct UserObject {  // a reference that a graph holds; the destructor calls back
  void* object;
  cudaHostFn_t destroy;
  ~UserObject() { destroy(object); }
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<std::shared_ptr<UserObject>> objects;
};

struct Capture {
  std::uint64_t id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::shared_ptr<Stream> origin;
  std::shared_ptr<Graph> graph;
  bool invalid = false, ended = false;
};

// A graph made ready: each node in a lane, a queue of its own, in which it follows one that it comes after.
struct GraphExec {
  struct Step {
    std::shared_ptr<const Work> work;
    std::size_t lane;
    std::vector<std::size_t> after;  // steps in other lanes
  };
  std::vector<Step> steps;
  std::vector<std::shared_ptr<Queue>> lanes;
  std::vector<std::shared_ptr<UserObject>> objects;
  Point last;  // the end of the last launch: launches of one graph follow each other
};

void begin_capture(const std::shared_ptr<Stream>& stream, cudaStreamCaptureMode mode);
std::shared_ptr<Graph> end_capture(const std::shared_ptr<Stream>& stream);
void leave_capture(Stream& stream);  // a stream of a capture is destroyed
void end_all_captures();             // between tests
cudaStreamCaptureMode exchange_thread_mode(cudaStreamCaptureMode mode);

void invalidate(Capture& capture);
void require_capturing(Stream& stream);  // throws where its capture is broken
void add_to_capture(Stream& stream, std::shared_ptr<const Work> work);
void join_capture(Stream& stream, const std::shared_ptr<Capture>& capture, const std::vector<Node*>& nodes);

// What CUDA forbids while something is captured; each breaks the captures concerned and throws.
void forbid_in_capture(const char* function);  // calls that may wait or allocate, by mode and thread
// Of blocking streams, for all of which the default stream would wait.
std::vector<std::shared_ptr<Capture>> implicit_captures(const Stream& stream);
void forbid_implicit_capture(const Stream& stream);  // the default stream, while a blocking stream is captured
void forbid_waiting_for_captures(int device);        // waiting for a device some of whose streams are captured
void forbid_waiting(Stream& stream);                 // waiting for a captured stream, or asking how far it is
bool is_anything_captured_here();                    // by this thread, and not in relaxed mode

std::shared_ptr<GraphExec> make_ready(const Graph& graph, int device);
void launch(Lock& lock, GraphExec& exec, const std::shared_ptr<Stream>& stream);

}  // namespace simulated_gpu
