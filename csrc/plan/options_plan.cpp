// What a plan does for rows with options: their state checked, a group's numbers, the norm and its coefficients. Called
// by step_plan.cpp and python_plan.cpp.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "plan/dtypes.h"
#include "plan/plan_tensors.h"
#include "plan/step_plan.h"
#include "plan/undisturbed.h"

namespace wd_fused {
namespace {

// What the step itself adds: the gradients' scale and the coefficient of the norm.
template <class Op>
void unscale(OptionScalars<Op>& scalars, const at::Tensor& grad_scale) {
  scalars.inverse_scale = grad_scale.defined() ? reciprocal(*grad_scale.const_data_ptr<float>()) : 1.0f;
}
template <class Op>
void clip(OptionScalars<Op>& scalars, double coefficient) {
  scalars.clip = static_cast<Op>(coefficient);
}

template <class Op>
std::pair<double, double> norm_and_coefficient(double sum_of_squares, double max_norm) {
  const auto norm = static_cast<Op>(std::sqrt(sum_of_squares));
  return {norm, clip_coefficient(norm, static_cast<Op>(max_norm))};
}

}  // namespace

void DeviceStep::refuse_what_a_graph_would_repeat(const Inputs& inputs) const {
  if (row_options_.empty() || !is_capturing()) return;
  const auto refuse = [&](size_t row, const char* what) {
    throw std::runtime_error(
        joined("group ", rows_[row].group, ", parameter ", row_options_[row].position, ": ", what));
  };
  for (size_t r = 0; r < rows_.size(); ++r) {
    const RowInput& input = inputs.rows[r];
    const GroupStep& step = inputs.option_steps[static_cast<size_t>(rows_[r].group)];
    if (row_options_[r].stochastic && input.gradient != nullptr)
      refuse(r,
             "stochastic rounding cannot be captured in a CUDA graph: every replay would round with the same random "
             "numbers");
    if (!row_options_[r].averages || (input.gradient == nullptr && !input.is_averaged) || !step.average_varies)
      continue;
    if (step.average_weight == 1)
      refuse(r,
             "the first step of an average cannot be captured in a CUDA graph, which would start it anew at every "
             "replay: call step() once before the capture");
    refuse(r,
           "an average whose decay changes from step to step (ema_warmup) cannot be captured in a CUDA graph: every "
           "replay would take this step's decay");
  }
}

// The tensors of a row's options, checked.
void StepPlan::add_options(PlanRow& row, PlannedParameter& parameter) const {
  row.options = std::make_unique<PlanRow::Options>();
  row.options->of_row = parameter.options;
  row.options->tensors = std::move(parameter.option_tensors);
  row.options->place = std::move(parameter.place);
  RowOptions& options = row.options->of_row;
  OptionTensors& tensors = row.options->tensors;
  const at::Tensor& param = parameter.param;
  options.position = static_cast<int32_t>(parameter.index);
  const Storage storage = *storage_of(param.dtype());
  constexpr at::ScalarType kExtras[] = {at::kFloat, at::kFloat, at::kShort, at::kChar};
  const at::ScalarType extra =
      options.weights == Weights::kahan ? param.scalar_type() : kExtras[static_cast<size_t>(options.weights)];
  const int64_t blocks = (param.numel() + kMomentumBlock - 1) / kMomentumBlock;
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
    const std::string reason = why_not_in_state(tensor, target_);
    if (!reason.empty()) throw std::runtime_error(joined(named(row), " cannot be planned: its ", name, ": ", reason));
    if (tensor.sizes() != sizes || tensor.scalar_type() != dtype || tensor.device() != param.device())
      throw std::runtime_error(joined(named(row), " cannot be planned: its ", name, " has shape ", tensor.sizes(),
                                      ", dtype ", name_of(tensor.dtype()), " and is on ", tensor.device(),
                                      "; it must have shape ", sizes, ", dtype ",
                                      name_of(caffe2::TypeMeta::fromScalarType(dtype)), " and be on ", param.device()));
  };
  if (tensors.extra().defined()) check(tensors.extra(), "master weight's part in the state", param.sizes(), extra);
  if (tensors.momentum_scale().defined()) {
    check(tensors.momentum_scale(), "momentum_scale", {blocks}, at::kFloat);
    if (!tensors.momentum_scale().is_contiguous())
      throw std::runtime_error(named(row) + " cannot be planned: its momentum_scale is not contiguous");
  }
  if (options.averages) {
    at::ScalarType dtype = param.scalar_type();
    if (tensors.average().defined()) {
      if (bytes_of(storage) == 2 && tensors.average().scalar_type() == at::kFloat) dtype = at::kFloat;
      check(tensors.average(), "ema", param.sizes(), dtype);
    }
    options.average_storage = *storage_of(caffe2::TypeMeta::fromScalarType(dtype));
  }
  options.gradient = storage;
  row.options->uses = {options.weights != Weights::parameter, options.momentum == Storage::int8, options.averages};
  row.options->lacks_state = (options.weights != Weights::parameter && !tensors.extra().defined()) ||
                             (options.averages && !tensors.average().defined());
  for (size_t t = 0; t < kOptionTensors; ++t)
    if (tensors.all[t].defined()) row.options->seen[t] = Seen(*tensors.all[t].unsafeGetTensorImpl());
  row.options->take_addresses();
  if (!tensors.extra().defined()) options.weights = Weights::parameter;  // which is all that is averaged until then
  options.rounds = bytes_of(storage) == 2 && numerics_ == Numerics::torch && options.weights == Weights::parameter &&
                   !options.stochastic && options.momentum == storage;
}

