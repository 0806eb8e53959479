// A device's table in its memory, streams, capture, launches. Called by step_plan.cpp. A build without CUDA compiles
// only the answer that there is none.
#include "cuda/cuda_step.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/sgd_cuda.h"
#include "plan/dtypes.h"
#include "plan/undisturbed.h"

#if defined(WD_FUSED_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace wd_fused {

#if !defined(WD_FUSED_CUDA)

std::optional<std::string> cuda_architectures() { return std::nullopt; }
const std::string& why_not_on(c10::Device) {
  static const std::string reason = "the compiled module was built without its CUDA part";
  return reason;
}
CudaStep::CudaStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics)
    : DeviceStep(device, std::move(rows), std::move(serial)), numerics_(numerics) {
  throw std::runtime_error(why_not_on(device));
}
bool CudaStep::is_capturing() const { return false; }
void CudaStep::make_ready(const std::vector<const StridedLayout*>&) {}
void CudaStep::bring(const Inputs&) {}
void CudaStep::run(const Inputs&) {}
at::Tensor CudaStep::sums(const Inputs&) { return {}; }
at::Tensor CudaStep::grad_norm() { return {}; }
const std::vector<std::byte>* CudaStep::table() const { return nullptr; }

#else

namespace {

// Memory that no mode (fake tensors, inference, a tracker of operators) has a say in.
at::Tensor bytes_on(c10::Device device, size_t count) {
  const Undisturbed undisturbed;
  return at::empty({static_cast<int64_t>(count)}, at::TensorOptions(at::kByte).device(device));
}

using CurrentDevice = c10::cuda::CUDAGuard;  // torch's: putting back a device that has no context makes none there
c10::cuda::CUDAStream current_stream(c10::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()); }

// A stream of our own for each device. Memory for a table is taken for it and filled on it: neither waits for what runs
// on the user's streams, becomes a part of a graph that is being captured there, nor comes out of that graph's pool.
c10::cuda::CUDAStream upload_stream(c10::Device device) {
  static std::mutex mutex;
  static std::vector<void*> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device.index());
  if (streams.size() <= index) streams.resize(index + 1);
  if (streams[index] == nullptr) streams[index] = make_upload_stream();
  return c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(streams[index]), device.index());
}

at::Tensor upload(const std::vector<std::byte>& bytes, c10::Device device) {
  // Or taking memory would break a capture under way on another stream of this thread: the allocator allows itself what
  // that forbids only where the current stream is the one that is captured.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  const CurrentDevice current(device);
  const c10::cuda::CUDAStream stream = upload_stream(device);
  const c10::cuda::CUDAStreamGuard for_allocator(stream);
  at::Tensor memory = bytes_on(device, bytes.size());
  copy_to_device_and_wait(memory.mutable_data_ptr(), bytes.data(), bytes.size(), stream.stream());
  return memory;
}

// Nobody tells when a graph is gone that reads a table, and a replay must never find other data there: the table, some
// kilobytes, is kept.
void keep_for_ever(const at::Tensor& memory) {
  static std::mutex mutex;
  static auto* kept = new std::vector<at::Tensor>;  // not destroyed: CUDA may be gone by then
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(memory);
}

}  // namespace

std::optional<std::string> cuda_architectures() { return WD_FUSED_CUDA_ARCHS; }

const std::string& why_not_on(c10::Device device) {
  static std::mutex mutex;
  static std::array<std::optional<std::string>, 256> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& answer = answers[static_cast<uint8_t>(device.has_index() ? device.index() : 0)];
  if (!answer || !answer->empty()) {  // may have passed
    const c10::Device asked(device.type(), device.has_index() ? device.index() : 0);
    try {
      const CurrentDevice current(asked);
      answer = why_not_cuda(asked.index());
    } catch (const c10::Error& error) {
      answer = error.what_without_backtrace();
    }
  }
  return *answer;
}

CudaStep::CudaStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics)
    : DeviceStep(device, std::move(rows), std::move(serial)), numerics_(numerics) {}

bool CudaStep::is_capturing() const {
  const CurrentDevice current(device_);
  return wd_fused::is_capturing(current_stream(device_).stream());
}

