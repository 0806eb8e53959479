// A device's rows stepped by an object of Python's, triton_kernels/device_step.py: this makes the table that its
// kernels walk and, where they have changed, the words that they read. Used by module.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

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
  // What a kernel is compiled for: the fields of triton_kernels/launcher.py's Kernel, and of its NormKernel.
  struct Kind {
    Storage storage;
    bool rounds;
    RowOptions options;
    bool operator==(const Kind& other) const;
    pybind11::tuple in_python(bool strided) const;
    pybind11::tuple norm_in_python(bool strided) const;
    bool has_norm_of(const Kind& other) const;
  };
  // The rows that one kernel steps together, and what a program's tile of them is.
  struct Launch {
    Kind kind;
    bool strided = false;
    std::vector<size_t> rows;
    int64_t elements = 0;
    int64_t at = 0;  // in the table's words
    int64_t tiles = 0;
  };
  struct Place {  // a group's words, for rows of one storage
    int32_t group;
    Storage storage;
    bool operator==(const Place& other) const { return group == other.group && storage == other.storage; }
  };

  bool has_options() const { return !row_options_.empty(); }
  Kind kind_of(size_t row) const;
  void find_places();
  std::vector<Launch> launches(const std::vector<const StridedLayout*>& layouts) const;
  std::vector<Launch> norm_launches(const std::vector<const StridedLayout*>& layouts) const;
  void add_tiles(Launch& launch, const std::vector<int64_t>& layout_of, std::vector<int64_t>& table) const;
  void add_norm(std::vector<Launch>& launches, const std::vector<int64_t>& layout_of, std::vector<int64_t>& table);
  std::vector<uint64_t> words_of(const Inputs& inputs);
  void measure(const Inputs& inputs, const CudaAmp& amp);

  Numerics numerics_;
  pybind11::object host_;
  std::vector<Place> places_;
  std::vector<size_t> group_word_;  // of the rows: where their groups' words begin
  std::vector<std::vector<size_t>> rows_of_launches_;
  int64_t ranges_at_ = 0;  // in the table's words: of the groups' sums
  int64_t large_groups_ = 0;
  std::vector<uint64_t> words_;  // of the last step
  bool has_brought_ = false;
};

}  // namespace wd_fused
