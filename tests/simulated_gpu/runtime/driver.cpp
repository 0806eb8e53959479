// libcuda.so.1: what torch and Triton's launcher ask of the driver, by way of the simulator in libcudart.
#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <map>

#include "devices.h"
#include "errors.h"
#include "graphs.h"
#include "modules.h"

using namespace simulated_gpu;

namespace {

// The two kinds of codes have the same numbers. What fails here is not cudaGetLastError()'s business.
template <class Call>
CUresult driver_call(Call&& call) {
  const cudaError_t last = last_error(false);
  const cudaError_t result = call();
  set_last_error(last);
  return static_cast<CUresult>(result);
}
template <Sticky sticky = Sticky::returned, class Body>
CUresult driver(Body&& body) {
  return driver_call([&] { return guarded<sticky>(std::forward<Body>(body)); });
}

// A context is its device's place in this array; the functions of a module are kernels, known to the runtime too.
std::array<char, 256> contexts;
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(&contexts.at(device)); }
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<char*>(context) - contexts.data()); }

auto& modules() {
  static auto* instance = new std::map<CUmodule, std::unique_ptr<Module>>;
  return *instance;
}

CUresult launch(CUfunction function, Dim grid, Dim block, unsigned shared, CUstream stream, void** parameters,
                void** extra) {
  return driver([&](Lock& lock) {
    if (extra != nullptr) fail(cudaErrorNotSupported, "a launch with packed arguments is not simulated");
    launch_kernel(lock, find_kernel(function), {grid, block, shared}, parameters, stream);
  });
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  return driver_call([&] { return cudaDriverGetVersion(version); });
}
CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(code));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char** text) {
  *text = cudaGetErrorName(static_cast<cudaError_t>(code));
  return CUDA_SUCCESS;
}
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* status) {
  static void* here = dlopen("libcuda.so.1", RTLD_NOW);
  *function = nullptr;
  for (const char* version : {"_v3", "_v2", ""})
    if (*function == nullptr) *function = dlsym(here, (std::string(symbol) + version).c_str());
  if (status != nullptr)
    *status = *function == nullptr ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  return driver_call([&] { return cudaGetDeviceCount(count); });
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return driver<Sticky::ignored>([&](Lock&) {
    check_device(ordinal);
    *device = ordinal;
  });
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) std::snprintf(name, static_cast<std::size_t>(length), "%s", properties.name);
  return static_cast<CUresult>(error);
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) *uuid = properties.uuid;
  return static_cast<CUresult>(error);
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  return driver<Sticky::ignored>([&](Lock&) {
    check_device(device);
    *bytes = total_memory();
  });
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return driver_call([&] { return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device); });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return driver<Sticky::ignored>([&](Lock&) {
    check_device(device);
    *flags = 0;
    *active = has_context(device);
  });
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return driver([&](Lock&) {
    check_device(device);
    make_context(device);
    *context = context_of(device);
  });
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) {
  return driver<Sticky::ignored>(
      [&](Lock&) { *context = thread_has_context() ? context_of(current_device()) : nullptr; });
}
CUresult cuCtxSetCurrent(CUcontext context) {
  return driver<Sticky::ignored>([&](Lock&) {
    if (context == nullptr) return;
    set_current_device(device_of(context));
    need_context(current_device());
  });
}
CUresult cuCtxGetDevice(CUdevice* device) {
  return driver<Sticky::ignored>([&](Lock&) {
    if (!thread_has_context()) fail(cudaErrorDeviceUninitialized, "this thread has no context");
    *device = current_device();
  });
}
CUresult cuCtxSynchronize() {
  return driver_call([&] { return cudaDeviceSynchronize(); });
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  return driver_call([&] { return cudaDeviceGetLimit(value, static_cast<cudaLimit>(limit)); });
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return driver_call([&] { return cudaDeviceSetLimit(static_cast<cudaLimit>(limit), value); });
}