void CudaStep::make_ready(const std::vector<const StridedLayout*>& layouts) {
  launched_.clear();
  grad_norm_ = at::Tensor();
  has_summed_ = false;
  plan_.reset();
  const bool has_options =
      std::any_of(row_options_.begin(), row_options_.end(), [](const RowOptions& options) { return options.is_used; });
  const CurrentDevice current(device_);
  plan_.emplace(rows_, has_options ? row_options_ : std::vector<RowOptions>{}, serial_, layouts, group_count_,
                numerics_);
  for (const CudaKernel& kernel : plan_->kernels()) load_kernel(kernel);
  memory_ = upload(*table(), device_);
  last_stream_.reset();
  kept_for_graphs_ = false;
  changed_ = false;
}

const std::vector<std::byte>* CudaStep::table() const { return plan_ ? &plan_->table().bytes() : nullptr; }

void CudaStep::note_use_of_table() {
  const auto stream = current_stream(device_);
  if (wd_fused::is_capturing(stream.stream())) {
    if (!kept_for_graphs_) keep_for_ever(memory_);
    kept_for_graphs_ = true;
  } else if (!last_stream_ || *last_stream_ != static_cast<c10::Stream>(stream)) {
    last_stream_ = stream;
    memory_.record_stream(stream);
  }
}

void CudaStep::bring(const Inputs& inputs) { refuse_what_a_graph_would_repeat(inputs); }

// Read on another stream than the step's, it is a use of the table there.
at::Tensor CudaStep::grad_norm() {
  if (!grad_norm_.defined()) return grad_norm_;
  const CurrentDevice current(device_);
  note_use_of_table();
  return grad_norm_;
}

at::Tensor CudaStep::in_table(size_t at, at::ScalarType dtype, at::IntArrayRef sizes) const {
  const Undisturbed undisturbed;
  const auto itemsize = static_cast<int64_t>(c10::elementSize(dtype));
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return memory_.narrow(0, static_cast<int64_t>(at), numel * itemsize).view(dtype).view(sizes);
}

void CudaStep::launch(const CudaPlan::Launch& launch) {
  launch_sgd(launch.kernel, launch.parameters.data(), launch.blocks, current_stream(device_).stream());
  launched_.push_back(&launch);
}

at::Tensor CudaStep::sums(const Inputs& inputs) {
  const auto groups = static_cast<int64_t>(group_count_);
  launched_.clear();
  copies_.clear();
  const CurrentDevice current(device_);
  if (!plan_->has_norm()) {
    const Undisturbed undisturbed;
    return at::zeros({groups}, at::TensorOptions(at::kDouble).device(device_));
  }
  refuse_norm_on_the_host();
  note_use_of_table();
  const std::vector<CudaGroupInput> of_groups = on_device(inputs.groups);
  const CudaAmp amp = on_device(inputs.amp);
  const StepOptionsInput input{inputs.rows,         inputs.scalars, of_groups, inputs.of_options,
                               inputs.option_steps, inputs.norm,    amp};
  for (const CudaPlan::Launch& norm : plan_->norms(memory_.const_data_ptr(), input)) launch(norm);
  has_summed_ = true;
  copies_.clear();
  return in_table(plan_->sums_at(), at::kDouble, {groups});
}

void CudaStep::run(const Inputs& inputs) {
  if (!std::exchange(has_summed_, false)) launched_.clear();
  copies_.clear();
  const CurrentDevice current(device_);
  const bool has_norm = forms_norm(inputs.norm);
  const at::ScalarType norm_dtype = inputs.norm.in_double ? at::kDouble : at::kFloat;
  std::vector<int64_t> sizes;
  if (inputs.norm.per_group) sizes.push_back(static_cast<int64_t>(group_count_));
  if (has_norm && !plan_->has_norm()) {
    const Undisturbed undisturbed;
    grad_norm_ = at::zeros(sizes, at::TensorOptions(norm_dtype).device(device_));
  }
  if (plan_->is_empty()) return;  // no row has an element
  note_use_of_table();
  const std::vector<CudaGroupInput> groups = on_device(inputs.groups);
  const CudaAmp amp = on_device(inputs.amp);
  const StepOptionsInput input{inputs.rows,         inputs.scalars, groups, inputs.of_options,
                               inputs.option_steps, inputs.norm,    amp};
  if (has_norm && plan_->has_norm()) {
    for (const CudaPlan::Launch& norm : plan_->norms(memory_.const_data_ptr(), input)) launch(norm);
    grad_norm_ = in_table(plan_->norms_at(), norm_dtype, sizes);
  }
  for (const CudaPlan::Launch* update : plan_->updates(memory_.const_data_ptr(), input)) launch(*update);
  copies_.clear();
}

#endif

}  // namespace wd_fused