void StepPlan::PlanRow::Options::take_addresses() {
  of_row.extra = const_cast<void*>(seen[0].data);
  of_row.momentum_scale = static_cast<float*>(const_cast<void*>(seen[1].data));
  of_row.average = const_cast<void*>(seen[2].data);
}

void StepPlan::read_option_scalars(const Hyperparameters& h, size_t group) {
  const GroupStep& step = option_steps_[group] = h.options;
  const double keep = 1 - h.lr * step.decoupled;
  GroupOptions& options = of_options_[group];
  options.in_double = {1, 1, step.l1, keep, step.average_weight, step.l1 != 0, step.decoupled != 0};
  if (any_float_)
    options.in_float = {1,
                        1,
                        in_float(step.l1, "l1_penalty", group),
                        in_float(keep, "1 - lr * weight_decay", group),
                        static_cast<float>(step.average_weight),
                        step.l1 != 0,
                        step.decoupled != 0};
  options.random_key[0] = static_cast<uint32_t>(step.random_key);
  options.random_key[1] = static_cast<uint32_t>(step.random_key >> 32);
  if (target_ == Target::cpu && amp_.grad_scale.defined()) {
    unscale(options.in_float, amp_.grad_scale);
    unscale(options.in_double, amp_.grad_scale);
  }
}

void StepPlan::set_grad_scale(const at::Tensor& grad_scale) {
  amp_.grad_scale = grad_scale;
  if (target_ != Target::cpu) return;
  for (GroupOptions& options : of_options_) {
    unscale(options.in_float, grad_scale);
    unscale(options.in_double, grad_scale);
  }
}

void StepPlan::set_coefficients(std::vector<double> coefficients) {
  if (coefficients.size() != of_options_.size())
    throw std::runtime_error(joined(coefficients.size(), " coefficients for ", of_options_.size(), " groups"));
  for (size_t g = 0; g < of_options_.size(); ++g) {
    clip(of_options_[g].in_float, coefficients[g]);
    clip(of_options_[g].in_double, coefficients[g]);
  }
  norm_.coefficients = std::move(coefficients);
}

std::vector<at::Tensor> StepPlan::sums() {
  std::vector<at::Tensor> result;
  for (Bucket& bucket : buckets_) {
    if (bucket.on_cpu) {
      const std::vector<double> sums = sums_on_cpu(bucket);
      const Undisturbed undisturbed;
      at::Tensor& tensor = result.emplace_back(at::empty({static_cast<int64_t>(sums.size())}, at::kDouble));
      std::copy(sums.begin(), sums.end(), tensor.mutable_data_ptr<double>());
    } else {
      bucket.on_device->bring(inputs_of(bucket));
      result.push_back(bucket.on_device->sums(inputs_of(bucket)));
    }
  }
  return result;
}

