// cudart: kernels, as nvcc's host code registers and launches them.
#include <dlfcn.h>

#include "devices.h"
#include "errors.h"
#include "graphs.h"
#include "modules.h"

namespace simulated_gpu {
namespace {

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;  // by <<<>>>, until the stub of the kernel takes it

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                   cudaStream_t stream) {
  return guarded([&](Lock& lock) {
    launch_kernel(lock, find_kernel(function), {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared},
                  arguments, stream);
  });
}

Kernel& loaded(const void* function) {
  Kernel& kernel = find_kernel(function);
  need_context(current_device());
  if (kernel.loaded_on.count(current_device()) == 0) forbid_in_capture("loading a kernel");
  load(kernel, current_device());
  return kernel;
}

}  // namespace
}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  const Lock lock = lock_state();
  register_kernel(host_function, name);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (pushed.empty()) return cudaErrorMissingConfiguration;
  const Configuration top = pushed.back();
  pushed.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return guarded<Sticky::ignored>([&](Lock&) { *kernel = reinterpret_cast<cudaKernel_t>(&find_kernel(function)); });
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return guarded([&](Lock& lock) {
    for (unsigned a = 0; a < config->numAttrs; ++a) {
      const cudaLaunchAttribute& attribute = config->attrs[a];
      const auto& cluster = attribute.val.clusterDim;
      if ((attribute.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z > 1) ||
          (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0))
        fail(cudaErrorNotSupported, "clusters and cooperative launches are not simulated");
    }
    const dim3 grid = config->gridDim, block = config->blockDim;
    launch_kernel(lock, find_kernel(function),
                  {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes}, arguments,
                  config->stream);
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return guarded([&](Lock&) {
    Kernel& kernel = loaded(function);
    *attributes = {};
    attributes->sharedSizeBytes = kernel.static_shared_bytes;
    attributes->maxThreadsPerBlock = static_cast<int>(kernel.max_threads);
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(kernel.dynamic_shared_allowed);
  });
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return guarded([&](Lock&) {
    Kernel& kernel = loaded(function);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return;
    if (value < 0 || static_cast<std::size_t>(value) + kernel.static_shared_bytes > kSharedPerBlockOptIn)
      fail(cudaErrorInvalidValue);
    kernel.dynamic_shared_allowed = static_cast<std::size_t>(value);
  });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  return guarded([&](Lock&) { *blocks = blocks_per_processor(loaded(function), threads, shared); });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver == nullptr ? nullptr : dlsym(driver, symbol);
  if (status != nullptr)
    *status = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return *function == nullptr ? cudaErrorSymbolNotFound : cudaSuccess;
}

}  // extern "C"
