// Device and pinned memory: what is allocated where, and what of it a program may touch.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel.h"

namespace simulated_gpu {

int device_count();
std::size_t total_memory();  // bytes of each device
std::size_t used_memory(int device);

// Addresses are never used twice. Throws CudaError where the device has no such room.
const Allocation* allocate(int device, std::size_t bytes);
const Allocation* allocate_pinned(std::size_t bytes);
const Allocation* register_pinned(void* memory, std::size_t bytes);
// The allocation that begins at the address is freed; its bytes are gone. Throws CudaError where there is none alive.
void release(const Allocation* allocation);

bool is_device_address(std::uint64_t address);  // in the arena, whether allocated or not

// Where the simulator reads and writes what a program calls `address`: the alias of device memory, else the address.
void* host_view(std::uint64_t address);

void fill_with_garbage(std::uint64_t address, std::size_t bytes);

// Throws Fault unless the range lies in one allocation that is alive and of that device (or pinned). `who` is the
// operation that touches it. A device of -1 is any device.
void require_alive(const std::string& who, std::uint64_t begin, std::uint64_t end, int device);

std::string describe(std::uint64_t begin, std::uint64_t end);  // "bytes 16 to 32 of allocation 7 (512 bytes on cuda:0)"

// How often an entry of a queue has written to the pinned allocation; 0 for others.
std::uint64_t device_writes(std::uint64_t address);
void note_device_write(std::uint64_t address);

}  // namespace simulated_gpu
