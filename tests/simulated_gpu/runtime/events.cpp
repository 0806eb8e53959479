// cudart: events.
#include "events.h"

#include <algorithm>

#include "control.h"
#include "devices.h"
#include "graphs.h"

namespace simulated_gpu {
namespace {

std::vector<std::shared_ptr<Event>>& events() {
  static auto* instance = new std::vector<std::shared_ptr<Event>>;
  return *instance;
}

void record(Lock& lock, cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  const auto event = find_event(handle);
  const auto stream = find_stream(stream_handle);
  if (event->device != stream->device)
    fail(cudaErrorInvalidResourceHandle,
         "an event of cuda:" + std::to_string(event->device) + " is recorded on " + stream->queue->name);
  if (stream->capture != nullptr) {
    if ((flags & cudaEventRecordExternal) != 0) {
      Work mark = mark_for(event);
      mark.records = event;
      submit(lock, stream, std::move(mark));
      return;
    }
    require_capturing(*stream);
    event->capture = stream->capture;
    event->nodes = stream->leaves;
    event->record = {};
    return;
  }
  forbid_implicit_capture(*stream);
  event->capture = nullptr;
  event->nodes.clear();
  set_record(*event, enqueue_in_stream(*stream, std::make_shared<Work>(mark_for(event))));
  run_at_random(lock);
}

void wait(Lock& lock, cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  const auto event = find_event(handle);
  const auto stream = find_stream(stream_handle);
  const bool external = (flags & cudaEventWaitExternal) != 0;
  if (event->capture != nullptr) {
    join_capture(*stream, event->capture, event->nodes);
  } else if (stream->capture != nullptr) {
    require_capturing(*stream);
    if (!external) {
      if (event->record.queue == nullptr) return;  // never recorded: nothing to wait for
      invalidate(*stream->capture);
      fail(cudaErrorStreamCaptureIsolation);
    }
    Work mark;
    mark.waits_for = event;
    submit(lock, stream, std::move(mark));
  } else {
    forbid_implicit_capture(*stream);
    if (event->record.queue == nullptr) return;
    enqueue_in_stream(*stream, nullptr, {event->record});
    run_at_random(lock);
  }
}

// A captured event stands for no point in time: asking for one breaks the capture.
void forbid_captured(Event& event) {
  if (event.capture == nullptr) return;
  invalidate(*event.capture);
  fail(cudaErrorCapturedEvent);
}

}  // namespace

std::shared_ptr<Event> find_event(cudaEvent_t handle) {
  // The newest are asked for most.
  for (auto event = events().rbegin(); event != events().rend(); ++event)
    if (reinterpret_cast<cudaEvent_t>(event->get()) == handle) return *event;
  fail(cudaErrorInvalidResourceHandle, "an event that there is not");
}

Work mark_for(const std::shared_ptr<Event>& event) {
  Work mark;
  if ((event->flags & cudaEventDisableTiming) != 0) return mark;
  auto time = std::make_shared<std::chrono::steady_clock::time_point>();
  event->time = time;
  mark.run = [time] {
    *time = std::chrono::steady_clock::now();
    return std::vector<Touched>();
  };
  return mark;
}

void set_record(Event& event, const Point& point) { event.record = point; }

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  return guarded([&](Lock&) {
    if ((flags & ~(cudaEventBlockingSync | cudaEventDisableTiming | cudaEventInterprocess)) != 0)
      fail(cudaErrorInvalidValue);
    if ((flags & cudaEventInterprocess) != 0) fail(cudaErrorNotSupported, "events between processes are not simulated");
    need_context(current_device());
    auto event = std::make_shared<Event>();
    event->device = current_device();
    event->flags = flags;
    *handle = reinterpret_cast<cudaEvent_t>(event.get());
    events().push_back(std::move(event));
  });
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return guarded<Sticky::ignored>([&](Lock&) {
    auto found = std::find(events().begin(), events().end(), find_event(handle));
    destroy_later(std::move(*found));
    events().erase(found);
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return guarded([&](Lock& lock) { record(lock, event, stream, 0); });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return guarded([&](Lock& lock) { record(lock, event, stream, flags); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return guarded([&](Lock& lock) { wait(lock, stream, event, flags); });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return guarded([&](Lock& lock) {
    const auto event = find_event(handle);
    forbid_captured(*event);
    forbid_in_capture("cudaEventQuery");
    if (!query(lock, event->record)) fail(cudaErrorNotReady);
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return guarded([&](Lock& lock) {
    const auto event = find_event(handle);
    forbid_captured(*event);
    forbid_in_capture("cudaEventSynchronize");
    note_wait();
    wait_for(lock, Point(event->record));
  });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return guarded([&](Lock&) {
    const auto from = find_event(start), to = find_event(end);
    for (const auto& event : {from, to}) {
      forbid_captured(*event);
      if ((event->flags & cudaEventDisableTiming) != 0 || event->time == nullptr)
        fail(cudaErrorInvalidResourceHandle, "an event without a time, or never recorded");
      if (!has_passed(event->record)) fail(cudaErrorNotReady);
    }
    *milliseconds = std::chrono::duration<float, std::milli>(*to->time - *from->time).count();
  });
}

}  // extern "C"
