// What a CUDA device is asked for: a launch, a copy, a question. Plain C++, so that the callers need no CUDA header.
// Implemented by sgd_cuda.cu; called by cuda_step.cpp. Errors are std::runtime_error and name what failed.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/cuda_launch.h"

namespace wd_fused {

// Launches on the current device; parameters: kernel.parameter_bytes bytes, copied before this returns. stream: a
// cudaStream_t.
void launch_sgd(const CudaKernel& kernel, const void* parameters, int blocks, void* stream);

// CUDA loads a kernel at its first use, which a capture may not allow: this does it beforehand. On the current device.
void load_kernel(const CudaKernel& kernel);

bool is_capturing(void* stream);

// A stream of the current device that nothing else uses and that waits for nothing.
void* make_upload_stream();
// Allowed while another stream is capturing.
void copy_to_device_and_wait(void* to, const void* from, size_t bytes, void* stream);

// Why the kernels do not run on a device, with the remedy; empty if they do.
std::string why_not_cuda(int device);

}  // namespace wd_fused
