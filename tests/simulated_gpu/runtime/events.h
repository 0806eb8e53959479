// Events: marks in queues, or, recorded in a capture, sets of nodes.
#pragma once

#include <chrono>

#include "streams.h"

namespace simulated_gpu {

struct Event {
  int device = 0;
  unsigned flags = 0;
  Point record;                                                 // of the last cudaEventRecord()
  std::shared_ptr<std::chrono::steady_clock::time_point> time;  // when its mark ran
  std::shared_ptr<Capture> capture;                             // in which it was last recorded, if in one
  std::vector<Node*> nodes;
};

std::shared_ptr<Event> find_event(cudaEvent_t handle);

// The work of a mark that notes the time, and the event's last record replaced by it once it is enqueued.
Work mark_for(const std::shared_ptr<Event>& event);
void set_record(Event& event, const Point& point);

}  // namespace simulated_gpu
