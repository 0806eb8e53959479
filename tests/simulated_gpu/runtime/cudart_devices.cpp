// cudart: devices, their properties, contexts.
#include <array>
#include <atomic>
#include <cstring>

#include "control.h"
#include "devices.h"
#include "errors.h"
#include "graphs.h"
#include "streams.h"

namespace simulated_gpu {
namespace {

thread_local int device_of_thread = 0;
thread_local bool is_bound = false;  // to the context of its device
std::array<std::atomic<bool>, 256> contexts{};

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp p{};
  std::snprintf(p.name, sizeof p.name, "Simulated H100");
  p.uuid.bytes[0] = 's', p.uuid.bytes[15] = static_cast<char>(device);
  p.totalGlobalMem = total_memory();
  p.sharedMemPerBlock = kSharedPerBlock;
  p.sharedMemPerBlockOptin = kSharedPerBlockOptIn;
  p.sharedMemPerMultiprocessor = kSharedPerProcessor;
  p.reservedSharedMemPerBlock = 1024;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.memPitch = 2147483647;
  p.maxThreadsPerBlock = kThreadsPerBlock;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.totalConstMem = 65536;
  p.major = 9;
  p.multiProcessorCount = kProcessors;
  p.maxThreadsPerMultiProcessor = kThreadsPerProcessor;
  p.maxBlocksPerMultiProcessor = kBlocksPerProcessor;
  p.textureAlignment = 512;
  p.texturePitchAlignment = 32;
  p.canMapHostMemory = p.unifiedAddressing = p.concurrentKernels = p.cooperativeLaunch = 1;
  p.ECCEnabled = 1;
  p.pciBusID = 1 + device;
  p.asyncEngineCount = 3;
  p.memoryBusWidth = 5120;
  p.l2CacheSize = 52428800;
  p.streamPrioritiesSupported = p.globalL1CacheSupported = p.localL1CacheSupported = 1;
  p.canUseHostPointerForRegisteredMem = p.hostRegisterSupported = 1;
  p.computePreemptionSupported = 1;
  p.clusterLaunch = p.unifiedFunctionPointers = 1;
  p.hostNumaId = -1;
  return p;
}

int attribute_of(int attribute, int device) {
  const cudaDeviceProp p = properties_of(device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return p.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrMaxBlockDimZ:
      return p.maxThreadsDim[attribute - cudaDevAttrMaxBlockDimX];
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return p.maxGridSize[attribute - cudaDevAttrMaxGridDimX];
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return static_cast<int>(p.sharedMemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return static_cast<int>(p.sharedMemPerBlockOptin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return static_cast<int>(p.sharedMemPerMultiprocessor);
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return static_cast<int>(p.reservedSharedMemPerBlock);
    case cudaDevAttrTotalConstantMemory:
      return static_cast<int>(p.totalConstMem);
    case cudaDevAttrWarpSize:
      return p.warpSize;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return p.regsPerBlock;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return p.memoryBusWidth;
    case cudaDevAttrL2CacheSize:
      return p.l2CacheSize;
    case cudaDevAttrMultiProcessorCount:
      return p.multiProcessorCount;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return p.maxBlocksPerMultiProcessor;
    case cudaDevAttrComputeCapabilityMajor:
      return p.major;
    case cudaDevAttrComputeCapabilityMinor:
      return p.minor;
    case cudaDevAttrPciBusId:
      return p.pciBusID;
    case cudaDevAttrAsyncEngineCount:
      return p.asyncEngineCount;
    case cudaDevAttrTextureAlignment:
      return static_cast<int>(p.textureAlignment);
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrClusterLaunch:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
      return 1;
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrIntegrated:
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrComputeMode:
    case cudaDevAttrTccDriver:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrIsMultiGpuBoard:
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrGPUDirectRDMASupported:
    case cudaDevAttrMemoryPoolSupportedHandleTypes:
    case cudaDevAttrMpsEnabled:
    case 128:  // CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, and fabric handles: no
    case 132:
      return 0;
    default:
      fail(cudaErrorInvalidValue, "device attribute " + std::to_string(attribute) + " is not simulated");
  }
}

}  // namespace

int current_device() { return device_of_thread; }

void check_device(int device) {
  if (device < 0 || device >= device_count())
    fail(cudaErrorInvalidDevice,
         "device " + std::to_string(device) + " of " + std::to_string(device_count()) + " (SIMULATED_GPU_DEVICES)");
}

void set_current_device(int device) {
  check_device(device);
  device_of_thread = device;
}

void make_context(int device) { contexts.at(device) = true; }
void need_context(int device) {
  make_context(device);
  is_bound = true;
}
bool thread_has_context() { return is_bound; }
bool has_context(int device) { return contexts.at(device); }

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return guarded([&](Lock&) {
    set_current_device(device);
    need_context(device);
  });
}
cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return guarded([&](Lock&) {
    check_device(device);
    need_context(device);
  });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return guarded<Sticky::ignored>([&](Lock&) {
    check_device(device);
    *properties = properties_of(device);
  });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return guarded<Sticky::ignored>([&](Lock&) {
    check_device(device);
    *value = attribute_of(attribute, device);
  });
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return guarded<Sticky::ignored>([&](Lock&) {
    check_device(device);
    std::snprintf(text, static_cast<std::size_t>(length), "0000:%02x:00.0", 1 + device);
  });
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = kHighestPriority;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kDriverVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
  *value = limit == cudaLimitPrintfFifoSize ? std::size_t{1} << 20 : limit == cudaLimitStackSize ? 1024 : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
// Devices cannot read each other's memory, so that doing it by mistake is a fault.
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return guarded([&](Lock&) { fail(cudaErrorPeerAccessUnsupported); });
}
cudaError_t cudaDeviceSynchronize() {
  return guarded([&](Lock& lock) {
    need_context(current_device());
    forbid_waiting_for_captures(current_device());
    forbid_in_capture("cudaDeviceSynchronize");
    note_wait();
    wait_for_device(lock, current_device());
  });
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
