#include "graphs.h"

#include <algorithm>
#include <set>
#include <utility>

#include "control.h"
#include "events.h"

namespace simulated_gpu {
namespace {

std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* instance = new std::vector<std::shared_ptr<Capture>>;
  return *instance;
}
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

void merge(std::vector<Node*>& into, const std::vector<Node*>& nodes) {
  for (Node* node : nodes)
    if (std::find(into.begin(), into.end(), node) == into.end()) into.push_back(node);
}

std::set<const Node*> with_all_before(const std::vector<Node*>& nodes) {
  std::set<const Node*> seen;
  std::vector<const Node*> left(nodes.begin(), nodes.end());
  while (!left.empty()) {
    const Node* node = left.back();
    left.pop_back();
    if (seen.insert(node).second) left.insert(left.end(), node->after.begin(), node->after.end());
  }
  return seen;
}

void end(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  for (const auto& stream : all_streams()) {
    if (stream->capture != capture) continue;
    stream->capture = nullptr;
    stream->leaves.clear();
  }
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  destroy_later(capture->graph);
}

}  // namespace

void invalidate(Capture& capture) { capture.invalid = true; }

void require_capturing(Stream& stream) {
  if (stream.capture->invalid) fail(cudaErrorStreamCaptureInvalidated);
}

void begin_capture(const std::shared_ptr<Stream>& stream, cudaStreamCaptureMode mode) {
  if (stream->legacy) fail(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  if (stream->capture != nullptr) fail(cudaErrorIllegalState, stream->queue->name + " is being captured already");
  static std::uint64_t made = 0;
  stream->capture =
      std::make_shared<Capture>(Capture{++made, mode, std::this_thread::get_id(), stream, std::make_shared<Graph>()});
  stream->leaves.clear();
  captures().push_back(stream->capture);
}

std::shared_ptr<Graph> end_capture(const std::shared_ptr<Stream>& stream) {
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr) fail(cudaErrorIllegalState, stream->queue->name + " is not being captured");
  if (capture->origin != stream) {
    invalidate(*capture);
    fail(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    fail(cudaErrorStreamCaptureWrongThread);
  const std::set<const Node*> joined = with_all_before(stream->leaves);
  bool all_joined = true;
  for (const auto& other : all_streams())
    if (other->capture == capture)
      for (const Node* leaf : other->leaves) all_joined = all_joined && joined.count(leaf) != 0;
  end(capture);
  if (capture->invalid) fail(cudaErrorStreamCaptureInvalidated);
  if (!all_joined) fail(cudaErrorStreamCaptureUnjoined);
  return capture->graph;
}

void leave_capture(Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  invalidate(*capture);
  stream.capture = nullptr;
  stream.leaves.clear();
  if (capture->origin.get() == &stream) end(capture);
}

void end_all_captures() {
  while (!captures().empty()) end(std::shared_ptr<Capture>(captures().back()));
  thread_mode = cudaStreamCaptureModeGlobal;
}

cudaStreamCaptureMode exchange_thread_mode(cudaStreamCaptureMode mode) { return std::exchange(thread_mode, mode); }

void add_to_capture(Stream& stream, std::shared_ptr<const Work> work) {
  require_capturing(stream);
  auto& nodes = stream.capture->graph->nodes;
  nodes.push_back(std::make_unique<Node>(Node{std::move(work), stream.leaves}));
  stream.leaves = {nodes.back().get()};
}

void join_capture(Stream& stream, const std::shared_ptr<Capture>& capture, const std::vector<Node*>& nodes) {
  if (capture->ended) fail(cudaErrorCapturedEvent, "the capture in which the event was recorded has ended");
  if (stream.legacy) {
    invalidate(*capture);
    fail(cudaErrorStreamCaptureImplicit);
  }
  if (stream.capture != nullptr && stream.capture != capture) {
    invalidate(*capture);
    invalidate(*stream.capture);
    fail(cudaErrorStreamCaptureMerge);
  }
  if (capture->invalid) fail(cudaErrorStreamCaptureInvalidated);
  stream.capture = capture;
  merge(stream.leaves, nodes);
}

void forbid_in_capture(const char* function) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return;
  std::string broken;
  for (const auto& capture : captures()) {
    const bool here = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    const bool anywhere = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (!here && !anywhere) continue;
    invalidate(*capture);
    broken = capture->origin->queue->name;
  }
  if (!broken.empty())
    fail(cudaErrorStreamCaptureUnsupported, std::string(function) + " while " + broken + " is captured");
}

std::vector<std::shared_ptr<Capture>> implicit_captures(const Stream& stream) {
  std::vector<std::shared_ptr<Capture>> found;
  if (!stream.legacy) return found;
  for (const auto& other : all_streams())
    if (other->capture != nullptr && other->blocking() && other->device == stream.device)
      found.push_back(other->capture);
  return found;
}

void forbid_implicit_capture(const Stream& stream) {
  const auto found = implicit_captures(stream);
  for (const auto& capture : found) invalidate(*capture);
  if (!found.empty()) fail(cudaErrorStreamCaptureImplicit);
}

void forbid_waiting_for_captures(int device) {
  bool any = false;
  for (const auto& stream : all_streams()) {
    if (stream->capture == nullptr || stream->device != device) continue;
    invalidate(*stream->capture);
    any = true;
  }
  if (any) fail(cudaErrorStreamCaptureUnsupported, "waiting for a device, a stream of which is captured");
}

void forbid_waiting(Stream& stream) {
  forbid_implicit_capture(stream);
  if (stream.capture == nullptr) return;
  invalidate(*stream.capture);
  fail(cudaErrorStreamCaptureUnsupported, "waiting for " + stream.queue->name + ", which is captured");
}

bool is_anything_captured_here() {
  return thread_mode != cudaStreamCaptureModeRelaxed &&
         std::any_of(captures().begin(), captures().end(), [](const auto& capture) {
           return capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
         });
}

std::shared_ptr<GraphExec> make_ready(const Graph& graph, int device) {
  static std::uint64_t made = 0;
  const std::string name = "graph " + std::to_string(++made);
  auto exec = std::make_shared<GraphExec>();
  exec->objects = graph.objects;
  std::vector<const Node*> last_of_lane;
  for (const auto& node : graph.nodes) {
    GraphExec::Step step{node->work, last_of_lane.size(), {}};
    for (const Node* before : node->after) {
      const auto lane = std::find(last_of_lane.begin(), last_of_lane.end(), before);
      if (step.lane == last_of_lane.size()) step.lane = static_cast<std::size_t>(lane - last_of_lane.begin());
    }
    for (const Node* before : node->after)
      step.after.push_back(static_cast<std::size_t>(
          std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const auto& n) { return n.get() == before; }) -
          graph.nodes.begin()));
    if (step.lane == last_of_lane.size()) {
      exec->lanes.push_back(make_queue(device, name + ", branch " + std::to_string(step.lane)));
      last_of_lane.push_back(nullptr);
    }
    last_of_lane[step.lane] = node.get();
    exec->steps.push_back(std::move(step));
  }
  return exec;
}

