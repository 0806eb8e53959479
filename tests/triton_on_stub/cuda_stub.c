/* The CUDA driver's functions that Triton's launcher calls, without a GPU: one device of compute capability 9.0, on which
   everything succeeds and nothing happens, but that launches are written down. Compiled by test_triton_launch.py. */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define OK return CUDA_SUCCESS

/* The last launch: grid, block, stream, the kernel's five arguments; how many there were; whether the next ones fail. */
uint64_t last[8];
int launches = 0;
int fails = 0;
/* Of the thread, and what it was when the last module was loaded. */
int capture_mode = 0;
int capture_mode_at_load = -1;

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; OK; }
CUresult cuDeviceGetCount(int* count) { *count = 1; OK; }
CUresult cuDeviceGet(CUdevice* device, int index) { *device = index; OK; }
CUresult cuCtxGetDevice(CUdevice* device) { *device = 0; OK; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; OK;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; OK;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; OK;
    default: *value = 232448; OK; /* shared memory, and what nobody here looks at */
  }
}
static int context;
CUresult cuCtxGetCurrent(CUcontext* current) { *current = (CUcontext)&context; OK; }
CUresult cuCtxSetCurrent(CUcontext current) { OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) { *retained = (CUcontext)&context; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { *value = 0; OK; }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  int before = capture_mode;
  capture_mode = (int)*mode;
  *mode = (CUstreamCaptureMode)before;
  OK;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  capture_mode_at_load = capture_mode;
  *module = (CUmodule)&context;
  OK;
}
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)&context;
  return strcmp(name, "sgd_kernel") == 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "as the test wants it"; OK; }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  OK;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) { *count = 1; OK; }
/* Looked up by name only. */
void tiled(void) __asm__("cuTensorMapEncodeTiled");
void tiled(void) {}
void im2col(void) __asm__("cuTensorMapEncodeIm2col");
void im2col(void) {}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (fails) return CUDA_ERROR_OUT_OF_MEMORY;
  launches++;
  last[0] = config->gridDimX;
  last[1] = config->blockDimX;
  last[2] = (uint64_t)config->hStream;
  for (int i = 0; i < 5; i++) memcpy(&last[3 + i], parameters[i], sizeof(uint64_t));
  OK;
}