CUresult cuModuleLoadData(CUmodule* handle, const void* image) {
  return driver([&](Lock&) {
    need_context(current_device());
    forbid_in_capture("cuModuleLoadData");
    std::unique_ptr<Module> module = load_module(image);
    *handle = reinterpret_cast<CUmodule>(module.get());
    modules()[*handle] = std::move(module);
  });
}
CUresult cuModuleLoadDataEx(CUmodule* handle, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(handle, image);
}
// Its kernels may still be queued, or captured.
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  return driver([&](Lock&) {
    const auto module = modules().find(handle);
    if (module == modules().end()) fail(cudaErrorInvalidResourceHandle, "a module that there is not");
    *function = reinterpret_cast<CUfunction>(&kernel_of(*module->second, name));
  });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error != cudaSuccess) return static_cast<CUresult>(error);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = attributes.maxThreadsPerBlock;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = static_cast<int>(attributes.sharedSizeBytes);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = attributes.maxDynamicSharedSizeBytes;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = attributes.numRegs;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = 0;
      return CUDA_SUCCESS;
    default:
      return driver([&](Lock&) {
        fail(cudaErrorNotSupported, "function attribute " + std::to_string(attribute) + " is not simulated");
      });
  }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return driver_call(
        [&] { return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, value); });
  return driver([&](Lock&) {
    fail(cudaErrorNotSupported, "function attribute " + std::to_string(attribute) + " is not simulated");
  });
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters,
                        void** extra) {
  return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, parameters, extra);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  for (unsigned a = 0; a < config->numAttrs; ++a) {
    const CUlaunchAttribute& attribute = config->attrs[a];
    const auto& cluster = attribute.value.clusterDim;
    if ((attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && cluster.x * cluster.y * cluster.z > 1) ||
        (attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE && attribute.value.cooperative != 0))
      return driver([&](Lock&) { fail(cudaErrorNotSupported, "clusters and cooperative launches are not simulated"); });
  }
  return launch(function, {config->gridDimX, config->gridDimY, config->gridDimZ},
                {config->blockDimX, config->blockDimY, config->blockDimZ}, config->sharedMemBytes, config->hStream,
                parameters, extra);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
  return driver_call([&] { return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared); });
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return driver([&](Lock&) {
    const Allocation* allocation = find_allocation(pointer);
    if (allocation == nullptr || allocation->freed) fail(cudaErrorInvalidValue, "memory that is not of the device");
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
      *static_cast<CUdeviceptr*>(value) = pointer;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
      *static_cast<int*>(value) = allocation->device;
    else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
      *static_cast<CUmemorytype*>(value) = allocation->device < 0 ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    else
      fail(cudaErrorNotSupported, "pointer attribute " + std::to_string(attribute) + " is not simulated");
  });
}
// The driver's log, which torch attaches to errors: there is none.
CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* handle) {
  if (handle != nullptr) *handle = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return driver_call([&] { return cudaStreamCreateWithFlags(stream, flags); });
}
CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return driver_call([&] { return cudaStreamCreateWithPriority(stream, flags, priority); });
}
CUresult cuStreamDestroy_v2(CUstream stream) {
  return driver_call([&] { return cudaStreamDestroy(stream); });
}
CUresult cuStreamSynchronize(CUstream stream) {
  return driver_call([&] { return cudaStreamSynchronize(stream); });
}
CUresult cuStreamQuery(CUstream stream) {
  return driver_call([&] { return cudaStreamQuery(stream); });
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return driver_call([&] { return cudaStreamWaitEvent(stream, event, flags); });
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return driver_call([&] { return cudaStreamIsCapturing(stream, reinterpret_cast<cudaStreamCaptureStatus*>(status)); });
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return driver_call(
      [&] { return cudaThreadExchangeStreamCaptureMode(reinterpret_cast<cudaStreamCaptureMode*>(mode)); });
}
CUresult cuEventCreate(CUevent* event, unsigned flags) {
  return driver_call([&] { return cudaEventCreateWithFlags(event, flags); });
}
CUresult cuEventDestroy_v2(CUevent event) {
  return driver_call([&] { return cudaEventDestroy(event); });
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return driver_call([&] { return cudaEventRecord(event, stream); });
}
CUresult cuEventSynchronize(CUevent event) {
  return driver_call([&] { return cudaEventSynchronize(event); });
}
CUresult cuEventQuery(CUevent event) {
  return driver_call([&] { return cudaEventQuery(event); });
}

}  // extern "C"
