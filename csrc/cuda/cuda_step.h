// The rows of one CUDA device: their table in its memory, and a step's launches on its current stream. Knows torch.
// Used by step_plan.cpp.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/cuda_parameters.h"
#include "plan/device_step.h"

namespace wd_fused {

// The architectures that the CUDA part was built for; none in a build without it.
std::optional<std::string> cuda_architectures();
// Why it cannot step tensors of a device, with the remedy; empty if it can.
const std::string& why_not_on(c10::Device device);

class CudaStep final : public DeviceStep {
 public:
  CudaStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics);

  bool is_capturing() const override;
  void make_ready(const std::vector<const StridedLayout*>& layouts) override;
  void bring(const Inputs& inputs) override;
  void run(const Inputs& inputs) override;
  at::Tensor sums(const Inputs& inputs) override;
  at::Tensor grad_norm() override;

  // What the last run(), and sums() before it, launched.
  const std::vector<const CudaPlan::Launch*>& launched() const { return launched_; }
  // The bytes of the table; null where there is none.
  const std::vector<std::byte>* table() const;

 private:
  // The table's memory must outlive all that reads it: kernels on other streams than the one it was taken for, and
  // graphs.
  void note_use_of_table();
  void launch(const CudaPlan::Launch& launch);
  // A view of the table's memory.
  at::Tensor in_table(size_t at, at::ScalarType dtype, at::IntArrayRef sizes) const;

  Numerics numerics_;
  std::optional<CudaPlan> plan_;
  at::Tensor memory_;
  std::optional<c10::Stream> last_stream_;
  bool kept_for_graphs_ = false;
  std::vector<const CudaPlan::Launch*> launched_;
  bool has_summed_ = false;  // for the step under way
  at::Tensor grad_norm_;     // in the table's memory
};

}  // namespace wd_fused