void launch(Lock& lock, GraphExec& exec, const std::shared_ptr<Stream>& stream) {
  if (stream->capture != nullptr) {  // becomes a part of the graph that is captured
    require_capturing(*stream);
    const std::vector<Node*> before = stream->leaves;
    std::vector<Node*> made, ends = before;
    for (const GraphExec::Step& step : exec.steps) {
      stream->leaves.clear();
      for (const std::size_t other : step.after) stream->leaves.push_back(made[other]);
      for (Node* node : stream->leaves) ends.erase(std::remove(ends.begin(), ends.end(), node), ends.end());
      if (stream->leaves.empty()) stream->leaves = before;
      add_to_capture(*stream, step.work);
      made.push_back(stream->leaves.front());
      ends.push_back(made.back());
    }
    stream->leaves = ends;
    return;
  }
  forbid_implicit_capture(*stream);
  const Point begin = enqueue_in_stream(*stream, nullptr, {exec.last});
  std::vector<Point> passed;
  for (const GraphExec::Step& step : exec.steps) {
    note_queued(*step.work);
    std::vector<Point> after;
    for (const std::size_t other : step.after) after.push_back(passed[other]);
    if (after.empty()) after.push_back(begin);
    if (step.work->waits_for != nullptr) after.push_back(step.work->waits_for->record);
    passed.push_back(enqueue(exec.lanes[step.lane], step.work, std::move(after)));
    if (step.work->records != nullptr) set_record(*step.work->records, passed.back());
  }
  std::vector<Point> ends;
  for (const auto& lane : exec.lanes) ends.push_back(end_of(lane));
  exec.last = enqueue_in_stream(*stream, nullptr, std::move(ends));
  run_at_random(lock);
}

}  // namespace simulated_gpu
