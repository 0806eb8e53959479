// The rows of one CUDA device: their table in its memory, and a step's launches on its current stream. Knows torch.
// Used by step_plan.cpp.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "device_step.h"

namespace wd_fused {

// What kind of device the CUDA part steps; none in a build without it.
std::optional<c10::DeviceType> cuda_device_type();
// The architectures that it was built for; none in a build without it.
std::optional<std::string> cuda_architectures();
// Why it cannot step tensors of a device, with the remedy; empty if it can.
const std::string& why_not_on(c10::Device device);

class CudaStep final : public DeviceStep {
 public:
  CudaStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics);

  bool is_capturing() const override;
  void make_ready(const std::vector<const StridedLayout*>& layouts) override;
  void run(const Inputs& inputs) override;

  // What the last run() launched.
  const std::vector<const CudaTable::Launch*>& launched() const { return launched_; }
  const std::optional<CudaTable>& table() const { return table_; }

 private:
  // The table's memory must outlive all that reads it: kernels on other streams than the one it was taken for, and
  // graphs.
  void note_use_of_table();

  Numerics numerics_;
  std::optional<CudaTable> table_;
  at::Tensor memory_;
  std::optional<c10::Stream> last_stream_;
  bool kept_for_graphs_ = false;
  std::vector<const CudaTable::Launch*> launched_;
};

}  // namespace wd_fused
