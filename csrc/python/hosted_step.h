// A device's rows stepped by an object of Python's, triton_kernels/device_step.py: this makes the table that its
// kernels walk and, where they have changed, the words that they read. Used by python_plan.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "plan/device_step.h"

namespace wd_fused {

class HostedStep final : public DeviceStep {
 public:
  HostedStep(c10::Device device, std::vector<Row> rows, std::vector<bool> serial, Numerics numerics,
             pybind11::object host)
      : DeviceStep(device, std::move(rows), std::move(serial)), numerics_(numerics), host_(std::move(host)) {}
  ~HostedStep() override;
  HostedStep(const HostedStep&) = delete;
  HostedStep& operator=(const HostedStep&) = delete;

  bool is_capturing() const override;
  void make_ready(const std::vector<const StridedLayout*>& layouts) override;
  void bring(const Inputs& inputs) override;
  void run(const Inputs& inputs) override;
  at::Tensor sums(const Inputs& inputs) override;
  at::Tensor grad_norm() override;

 private:
  // The fields of triton_kernels/launcher.py's Kernel and NormKernel.
  pybind11::tuple kernel_of(size_t row, const StridedLayout* layout) const;
  pybind11::tuple norm_kernel_of(uint32_t id) const;
  std::vector<uint64_t> words_of(const Inputs& inputs);
  void measure(const Inputs& inputs, const CudaAmp& amp);

  Numerics numerics_;
  pybind11::object host_;
  std::optional<Table> table_;
  NormTiles norm_tiles_;
  std::vector<uint64_t> words_;          // of the last step
  std::vector<size_t> launches_ending_;  // in words_: each launch's rows' words, then its groups'
  bool has_brought_ = false;
};

}  // namespace wd_fused