bool StepPlan::form_coefficients() {
  std::vector<double> sums(of_options_.size());
  if (target_ == Target::cpu) {
    for (Bucket& bucket : buckets_) sums = sums_on_cpu(bucket);  // there is one
  } else {
    for (const at::Tensor& tensor : this->sums()) {
      const Undisturbed undisturbed;
      const at::Tensor on_cpu = tensor.cpu();
      for (size_t g = 0; g < sums.size(); ++g) sums[g] += on_cpu.const_data_ptr<double>()[g];
    }
  }
  double total = 0;
  for (size_t g = 0; g < sums.size(); ++g)
    if (option_steps_[g].clips()) total += sums[g];
  std::vector<double> norms(sums.size(), std::numeric_limits<double>::quiet_NaN());
  std::vector<double> coefficients(sums.size(), 1.0);
  bool is_finite = true;
  double norm = static_cast<double>(norm_.in_double ? std::sqrt(total) : static_cast<float>(std::sqrt(total)));
  for (size_t g = 0; g < sums.size(); ++g) {
    if (!option_steps_[g].clips()) continue;
    const double squares = norm_.per_group ? sums[g] : total;
    const auto both = norm_.in_double ? norm_and_coefficient<double>(squares, option_steps_[g].max_norm)
                                      : norm_and_coefficient<float>(squares, option_steps_[g].max_norm);
    norms[g] = both.first;
    coefficients[g] = both.second;
    is_finite &= std::isfinite(both.first);
  }
  const Undisturbed undisturbed;
  std::vector<int64_t> sizes;
  if (norm_.per_group) sizes.push_back(static_cast<int64_t>(norms.size()));
  grad_norm_ = at::empty(sizes, norm_.in_double ? at::kDouble : at::kFloat);
  for (size_t g = 0; g < static_cast<size_t>(grad_norm_.numel()); ++g) {
    const double value = norm_.per_group ? norms[g] : norm;
    if (norm_.in_double)
      grad_norm_.mutable_data_ptr<double>()[g] = value;
    else
      grad_norm_.mutable_data_ptr<float>()[g] = static_cast<float>(value);
  }
  set_coefficients(std::move(coefficients));
  return is_finite;
}

at::Tensor StepPlan::grad_norm() const {
  if (grad_norm_.defined()) return grad_norm_;
  return buckets_.size() == 1 && buckets_[0].on_device ? buckets_[0].on_device->grad_norm() : at::Tensor();
}

bool StepPlan::zeroes_what_others_read() {
  if (!has_zeroing_ || !gradients_moved_) return false;
  std::vector<Extent> extents;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const PlanRow& row = rows_[r];
    if (row.input->gradient == nullptr) continue;
    const auto begin = reinterpret_cast<uintptr_t>(row.input->gradient);
    const at::IntArrayRef sizes = row.gradient.sizes();
    int64_t last = row.table_row->numel == 0 ? -1 : 0;
    for (size_t d = 0; d < sizes.size() && last >= 0; ++d) last += (sizes[d] - 1) * row.gradient.strides()[d];
    extents.push_back(
        {begin, begin + static_cast<uintptr_t>(last + 1) * row.gradient_dtype.itemsize(), static_cast<int32_t>(r)});
  }
  const std::vector<bool> meets = rows_that_meet(std::move(extents), size());
  gradients_moved_ = std::any_of(meets.begin(), meets.end(), [](bool meets_another) { return meets_another; });
  return gradients_moved_;
}

// Summed in the order of the tiles, whatever the number of threads.
std::vector<double> StepPlan::sums_on_cpu(Bucket& bucket) {
  const TensorTable& table = *bucket.on_cpu;
  const CpuStep step = on_cpu(bucket);
  bucket.squares.resize(table.tiles().size());
  for_tiles(table, elements_,
            [&](int64_t first, int64_t last) { square_cpu_tiles(step, first, last, bucket.squares.data()); });
  std::vector<double> sums(of_options_.size());
  const auto group_of = [&](int32_t row) { return static_cast<size_t>(table.rows()[static_cast<size_t>(row)].group); };
  for (size_t t = 0; t < bucket.squares.size(); ++t) sums[group_of(table.tiles()[t].row)] += bucket.squares[t];
  for (const int32_t row : table.serial_rows()) sums[group_of(row)] += square_cpu_row(step, row);
  return sums;
}

}  // namespace wd_fused
