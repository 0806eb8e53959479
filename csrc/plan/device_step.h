// What steps the rows of a device other than the CPU, as a plan sees it: the CUDA part, or a caller that launches
// kernels of its own (triton_kernels/device_step.py, through hosted_step.cpp). Knows torch. Used by step_plan.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "plan/dtypes.h"
#include "plan/group_words.h"
#include "update/options.h"

namespace wd_fused {

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

class DeviceStep {
 public:
  struct Group {
    TensorHyperparameters tensors;
    bool has_momentum;
  };
  // All that changes from step to step.
  struct Inputs {
    const std::vector<RowInput>& rows;
    const std::vector<GroupScalars>& scalars;
    const std::vector<Group>& groups;
    const Amp& amp;
    const std::vector<GroupOptions>& of_options;  // one a group; without the coefficients of a norm that the step forms
    const std::vector<GroupStep>& option_steps;   // the same before conversions
    const Norm& norm;
  };

  // serial: rows that may share memory, and must run in order.
  DeviceStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial)
      : device_(device), rows_(std::move(rows)), serial_(std::move(serial)) {}
  virtual ~DeviceStep() = default;
  DeviceStep(const DeviceStep&) = delete;
  DeviceStep& operator=(const DeviceStep&) = delete;

  std::vector<Row>& rows() { return rows_; }
  // What options make of the rows, one each; none where there are none.
  std::vector<RowOptions>& row_options() { return row_options_; }
  // Groups of the whole plan, with or without rows on this device.
  void set_group_count(size_t count) { group_count_ = count; }
  // A momentum buffer or a layout of a row is another than when the table was made.
  void set_changed() { changed_ = true; }
  bool is_changed() const { return changed_; }
  virtual bool is_capturing() const = 0;  // its current stream
  // Makes the table anew: what can fail for want of memory, or of a kernel.
  virtual void make_ready(const std::vector<const StridedLayout*>& layouts) = 0;
  // The step itself, on all devices: first bring(), which may still fail, then run().
  virtual void bring(const Inputs&) {}
  virtual void run(const Inputs& inputs) = 0;
  // After bring(): the groups' sums of squared gradients, float64 [groups], on the device.
  virtual at::Tensor sums(const Inputs&) { throw std::runtime_error("no kernel for the sums of squared gradients"); }
  // The norm of the last run() that formed one: float32 or float64, [] or [groups]; undefined before.
  virtual at::Tensor grad_norm() { return {}; }

 protected:
  // A replay repeats a captured step's numbers: what the host makes anew for every step would be the same each time.
  void refuse_what_a_graph_would_repeat(const Inputs& inputs) const;
  void refuse_norm_on_the_host() const {
    if (is_capturing())
      throw std::runtime_error(
          "a step that forms the norm on the host (parameters on several devices, or error_if_nonfinite=True) cannot "
          "be captured in a CUDA graph");
  }
  // The tensor on this device; a copy of another's is kept in copies_.
  at::Tensor here(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() == device_) return tensor;
    copies_.push_back(tensor.to(device_, tensor.scalar_type(), /*non_blocking=*/true));
    return copies_.back();
  }
  DeviceScalar on_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return {};
    return {here(tensor).const_data_ptr(), read_as(*storage_of(tensor.dtype()))};
  }
  std::vector<CudaGroupInput> on_device(const std::vector<Group>& groups) {
    std::vector<CudaGroupInput> result;
    result.reserve(groups.size());
    for (const Group& group : groups)
      result.push_back({on_device(group.tensors.lr), on_device(group.tensors.weight_decay), group.has_momentum});
    return result;
  }
  CudaAmp on_device(const Amp& amp) {
    CudaAmp result;
    if (amp.grad_scale.defined()) result.grad_scale = here(amp.grad_scale).const_data_ptr<float>();
    if (amp.found_inf.defined()) result.found_inf = here(amp.found_inf).const_data_ptr<float>();
    return result;
  }

  c10::Device device_;
  std::vector<Row> rows_;
  std::vector<bool> serial_;
  std::vector<RowOptions> row_options_;
  size_t group_count_ = 0;
  bool changed_ = true;
  std::vector<at::Tensor> copies_;  // of other devices' tensors, for the step under way
};

}  // namespace wd_fused
