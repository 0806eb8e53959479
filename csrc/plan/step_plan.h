// StepPlan: what is fixed between steps (rows, tiles, momentum buffers), and the check that it still holds. Knows
// torch, not Python. Used by python_plan.cpp for FusedSGD and by ops.cpp for the operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/walk.h"
#include "cuda/cuda_step.h"
#include "plan/seen.h"

namespace wd_fused {

// A group's hyperparameters as the user gives them, in Python's double, or as tensors to be read by the step.
struct Hyperparameters {
  double lr = 0;
  double momentum = 0;
  double one_minus_dampening = 1;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
  TensorHyperparameters tensors{};
  bool has_options = false;
  GroupStep options{};
};

// A parameter's part of the optimizer's state beside the momentum buffer, undefined where there is no such thing:
// master weights, remainders or compensations; scales of an int8 momentum buffer; the average.
inline constexpr size_t kOptionTensors = 3;
struct OptionTensors {
  std::array<at::Tensor, kOptionTensors> all;
  at::Tensor& extra() { return all[0]; }
  at::Tensor& momentum_scale() { return all[1]; }
  at::Tensor& average() { return all[2]; }
};

// A parameter of the plan: its momentum buffer if it has one (else undefined), its group, its place there (for errors),
// what options make of it (without addresses) and their tensors.
struct PlannedParameter {
  at::Tensor param;
  at::Tensor momentum_buffer;
  int64_t group;
  int64_t index;
  RowOptions options{};
  OptionTensors option_tensors{};
  std::vector<int64_t> place{};  // of a shard, by dimension: StridedLayout's strides
};

// The rule of a multiply-add that torch's CPU operators follow in this process, found out by asking torch once: one
// rounding ("fused"), two ("separate", where ATen runs without AVX2), or not the same for all elements ("mixed").
enum class MultiplyAddRule : int8_t { fused, separate, mixed };
MultiplyAddRule multiply_add_rule();

// Makes what steps the rows of a device; serial: rows that may share memory, and must run in order.
using MakeDeviceStep =
    std::function<std::unique_ptr<DeviceStep>(c10::Device device, std::vector<Row> rows, std::vector<bool> serial)>;

class StepPlan {
 public:
  // Throws if a parameter or buffer is not what why_not_planned takes, or a buffer does not fit its parameter.
  // make_step is for a hosted target. groups: how many there are at least, some perhaps without a row here.
  StepPlan(std::vector<PlannedParameter> parameters, Numerics numerics, Target target,
           const MakeDeviceStep& make_step = {}, size_t groups = 0);

  // A step is begin(), read() for every row, make_ready(), then run(). Nothing is written before run(), and what can
  // fail, fails before. begin() takes the hyperparameters of all groups; those of groups without rows are not looked
  // at; amp is not for a plan on the CPU. abandon() forgets what was read since, as begin() does with a step that was
  // not run: run() then does nothing.
  void begin(const std::vector<Hyperparameters>& groups, Amp amp = {}, Norm norm = {});
  void abandon();
  bool is_ready() const;
  void make_ready();

  // Whether the step can read a hyperparameter, or GradScaler's word, from this tensor on its device: not on the CPU,
  // not where the step writes.
  bool can_read(const at::Tensor& tensor) const;

  enum class Reading {
    taken,
    no_gradient,
    stale,      // parameter or state is not what the plan was built on: point_anew(), or build a new one
    left,       // the gradient is of a kind that the plan does not take: why_left() tells
    entangled,  // the gradient shares memory with what the step writes: only torch's own order gives torch's result
  };
  // buffer is what the optimizer's state holds now (null: none); without one, a step with momentum makes it and fills
  // it. fill_buffer: a first step with momentum although there is a buffer. read() is for plans without options.
  // option_tensors: kOptionTensors of them, as the state holds them now.
  Reading read(int64_t row, const at::Tensor& param, const at::Tensor& gradient, const c10::TensorImpl* buffer,
               bool fill_buffer = false);
  Reading read_with_options(int64_t row, const at::Tensor& param, const at::Tensor& gradient,
                            const c10::TensorImpl* buffer, const c10::TensorImpl* const* option_tensors);
  // The momentum buffer of a row of a plan that must not keep it alive: put there before read(), taken away after
  // run().
  void lend(int64_t row, const at::Tensor& buffer) { rows_[static_cast<size_t>(row)].buffer = buffer; }
  // After a row was stale: points all rows to tensors that are others or lie elsewhere than before, if they are of the
  // same kind. point_anew() for every row, then overlaps_as_before(). False: this plan is of no use any more.
  bool point_anew(int64_t row, const at::Tensor& param, const c10::TensorImpl* buffer,
                  const c10::TensorImpl* const* option_tensors);
  bool overlaps_as_before();
  // Memory that others write in a step: that of a row must not meet it. Whether one does.
  bool keep_off(std::vector<Extent> others);
  // After all rows are read: whether a gradient that the step sets to zero is another row's gradient, too.
  bool zeroes_what_others_read();
  const std::string& why_left() const { return why_left_; }

  // Elements that run() will step, and the step itself. hold_memory() keeps what a row touches until then, where other
  // code may run in between; it takes storages, not tensors: those would close cycles as the plan's rows would.
  int64_t elements() const { return elements_; }
  bool has_options() const { return has_options_; }
  bool is_only_options() const { return is_only_options_; }
  size_t devices() const { return buckets_.size(); }
  Target target() const { return target_; }
  void hold_memory(int64_t row, const at::Tensor& param, const at::Tensor& gradient);
  void run();

