// cudart: allocations, copies, memsets.
#include <cstring>

#include "control.h"
#include "devices.h"
#include "errors.h"
#include "graphs.h"
#include "memory.h"
#include "races.h"
#include "streams.h"

namespace simulated_gpu {
namespace {

struct Side {  // of a copy
  std::uint64_t address;
  const Allocation* allocation;  // null: pageable memory of the host

  bool is_pageable() const { return allocation == nullptr; }
  bool is_device() const { return allocation != nullptr && allocation->device >= 0; }
  std::string words() const {
    return is_pageable() ? "pageable memory"
           : is_device() ? "cuda:" + std::to_string(allocation->device)
                         : "pinned memory";
  }
};

// What lies in one allocation, or in none of ours.
Side side_of(const void* pointer, std::uint64_t bytes) {
  const auto address = reinterpret_cast<std::uint64_t>(pointer);
  const Allocation* allocation = find_allocation(address);
  if (allocation != nullptr && allocation->device < 0 && allocation->freed) allocation = nullptr;
  if (allocation == nullptr && is_device_address(address))
    fail(cudaErrorInvalidValue, describe(address, address + bytes) + " are in no allocation");
  if (allocation != nullptr && (allocation->freed || address + bytes > allocation->end))
    fail(cudaErrorInvalidValue,
         describe(address, address + bytes) + (allocation->freed ? " are freed" : " go beyond its end"));
  return {address, allocation};
}

void check_kind(const Side& to, const Side& from, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind == cudaMemcpyDefault) return;
  // Pinned memory may stand for either; the rest must be what the caller says.
  if ((to.is_device() && !to_device) || (to.is_pageable() && to_device) || (from.is_device() && !from_device) ||
      (from.is_pageable() && from_device))
    fail(cudaErrorInvalidValue, "a copy to " + to.words() + " from " + from.words() + " is called otherwise");
}

struct Rows {  // bytes of each row, rows, and how far apart they are
  std::uint64_t width, height, to_pitch, from_pitch;
  std::uint64_t span(std::uint64_t pitch) const { return height == 0 ? 0 : (height - 1) * pitch + width; }
};

void move_rows(void* to, const void* from, const Rows& rows) {
  for (std::uint64_t row = 0; row < rows.height; ++row)
    std::memmove(static_cast<char*>(to) + row * rows.to_pitch, static_cast<const char*>(from) + row * rows.from_pitch,
                 rows.width);
}

// A copy as an entry of a queue. A pageable source is copied at once, a pinned one when its turn has come.
Work copy_of(const Side& to, const Side& from, const Rows& rows) {
  Work work;
  work.kind = Kind::copy;
  work.name =
      "copy of " + std::to_string(rows.width * rows.height) + " bytes to " + to.words() + " from " + from.words();
  std::shared_ptr<std::vector<char>> staged;
  if (from.is_pageable()) {
    const char* first = reinterpret_cast<const char*>(from.address);
    staged = std::make_shared<std::vector<char>>(first, first + rows.span(rows.from_pitch));
  } else if (!from.is_device()) {
    work.pinned_source = from.address;
    work.pinned_bytes = rows.span(rows.from_pitch);
  }
  work.run = [to, from, rows, staged, name = work.name] {
    std::vector<Touched> touched;
    if (staged == nullptr) touched.push_back({from.address, from.address + rows.span(rows.from_pitch), false});
    if (!to.is_pageable())
      for (std::uint64_t row = 0, step = rows.to_pitch == rows.width ? rows.height : 1; row < rows.height; row += step)
        touched.push_back(
            {to.address + row * rows.to_pitch, to.address + row * rows.to_pitch + rows.width * step, true});
    for (const Touched& range : touched) require_alive(name, range.begin, range.end, -1);
    move_rows(host_view(to.address), staged != nullptr ? staged->data() : host_view(from.address), rows);
    return touched;
  };
  return work;
}

enum class Waits { yes, no };

void copy(Lock& lock, void* to_pointer, const void* from_pointer, const Rows& rows, cudaMemcpyKind kind, Waits waits,
          cudaStream_t stream_handle, const char* function) {
  const auto stream = find_stream(stream_handle);
  need_context(stream->device);
  if (rows.width == 0 || rows.height == 0) return;
  const Side to = side_of(to_pointer, rows.span(rows.to_pitch)),
             from = side_of(from_pointer, rows.span(rows.from_pitch));
  check_kind(to, from, kind);
  if (waits == Waits::yes) forbid_in_capture(function);
  if (stream->capture != nullptr && (to.is_pageable() || from.is_pageable())) {
    invalidate(*stream->capture);
    fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory");
  }
  if (waits == Waits::yes && !(to.is_device() && from.is_device())) {
    note_wait();
    wait_for(lock, end_of_stream(*stream));  // a pageable source is read only then
  }
  if (stream->legacy && to.is_device() && from.is_device() && to.allocation->device != from.allocation->device) {
    // Between devices, the default stream's copies wait for both.
    const int other = to.allocation->device == stream->device ? from.allocation->device : to.allocation->device;
    const Point done = enqueue_in_stream(*default_stream(other), nullptr);
    enqueue_in_stream(*stream, nullptr, {done});
    submit(lock, stream, copy_of(to, from, rows));
    enqueue_in_stream(*default_stream(other), nullptr, {end_of(stream->queue)});
    return;
  }
  submit(lock, stream, copy_of(to, from, rows));
  const bool to_host = !to.is_device();
  if (to.is_pageable() ||
      (waits == Waits::yes && (to_host || !from.is_pageable()) && !(to.is_device() && from.is_device()))) {
    if (waits == Waits::no) note_wait();
    wait_for(lock, end_of(stream->queue));
  }
}

void set_bytes(Lock& lock, void* pointer, int value, std::uint64_t bytes, cudaStream_t stream) {
  const auto found = find_stream(stream);
  need_context(found->device);
  if (bytes == 0) return;
  const Side to = side_of(pointer, bytes);
  if (to.is_pageable()) fail(cudaErrorInvalidValue, "a memset of pageable memory");
  Work work;
  work.kind = Kind::memset;
  work.name = "memset of " + std::to_string(bytes) + " bytes";
  work.run = [to, value, bytes, name = work.name] {
    require_alive(name, to.address, to.address + bytes, -1);
    std::memset(host_view(to.address), value, bytes);
    return std::vector<Touched>{{to.address, to.address + bytes, true}};
  };
  submit(lock, found, std::move(work));
}

const Allocation* alive_at(const void* pointer, cudaError_t otherwise) {
  const auto address = reinterpret_cast<std::uint64_t>(pointer);
  const Allocation* allocation = find_allocation(address);
  if (allocation == nullptr || allocation->begin != address || allocation->freed)
    fail(otherwise, "nothing was allocated at this address, or it was freed before");
  return allocation;
}

void free_at(Lock& lock, const void* pointer, const char* function) {
  if (pointer == nullptr) return;
  const Allocation* allocation = alive_at(pointer, cudaErrorInvalidValue);
  forbid_in_capture(function);
  if (free_waits()) {
    if (allocation->device >= 0) {
      wait_for_device(lock, allocation->device);
    } else {
      for (int device = 0; device < device_count(); ++device) wait_for_device(lock, device);
    }
  }
  release(allocation);
  forget_accesses(allocation->begin, allocation->end);
}

}  // namespace
}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return guarded([&](Lock&) {
    const int device = current_device();
    need_context(device);
    forbid_in_capture("cudaMalloc");
    *pointer = nullptr;
    if (bytes == 0) return;
    note_allocation();
    *pointer = reinterpret_cast<void*>(allocate(device, bytes)->begin);
  });
}
cudaError_t cudaFree(void* pointer) {
  return guarded([&](Lock& lock) {
    need_context(current_device());
    free_at(lock, pointer, "cudaFree");
  });
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return guarded([&](Lock&) {
    need_context(current_device());
    forbid_in_capture("cudaHostAlloc");
    *pointer = bytes == 0 ? nullptr : reinterpret_cast<void*>(allocate_pinned(bytes)->begin);
  });
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
cudaError_t cudaFreeHost(void* pointer) {
  return guarded([&](Lock& lock) { free_at(lock, pointer, "cudaFreeHost"); });
}
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  return guarded([&](Lock&) {
    need_context(current_device());
    forbid_in_capture("cudaHostRegister");
    if (pointer == nullptr || bytes == 0) fail(cudaErrorInvalidValue);
    register_pinned(pointer, bytes);
  });
}
cudaError_t cudaHostUnregister(void* pointer) {
  return guarded([&](Lock& lock) {
    alive_at(pointer, cudaErrorHostMemoryNotRegistered);
    free_at(lock, pointer, "cudaHostUnregister");
  });
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  return guarded([&](Lock&) {
    if (side_of(host, 1).is_pageable()) fail(cudaErrorInvalidValue);
    *device = host;
  });
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  return guarded([&](Lock&) {
    need_context(current_device());
    *total = total_memory();
    *free_bytes = total_memory() - used_memory(current_device());
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return guarded([&](Lock&) {
    *attributes = {};
    const Allocation* allocation = find_allocation(reinterpret_cast<std::uint64_t>(pointer));
    attributes->device = current_device();
    if (allocation == nullptr || allocation->freed) {
      attributes->type = cudaMemoryTypeUnregistered;
      attributes->device = cudaInvalidDeviceId;
      attributes->hostPointer = const_cast<void*>(pointer);
      return;
    }
    attributes->type = allocation->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    if (allocation->device >= 0) attributes->device = allocation->device;
    attributes->devicePointer = const_cast<void*>(pointer);
    if (allocation->device < 0) attributes->hostPointer = const_cast<void*>(pointer);
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return guarded(
      [&](Lock& lock) { copy(lock, to, from, {bytes, 1, bytes, bytes}, kind, Waits::no, stream, "cudaMemcpyAsync"); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return guarded(
      [&](Lock& lock) { copy(lock, to, from, {bytes, 1, bytes, bytes}, kind, Waits::yes, nullptr, "cudaMemcpy"); });
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return guarded([&](Lock& lock) {
    if (width > to_pitch || width > from_pitch) fail(cudaErrorInvalidValue, "rows longer than their distance");
    copy(lock, to, from, {width, height, to_pitch, from_pitch}, kind, Waits::no, stream, "cudaMemcpy2DAsync");
  });
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  return guarded([&](Lock& lock) { set_bytes(lock, pointer, value, bytes, stream); });
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return guarded([&](Lock& lock) { set_bytes(lock, pointer, value, bytes, nullptr); });
}

}  // extern "C"
