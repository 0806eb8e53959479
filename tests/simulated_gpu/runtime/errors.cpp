#include "errors.h"

#include <cstdio>
#include <map>
#include <utility>

namespace simulated_gpu {
namespace {

struct Faults {
  cudaError_t sticky = cudaSuccess;
  std::string text, untaken;
};
std::mutex faults_mutex;
Faults& faults() {
  static auto* instance = new Faults;  // never destroyed: programs call until the very end
  return *instance;
}

struct OfThread {
  cudaError_t last = cudaSuccess, detailed = cudaSuccess;
  std::string detail;                          // of `detailed`
  std::map<cudaError_t, std::string> strings;  // what cudaGetErrorString() returned last, which must stay valid
  std::vector<std::shared_ptr<const void>> garbage;
};
OfThread& of_thread() {
  thread_local auto* instance = new OfThread;
  return *instance;
}

const char* name_of(cudaError_t code) {
  switch (code) {
#include "error_names.inc"  // made by build.py from driver_types.h
    default:
      break;
  }
  return "unrecognized error code";
}

const char* words_of(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotPermitted:
      return "operation not permitted";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "part or all of the requested memory range is already mapped";
    case cudaErrorHostMemoryNotRegistered:
      return "pointer does not correspond to a registered memory region";
    case cudaErrorPeerAccessUnsupported:
      return "peer access is not supported between these two devices";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge:
      return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched:
      return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
      return "attempt to terminate a thread-local capture sequence from another thread";
    default:
      return name_of(code);
  }
}

cudaError_t code_of(const Fault& fault) {
  if (fault.is_race) return cudaErrorLaunchFailure;
  return fault.text.find("aligned") != std::string::npos ? cudaErrorMisalignedAddress : cudaErrorIllegalAddress;
}

}  // namespace

void fail(cudaError_t code, std::string text) { throw CudaError{code, std::move(text)}; }

Lock lock_state() {
  static auto* mutex = new std::mutex;
  return Lock(*mutex);
}

void destroy_later(std::shared_ptr<const void> garbage) { of_thread().garbage.push_back(std::move(garbage)); }

void destroy_garbage() {
  while (!of_thread().garbage.empty()) {
    const auto garbage = std::move(of_thread().garbage);
    of_thread().garbage.clear();
  }
}

void set_fault(const Fault& fault) {
  const std::lock_guard<std::mutex> lock(faults_mutex);
  const std::string text = (fault.is_race ? "race: " : "fault: ") + fault.text;
  std::fprintf(stderr, "simulated GPU: %s\n", text.c_str());
  faults().untaken += text + "\n";
  if (faults().sticky != cudaSuccess) return;
  faults().sticky = code_of(fault);
  faults().text = text;
}

bool has_fault() {
  const std::lock_guard<std::mutex> lock(faults_mutex);
  return faults().sticky != cudaSuccess;
}

void clear_fault() {
  const std::lock_guard<std::mutex> lock(faults_mutex);
  faults().sticky = cudaSuccess;
  faults().text.clear();
  of_thread().last = cudaSuccess;
}

std::string take_faults() {
  const std::lock_guard<std::mutex> lock(faults_mutex);
  return std::exchange(faults().untaken, {});
}

cudaError_t note_error(const CudaError& error) {
  OfThread& thread = of_thread();
  thread.last = error.code;
  if (!error.text.empty() || thread.detailed != error.code) {
    thread.detailed = error.code;
    thread.detail = error.text;
  }
  return error.code;
}

cudaError_t last_error(bool clear) {
  {
    const std::lock_guard<std::mutex> lock(faults_mutex);
    if (faults().sticky != cudaSuccess) return faults().sticky;
  }
  return clear ? std::exchange(of_thread().last, cudaSuccess) : of_thread().last;
}

void set_last_error(cudaError_t error) { of_thread().last = error; }

int not_simulated(const char* function) {
  std::fprintf(stderr, "simulated GPU: %s is not simulated\n", function);
  return note_error({cudaErrorNotSupported, std::string(function) + " is not simulated"});
}
int driver_not_simulated(const char* function) {
  const cudaError_t last = of_thread().last;
  const int result = not_simulated(function);
  of_thread().last = last;
  return result;
}

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

const char* cudaGetErrorName(cudaError_t code) { return name_of(code); }

const char* cudaGetErrorString(cudaError_t code) {
  OfThread& thread = of_thread();
  std::string detail;
  {
    const std::lock_guard<std::mutex> lock(faults_mutex);
    if (faults().sticky == code) detail = faults().text;
  }
  if (detail.empty() && thread.detailed == code) detail = thread.detail;
  if (code == cudaSuccess || detail.empty()) return words_of(code);
  return (thread.strings[code] = std::string(words_of(code)) + " (simulated GPU: " + detail + ")").c_str();
}

cudaError_t cudaGetLastError() { return last_error(true); }
cudaError_t cudaPeekAtLastError() { return last_error(false); }

}  // extern "C"