  // Between reading and run(), for a step that clips. set_grad_scale(): what the gradients were multiplied with.
  // sums(): for each device float64 [groups], of squared gradients. form_coefficients(): waits for the sums, forms norm
  // and coefficients from them on the host; false: the norm is not finite and the step must be skipped or is an error.
  void set_grad_scale(const at::Tensor& grad_scale);
  void set_coefficients(std::vector<double> coefficients);
  std::vector<at::Tensor> sums();
  bool form_coefficients();
  // float32 or float64, [] or [groups]; undefined where no step has formed one.
  at::Tensor grad_norm() const;

  // After run(): the momentum buffers that this step made, with their rows.
  const std::vector<int64_t>& fresh_rows() const { return fresh_rows_; }
  const at::Tensor& momentum_buffer(int64_t row) const { return rows_[static_cast<size_t>(row)].buffer; }
  // Whether the row shares memory with another, so that the order of the two matters.
  bool is_serial(int64_t row) const { return rows_[static_cast<size_t>(row)].serial; }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }

  // A CUDA plan's launches in the last step, of all devices; and the bytes of their tables.
  std::vector<const CudaPlan::Launch*> launched() const;
  std::vector<std::vector<std::byte>> tables() const;

 private:
  struct PlanRow {
    Seen param;
    Seen buffer_seen;
    at::Tensor buffer;
    Geometry gradient;                       // of the gradient that layout was worked out for
    const void* gradient_address = nullptr;  // of the last gradient, which shared no memory with what is written
    Place gradient_place;                    // of the same
    caffe2::TypeMeta gradient_dtype;         // of the same
    std::unique_ptr<StridedLayout> layout;   // none: flat
    struct Options {
      RowOptions of_row;
      OptionTensors tensors;
      std::vector<int64_t> place;
      std::array<Seen, kOptionTensors> seen;
      std::array<bool, kOptionTensors> uses{};  // others may lie in the state, of options that are off by now
      bool lacks_state = false;                 // which the caller makes when there is a gradient
      // Whether the state still holds these tensors (null: none), and they are what they were.
      bool still_holds(const c10::TensorImpl* const* now) const;
      void take_addresses();  // of what was seen
    };
    std::unique_ptr<Options> options;  // none: no option is on
    RowInput* input = nullptr;         // in its bucket
    Row* table_row = nullptr;
    int32_t group = 0;
    bool serial = false;
    bool fresh = false;  // buffer was made by the step under way
    int64_t index = 0;
    int32_t bucket = 0;
    int32_t row = 0;  // in its bucket
  };
  // Rows of one device.
  struct Bucket {
    std::vector<RowInput> inputs;
    std::vector<RowOptions> row_options;  // of a CPU's rows, if any has one
    std::vector<double> squares;          // of a CPU's tiles, then of its serial rows
    std::optional<TensorTable> on_cpu;
    std::unique_ptr<DeviceStep> on_device;
    std::vector<Row>& rows() { return on_cpu ? on_cpu->rows() : on_device->rows(); }
    std::vector<RowOptions>& all_row_options() { return on_cpu ? row_options : on_device->row_options(); }
  };

  std::string named(const PlanRow& row) const;
  PlanRow planned(PlannedParameter& parameter) const;
  void add_options(PlanRow& row, PlannedParameter& parameter) const;
  void add_extents(const PlanRow& row, int32_t row_number, std::vector<Extent>& extents) const;
  // A gradient that is not just like the parameter, as the plan can read it, or undefined (why_left() tells why not);
  // throws where nobody can use it.
  at::Tensor usable_gradient(const PlanRow& row, const at::Tensor& param, const at::Tensor& gradient);
  template <bool kHasOptions>
  Reading read_row(int64_t row, const at::Tensor& param, const at::Tensor& gradient, const c10::TensorImpl* buffer,
                   bool fill_buffer, const c10::TensorImpl* const* option_tensors);
  void will_write(c10::TensorImpl* tensor) { written_[written_count_++] = tensor; }
  // Looks closely at a gradient that is not where and as the row's last one was.
  Reading read_new_gradient(PlanRow& row, const at::Tensor& param, const at::Tensor& gradient);
  void forget();
  void lay_out(PlanRow& row, at::IntArrayRef gradient_strides);
  CpuStep on_cpu(const Bucket& bucket) const;
  void run_on_cpu(const Bucket& bucket);
  std::vector<double> sums_on_cpu(Bucket& bucket);
  DeviceStep::Inputs inputs_of(const Bucket& bucket) const;
  void read_option_scalars(const Hyperparameters& hyperparameters, size_t group);

  Numerics numerics_;
  Target target_;
  std::vector<PlanRow> rows_;
  std::vector<Bucket> buckets_;
  std::vector<GroupScalars> scalars_;
  std::vector<DeviceStep::Group> groups_;
  Amp amp_;
  Norm norm_;
  at::Tensor grad_norm_;  // formed on the host
  std::vector<GroupOptions> of_options_;
  std::vector<GroupStep> option_steps_;
  bool has_options_ = false;
  bool is_only_options_ = true;
  bool has_zeroing_ = false;      // some row's gradient is set to zero
  bool gradients_moved_ = false;  // some gradient is not where it was when they were last looked at together
  std::vector<bool> group_used_;
  bool any_float_ = false;  // some row's opmath is float
  std::vector<int64_t> fresh_rows_;
  std::vector<int64_t> first_rows_;  // whose momentum buffers the step under way fills
  std::vector<c10::Storage> held_;   // memory of the step under way
  // Whose version counters rise: the first written_count_. Room for all of every row, since push_back() costs more.
  std::vector<c10::TensorImpl*> written_;
  size_t written_count_ = 0;
  int64_t elements_ = 0;
  ExtentSet written_memory_;
  ExtentSet others_memory_;
  std::string why_left_;
};

}  // namespace wd_fused
