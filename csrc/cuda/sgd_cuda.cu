// Launches of the CUDA kernel, and the few other things that the CUDA runtime is asked for. No torch header.
#include <cuda_runtime.h>

#include <iterator>
#include <stdexcept>
#include <utility>

#include "cuda/cuda_kind.cuh"
#include "cuda/cuda_norm.cuh"
#include "cuda/sgd_cuda.h"

namespace wd_fused {
namespace {

using Function = const void*;

// The kinds of a list, which a template can name, and the kernel that is compiled for one of them.
struct PlainKinds {
  static constexpr const auto& kKinds = kPlainKinds;
};
struct OptionKinds {
  static constexpr const auto& kKinds = kOptionKinds;
};
template <int kBytes, class List, size_t... kPlaces>
Function of_kind(uint32_t code, std::index_sequence<kPlaces...>) {
  Function found = nullptr;
  const auto look_at = [&](uint32_t own, Function function) {
    if (own == code) found = function;
  };
  (look_at(List::kKinds[kPlaces].code(), reinterpret_cast<Function>(&sgd_kernel<List::kKinds[kPlaces].code(), kBytes>)),
   ...);
  return found;
}
template <int kBytes, class List>
Function of_kind(uint32_t code) {
  return of_kind<kBytes, List>(code, std::make_index_sequence<std::size(List::kKinds)>());
}

Function function_of(const CudaKernel& kernel) {
  if (kernel.id == kNormKernel) return reinterpret_cast<Function>(&norm_kernel);
  if (kernel.id == kGeneralKernel) return reinterpret_cast<Function>(&general_kernel<kSmallParameters>);
  if (Kind::of(kernel.id).options) return of_kind<kSmallParameters, OptionKinds>(kernel.id);
  return kernel.parameter_bytes == kSmallParameters ? of_kind<kSmallParameters, PlainKinds>(kernel.id)
                                                    : of_kind<kLargeParameters, PlainKinds>(kernel.id);
}

constexpr int kDriverOfLargeParameters = 12010;  // CUDA 12.1's

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of anybody would report it again
  throw std::runtime_error("CUDA error " + std::string(cudaGetErrorName(error)) + " in " + what + ": " +
                           cudaGetErrorString(error));
}

// What would break a capture under way elsewhere in the process is allowed meanwhile.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void launch_sgd(const CudaKernel& kernel, const void* parameters, int blocks, void* stream) {
  void* arguments[] = {const_cast<void*>(parameters)};
  const cudaError_t error = cudaLaunchKernel(function_of(kernel), dim3(static_cast<unsigned>(blocks)),
                                             dim3(kCudaThreads), arguments, 0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    check(error, "the launch of " + name_of(kernel) + " with " + std::to_string(blocks) +
                     " blocks (or in earlier work on this device, which CUDA reports late)");
}

void load_kernel(const CudaKernel& kernel) {
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, function_of(kernel)), "loading " + name_of(kernel));
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void* make_upload_stream() {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return stream;
}

void copy_to_device_and_wait(void* to, const void* from, size_t bytes, void* stream) {
  const RelaxedCapture relaxed;
  const auto upload = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, upload), "the copy of the tensor table");
  check(cudaStreamSynchronize(upload), "the copy of the tensor table");
}

std::string why_not_cuda(int device) {
  const RelaxedCapture relaxed;
  int major = 0, minor = 0, driver = 0;
  cudaDriverGetVersion(&driver);
  const auto version = [](int of) { return std::to_string(of / 1000) + "." + std::to_string(of % 1000 / 10); };
  if (driver != 0 && driver < kDriverOfLargeParameters)
    return "the driver knows CUDA up to " + version(driver) + ", kernels with 32 KiB of parameters need " +
           version(kDriverOfLargeParameters) + ": update the driver";
  cudaFuncAttributes attributes{};
  const CudaKernel any{kPlainKinds[0].code(), kLargeParameters};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function_of(any));
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "its CUDA part was built for " WD_FUSED_CUDA_ARCHS ", not for compute capability " + capability +
           " of cuda:" + std::to_string(device) +
           ": build it again on this machine, or with TORCH_CUDA_ARCH_LIST=" + capability;
  if (error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver)
    return "the driver knows CUDA up to " + version(driver) + ", the CUDA part was built with " +
           version(CUDART_VERSION) +
           ": update the driver, or build for this GPU alone with TORCH_CUDA_ARCH_LIST=" + capability;
  return "CUDA error " + std::string(cudaGetErrorName(error)) + " on cuda:" + std::to_string(device) + ": " +
         cudaGetErrorString(error);
}

}  // namespace wd_fused
