// Kernels: known by the host's functions that stand for them, or found in a module; their code is that of a PTX file.
#pragma once

#include <cuda_runtime_api.h>

#include <set>
#include <string>
#include <vector>

#include "kernel.h"
#include "streams.h"

namespace simulated_gpu {

struct Kernel {
  struct Parameter {
    std::size_t offset, bytes;
  };
  std::string name;      // mangled
  std::string ptx_path;  // empty until its code was looked for
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes = 0, static_shared_bytes = 0;
  unsigned max_threads = 1024;
  std::size_t dynamic_shared_allowed = 49152;
  std::set<int> loaded_on;  // devices
  const KernelCode* code = nullptr;
};

void register_kernel(const void* host_function, const char* name);
Kernel& find_kernel(const void* handle);  // a host function, or what __cudaGetKernel() or a module gave

// Reads the head of the kernel in its PTX file, on which a launch depends. Throws where no file has it.
void load(Kernel& kernel, int device);

struct Module {
  std::string ptx_path;
  std::vector<std::unique_ptr<Kernel>> kernels;
};
std::unique_ptr<Module> load_module(const void* image);  // a cubin, whose PTX lies in SIMULATED_GPU_TRITON_PTX
Kernel& kernel_of(Module& module, const std::string& name);

struct LaunchShape {
  Dim grid, block;
  std::size_t dynamic_shared_bytes = 0;
};
void launch_kernel(Lock& lock, Kernel& kernel, const LaunchShape& shape, void** arguments, cudaStream_t stream);

int blocks_per_processor(Kernel& kernel, int block_threads, std::size_t dynamic_shared_bytes);

}  // namespace simulated_gpu
