// The rows of one CUDA device: their table in its memory, and a step's launches on its current stream. Knows torch.
// Used by step_plan.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda_table.h"

namespace wd_fused {

// What kind of device the CUDA part steps; none in a build without it.
std::optional<c10::DeviceType> cuda_device_type();
// The architectures that it was built for; none in a build without it.
std::optional<std::string> cuda_architectures();
// Why it cannot step tensors of a device, with the remedy; empty if it can.
const std::string& why_not_on(c10::Device device);

// What torch.amp.GradScaler leaves to an optimizer: one float32 each, undefined where there is none.
struct Amp {
  at::Tensor grad_scale;
  at::Tensor found_inf;
  bool is_used() const { return grad_scale.defined() || found_inf.defined(); }
};

// Hyperparameters that are tensors, to be read where the step runs; undefined: they are plain numbers.
struct TensorHyperparameters {
  at::Tensor lr;
  at::Tensor weight_decay;
};

class CudaStep {
 public:
  CudaStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics);

  std::vector<Row>& rows() { return rows_; }
  bool is_capturing() const;  // its current stream
  // A momentum buffer or a layout of a row is another than when the table was made.
  void set_changed() { changed_ = true; }
  bool is_changed() const { return changed_; }
  // Makes the table anew and puts it into device memory: what can fail for want of memory.
  void make_ready(const std::vector<const StridedLayout*>& layouts);

  struct Group {
    TensorHyperparameters tensors;
    bool has_momentum;
  };
  void run(const std::vector<RowInput>& inputs, const std::vector<GroupScalars>& scalars,
           const std::vector<Group>& groups, const Amp& amp);

  // What the last run() launched.
  const std::vector<const CudaTable::Launch*>& launched() const { return launched_; }
  const std::optional<CudaTable>& table() const { return table_; }

 private:
  DeviceScalar on_device(const at::Tensor& tensor);
  at::Tensor here(const at::Tensor& tensor);
  // The table's memory must outlive all that reads it: kernels on other streams than the one it was taken for, and
  // graphs.
  void note_use_of_table();

  c10::Device device_;
  std::vector<Row> rows_;
  std::vector<bool> serial_;
  Numerics numerics_;
  bool changed_ = true;
  std::optional<CudaTable> table_;
  at::Tensor memory_;
  std::optional<c10::Stream> last_stream_;
  bool kept_for_graphs_ = false;
  std::vector<CudaGroupInput> groups_;
  std::vector<at::Tensor> copies_;  // of other devices' tensors, for the step under way
  std::vector<const CudaTable::Launch*> launched_;
};

}  // namespace wd_fused
