// Launches of the CUDA kernel, and the few other things that the CUDA runtime is asked for. No torch header.
#include <cuda_runtime.h>

#include <array>
#include <stdexcept>

#include "cuda/options_cuda.cuh"
#include "cuda/sgd_cuda.cuh"
#include "cuda/sgd_cuda.h"

namespace wd_fused {
namespace {

using Function = const void*;

template <class Storages, Numerics kNumerics>
constexpr std::array<Function, 2> by_size() {
  return {reinterpret_cast<Function>(&sgd_kernel<Storages, kNumerics, kSmallParameters>),
          reinterpret_cast<Function>(&sgd_kernel<Storages, kNumerics, kLargeParameters>)};
}

template <class Rows>
constexpr std::array<Function, 2> tail_by_size() {
  return {reinterpret_cast<Function>(&tail_kernel<Rows, kSmallParameters>),
          reinterpret_cast<Function>(&tail_kernel<Rows, kLargeParameters>)};
}

Function function_of(const CudaKernel& kernel) {
  const size_t size = kernel.parameter_bytes == kLargeParameters;
  if (kernel.kind == KernelKind::norm)
    return size == 0 ? reinterpret_cast<Function>(&norm_kernel<kSmallParameters>)
                     : reinterpret_cast<Function>(&norm_kernel<kLargeParameters>);
  if (kernel.kind == KernelKind::tail) {
    if (kernel.tail_rows == TailRows::float32) return tail_by_size<FloatRows>()[size];
    if (kernel.tail_rows == TailRows::opmath_float) return tail_by_size<OpmathFloatRows>()[size];
    return tail_by_size<AnyRows>()[size];
  }
  const bool torch = kernel.numerics == Numerics::torch;
  if (kernel.mixed) return (torch ? by_size<Mixed, Numerics::torch>() : by_size<Mixed, Numerics::opmath>())[size];
  switch (kernel.storage) {
    case Storage::float32:
      return by_size<Only<float>, Numerics::torch>()[size];
    case Storage::float64:
      return by_size<Only<double>, Numerics::torch>()[size];
    case Storage::float16:
      return (torch ? by_size<Only<Float16>, Numerics::torch>() : by_size<Only<Float16>, Numerics::opmath>())[size];
    default:
      return (torch ? by_size<Only<BFloat16>, Numerics::torch>() : by_size<Only<BFloat16>, Numerics::opmath>())[size];
  }
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
  const CudaKernel any{false, Storage::float32, Numerics::torch, kLargeParameters};
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
