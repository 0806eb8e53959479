// cudart: streams, captures, graphs, functions of the host.
#include <algorithm>
#include <map>

#include "control.h"
#include "devices.h"
#include "errors.h"
#include "graphs.h"
#include "streams.h"

namespace simulated_gpu {
namespace {

// What a handle stands for, kept until it is destroyed.
template <class Thing>
class Handles {
 public:
  void* add(std::shared_ptr<Thing> thing) {
    void* handle = thing.get();
    all_[handle] = std::move(thing);
    return handle;
  }
  const std::shared_ptr<Thing>& find(void* handle) const {
    const auto found = all_.find(handle);
    if (found == all_.end()) fail(cudaErrorInvalidValue, "a handle of nothing that there is");
    return found->second;
  }
  void remove(void* handle) {
    destroy_later(find(handle));
    all_.erase(handle);
  }

 private:
  std::map<void*, std::shared_ptr<Thing>> all_;
};

struct HeldObject {  // a user object, and how many references the program itself holds
  std::shared_ptr<UserObject> object;
  unsigned references;
};

auto& graphs() {
  static auto* instance = new Handles<Graph>;
  return *instance;
}
auto& execs() {
  static auto* instance = new Handles<GraphExec>;
  return *instance;
}
auto& objects() {
  static auto* instance = new Handles<HeldObject>;
  return *instance;
}

void give_up_references(void* handle, unsigned count) {
  const std::shared_ptr<HeldObject> held = objects().find(handle);
  if (count > held->references) fail(cudaErrorInvalidValue, "more references than there are");
  held->references -= count;
  if (held->references == 0) objects().remove(handle);
}

void call_on_host(Lock& lock, cudaStream_t stream, std::string name, std::function<void()> function) {
  Work work;
  work.kind = Kind::host;
  work.name = std::move(name);
  work.run = [function = std::move(function)] {
    function();
    return std::vector<Touched>();
  };
  submit(lock, find_stream(stream), std::move(work));
}

}  // namespace
}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return guarded([&](Lock&) {
    need_context(current_device());
    *stream = make_stream(current_device(), flags, priority);
  });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return guarded<Sticky::ignored>([&](Lock&) { destroy_stream(stream); });
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return guarded([&](Lock&) { *priority = find_stream(stream)->priority; });
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return guarded([&](Lock&) { *flags = find_stream(stream)->flags; });
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  return guarded([&](Lock&) { *device = find_stream(stream)->device; });
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return guarded([&](Lock& lock) {
    const auto stream = find_stream(handle);
    forbid_waiting(*stream);
    forbid_in_capture("cudaStreamSynchronize");
    note_wait();
    wait_for(lock, end_of_stream(*stream));
  });
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return guarded([&](Lock& lock) {
    const auto stream = find_stream(handle);
    forbid_waiting(*stream);
    forbid_in_capture("cudaStreamQuery");
    if (!query(lock, end_of_stream(*stream))) fail(cudaErrorNotReady);
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return guarded([&](Lock& lock) { call_on_host(lock, stream, "host function", [=] { function(data); }); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  return guarded([&](Lock& lock) {
    if (find_stream(stream)->capture != nullptr) fail(cudaErrorStreamCaptureUnsupported, "cudaStreamAddCallback");
    call_on_host(lock, stream, "callback", [=] { callback(stream, cudaSuccess, data); });
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return guarded([&](Lock&) { begin_capture(find_stream(stream), mode); });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return guarded([&](Lock&) {
    *graph = nullptr;
    *graph = static_cast<cudaGraph_t>(graphs().add(end_capture(find_stream(stream))));
  });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return guarded([&](Lock&) {
    const auto stream = find_stream(handle);
    if (!implicit_captures(*stream).empty()) fail(cudaErrorStreamCaptureImplicit);  // asking breaks none
    *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
  });
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** after, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  const cudaError_t error = cudaStreamIsCapturing(handle, status);
  if (error != cudaSuccess || *status != cudaStreamCaptureStatusActive) return error;
  return guarded([&](Lock&) {
    const auto stream = find_stream(handle);
    if (id != nullptr) *id = stream->capture->id;
    if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(stream->capture->graph.get());
    if (after != nullptr) *after = reinterpret_cast<const cudaGraphNode_t*>(stream->leaves.data());
    if (edges != nullptr) *edges = nullptr;
    if (count != nullptr) *count = stream->leaves.size();
  });
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t* nodes, const cudaGraphEdgeData*,
                                                size_t count, unsigned flags) {
  return guarded([&](Lock&) {
    const auto stream = find_stream(handle);
    if (stream->capture == nullptr) fail(cudaErrorIllegalState);
    require_capturing(*stream);
    if ((flags & cudaStreamSetCaptureDependencies) != 0) stream->leaves.clear();
    for (size_t n = 0; n < count; ++n) stream->leaves.push_back(reinterpret_cast<Node*>(nodes[n]));
  });
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return guarded<Sticky::ignored>([&](Lock&) { *mode = exchange_thread_mode(*mode); });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return guarded([&](Lock&) {
    forbid_in_capture("cudaGraphInstantiate");
    *exec = static_cast<cudaGraphExec_t>(execs().add(make_ready(*graphs().find(graph), current_device())));
  });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
  return guarded([&](Lock&) { execs().find(exec); });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return guarded([&](Lock& lock) {
    note_graph_launch();
    launch(lock, *execs().find(exec), find_stream(stream));
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return guarded<Sticky::ignored>([&](Lock&) { graphs().remove(graph); });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return guarded<Sticky::ignored>([&](Lock&) { execs().remove(exec); });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return guarded([&](Lock&) {
    const auto& all = graphs().find(graph)->nodes;
    if (nodes != nullptr)
      for (size_t n = 0; n < std::min(*count, all.size()); ++n)
        nodes[n] = reinterpret_cast<cudaGraphNode_t>(all[n].get());
    *count = all.size();
  });
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* after, cudaGraphEdgeData*,
                                         size_t* count) {
  return guarded([&](Lock&) {
    const auto& all = reinterpret_cast<Node*>(node)->after;
    if (after != nullptr)
      for (size_t n = 0; n < std::min(*count, all.size()); ++n) after[n] = reinterpret_cast<cudaGraphNode_t>(all[n]);
    *count = all.size();
  });
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  return guarded([&](Lock&) {
    static constexpr cudaGraphNodeType types[] = {cudaGraphNodeTypeEmpty,  cudaGraphNodeTypeKernel,
                                                  cudaGraphNodeTypeMemcpy, cudaGraphNodeTypeMemset,
                                                  cudaGraphNodeTypeHost,   cudaGraphNodeTypeKernel};
    *type = types[static_cast<std::size_t>(reinterpret_cast<Node*>(node)->work->kind)];
  });
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* handle, void* object, cudaHostFn_t destroy, unsigned references,
                                 unsigned) {
  return guarded([&](Lock&) {
    auto owned = std::shared_ptr<UserObject>(new UserObject{object, destroy});
    *handle = static_cast<cudaUserObject_t>(
        objects().add(std::make_shared<HeldObject>(HeldObject{std::move(owned), references})));
  });
}
cudaError_t cudaUserObjectRetain(cudaUserObject_t handle, unsigned count) {
  return guarded([&](Lock&) { objects().find(handle)->references += count; });
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t handle, unsigned count) {
  return guarded<Sticky::ignored>([&](Lock&) { give_up_references(handle, count); });
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t handle, unsigned count, unsigned flags) {
  return guarded([&](Lock&) {
    Graph* into = reinterpret_cast<Graph*>(graph);  // may be one that is still being captured
    into->objects.push_back(objects().find(handle)->object);
    if ((flags & cudaGraphUserObjectMove) != 0) give_up_references(handle, count);
  });
}

}  // extern "C"
