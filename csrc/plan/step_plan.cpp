// Builds a plan from tensors, points it to others, and runs it. Called by python_plan.cpp and ops.cpp.
#include "plan/step_plan.h"

#include <ATen/ops/add.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "plan/dtypes.h"
#include "plan/plan_tensors.h"
#include "plan/undisturbed.h"

namespace wd_fused {
namespace {

bool decays(const Hyperparameters& h) { return h.weight_decay != 0 && h.options.l2; }

Scalars<double> double_scalars(const Hyperparameters& h) {
  return {-h.lr, h.momentum, h.one_minus_dampening, h.weight_decay, decays(h), h.nesterov, h.maximize};
}

Scalars<float> float_scalars(const Hyperparameters& h, size_t group) {
  return {-in_float(h.lr, "lr", group),
          in_float(h.momentum, "momentum", group),
          in_float(h.one_minus_dampening, "1 - dampening", group),
          in_float(h.weight_decay, "weight_decay", group),
          decays(h),
          h.nesterov,
          h.maximize};
}

MultiplyAddRule ask_torch() {
  // a*x is 1 + 2^-11 + 2^-24: rounded it loses the last term. 67 elements are whole vectors and a rest.
  const double a = 1 + 0x1p-12;
  const Undisturbed undisturbed;
  const at::Tensor sum = at::add(at::full({67}, -1.0, at::kFloat), at::full({67}, a, at::kFloat), a);
  const auto* values = sum.const_data_ptr<float>();
  const auto fused = std::count(values, values + 67, 0x1p-11f + 0x1p-24f);
  return fused == 67 ? MultiplyAddRule::fused : fused == 0 ? MultiplyAddRule::separate : MultiplyAddRule::mixed;
}

// A version counter lies on the heap, and counting it is an atomic operation, before which no later load begins.
void fetch_counter(const c10::TensorImpl& tensor) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*), "a pointer to the counter");
  const void* counter = nullptr;
  std::memcpy(&counter, &tensor.version_counter(), sizeof(counter));
  __builtin_prefetch(counter, 1);
}

}  // namespace

MultiplyAddRule multiply_add_rule() {
  static const MultiplyAddRule rule = ask_torch();
  return rule;
}

StepPlan::StepPlan(std::vector<PlannedParameter> parameters, Numerics numerics, Target target,
                   const MakeDeviceStep& make_step, size_t groups)
    : numerics_(numerics), target_(target), group_used_(groups) {
  struct Rows {
    std::vector<Row> rows;
    std::vector<RowOptions> options;
    std::vector<bool> serial;
  };
  std::vector<c10::Device> devices;
  std::vector<Rows> of_device;
  std::vector<Extent> extents;
  rows_.reserve(parameters.size());
  for (PlannedParameter& parameter : parameters) {
    PlanRow& row = rows_.emplace_back(planned(parameter));
    add_extents(row, static_cast<int32_t>(rows_.size()) - 1, extents);
    const auto place = std::find(devices.begin(), devices.end(), row.param.device);
    row.bucket = static_cast<int32_t>(place - devices.begin());
    if (place == devices.end()) {
      devices.push_back(row.param.device);
      of_device.emplace_back();
    }
    Rows& own = of_device[static_cast<size_t>(row.bucket)];
    row.row = static_cast<int32_t>(own.rows.size());
    own.options.push_back(row.options ? row.options->of_row : RowOptions{});
    own.rows.push_back({const_cast<void*>(row.param.data),
                        row.buffer.defined() ? const_cast<void*>(row.buffer_seen.data) : nullptr,
                        parameter.param.numel(), row.group, *storage_of(row.param.dtype)});
    if (static_cast<size_t>(row.group) >= group_used_.size()) group_used_.resize(static_cast<size_t>(row.group) + 1);
    group_used_[static_cast<size_t>(row.group)] = true;
    any_float_ |= own.rows.back().storage != Storage::float64;
    has_options_ |= parameter.options.is_used;
    has_zeroing_ |= parameter.options.zeroes;
    is_only_options_ &= parameter.options.is_used;
  }
  const std::vector<bool> meets = rows_that_meet(extents, size());
  written_memory_ = ExtentSet(std::move(extents));
  for (size_t r = 0; r < rows_.size(); ++r)
    of_device[static_cast<size_t>(rows_[r].bucket)].serial.push_back(rows_[r].serial = meets[r]);
  for (size_t d = 0; d < devices.size(); ++d) {
    Bucket& bucket = buckets_.emplace_back();
    auto& [rows, options, serial] = of_device[d];
    bucket.inputs.resize(rows.size(), RowInput{nullptr, nullptr, Momentum::none});
    if (target == Target::cpu)
      bucket.on_cpu.emplace(std::move(rows), serial);
    else if (target == Target::cuda)
      bucket.on_device = std::make_unique<CudaStep>(devices[d], std::move(rows), std::move(serial), numerics);
    else
      bucket.on_device = make_step(devices[d], std::move(rows), std::move(serial));
    if (has_options_) bucket.all_row_options() = std::move(options);
    if (bucket.on_device) bucket.on_device->set_group_count(group_used_.size());
  }
  written_.resize(rows_.size() * (has_options_ ? 3 + kOptionTensors : 2));
  for (PlanRow& row : rows_) {
    Bucket& bucket = buckets_[static_cast<size_t>(row.bucket)];
    row.input = &bucket.inputs[static_cast<size_t>(row.row)];
    row.table_row = &bucket.rows()[static_cast<size_t>(row.row)];
    lay_out(row, row.param.geometry.strides().vec());
  }
}

// A row, its tensors checked.
StepPlan::PlanRow StepPlan::planned(PlannedParameter& parameter) const {
  PlanRow row;
  row.group = static_cast<int32_t>(parameter.group);
  row.index = parameter.index;
  for (const at::Tensor* tensor : {&parameter.param, &parameter.momentum_buffer}) {
    if (!tensor->defined()) continue;
    const bool is_int8 = tensor->scalar_type() == at::kChar && parameter.options.momentum == Storage::int8;
    const std::string reason = is_int8 ? why_not_in_state(*tensor, target_) : why_not_planned(*tensor, target_);
    if (!reason.empty()) throw std::runtime_error(named(row) + " cannot be planned: " + reason);
  }
  row.param = Seen(*parameter.param.unsafeGetTensorImpl());
  row.gradient_dtype = row.param.dtype;
  if (parameter.options.is_used) add_options(row, parameter);
  if (!parameter.momentum_buffer.defined()) return row;
  row.buffer = parameter.momentum_buffer;
  row.buffer_seen = Seen(*row.buffer.unsafeGetTensorImpl());
  if (row.buffer.sizes() != parameter.param.sizes() ||
      row.buffer.scalar_type() !=
          (row.options ? dtype_of(row.options->of_row.momentum) : parameter.param.scalar_type()) ||
      row.buffer.device() != parameter.param.device())
    throw std::runtime_error(named(row) + " cannot be planned: its momentum buffer has another shape, dtype or device");
  return row;
}

std::string StepPlan::named(const PlanRow& row) const { return joined("group ", row.group, ", parameter ", row.index); }

void StepPlan::lay_out(PlanRow& row, at::IntArrayRef gradient_strides) {
  const Geometry& param = row.param.geometry;
  const Geometry& buffer = row.buffer.defined() ? row.buffer_seen.geometry : param;
  row.gradient = Geometry(param.sizes(), gradient_strides);
  const bool was_flat = row.layout == nullptr;
  if (!row.options && row.param.is_contiguous && gradient_strides == param.strides() &&
      buffer.strides() == param.strides()) {
    row.layout = nullptr;  // as nearly always, and told in a tenth of the time
    if (target_ != Target::cpu && !was_flat) buckets_[static_cast<size_t>(row.bucket)].on_device->set_changed();
    return;
  }
  StridedLayout layout;
  layout.sizes = param.sizes().vec();
  layout.strides[StridedLayout::param] = param.strides().vec();
  layout.strides[StridedLayout::gradient] = gradient_strides.vec();
  layout.strides[StridedLayout::momentum_buffer] = buffer.strides().vec();
  if (row.options && row.options->tensors.extra().defined())
    layout.strides[StridedLayout::extra] = row.options->seen[0].geometry.strides().vec();
  if (row.options && row.options->tensors.average().defined())
    layout.strides[StridedLayout::average] = row.options->seen[2].geometry.strides().vec();
  if (row.options) layout.strides[StridedLayout::place] = row.options->place;
  layout = simplified(layout);
  row.layout = is_flat(layout) ? nullptr : std::make_unique<StridedLayout>(std::move(layout));
  if (target_ != Target::cpu && !(was_flat && row.layout == nullptr))
    buckets_[static_cast<size_t>(row.bucket)].on_device->set_changed();
}

void StepPlan::add_extents(const PlanRow& row, int32_t row_number, std::vector<Extent>& extents) const {
  extents.push_back(row.param.extent(row_number));
  if (row.buffer.defined()) extents.push_back(row.buffer_seen.extent(row_number));
  if (!row.options) return;
  for (size_t t = 0; t < kOptionTensors; ++t)
    if (row.options->tensors.all[t].defined()) extents.push_back(row.options->seen[t].extent(row_number));
}

bool StepPlan::point_anew(int64_t row_number, const at::Tensor& param, const c10::TensorImpl* buffer,
                          const c10::TensorImpl* const* option_tensors) {
  PlanRow& row = rows_[static_cast<size_t>(row_number)];
  Bucket& bucket = buckets_[static_cast<size_t>(row.bucket)];
  const auto takes = [this](Seen& seen, at::Tensor& tensor, const c10::TensorImpl* now) {
    if (now == nullptr || !tensor.defined()) return now == nullptr && !tensor.defined();
    if (!seen.takes(*now, target_)) return false;
    if (now != tensor.unsafeGetTensorImpl()) tensor = owned(now);
    return true;
  };
  if (!row.param.takes(*param.unsafeGetTensorImpl(), target_) || !takes(row.buffer_seen, row.buffer, buffer))
    return false;
  row.table_row->param = const_cast<void*>(row.param.data);
  row.table_row->momentum_buffer = row.buffer.defined() ? const_cast<void*>(row.buffer_seen.data) : nullptr;
  if (row.options) {
    for (size_t t = 0; t < kOptionTensors; ++t)
      if (row.options->uses[t] && !takes(row.options->seen[t], row.options->tensors.all[t], option_tensors[t]))
        return false;
    row.options->take_addresses();
    bucket.all_row_options()[static_cast<size_t>(row.row)] = row.options->of_row;
  }
  row.gradient_place = {};
  return true;
}

bool StepPlan::overlaps_as_before() {
  std::vector<Extent> extents;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const size_t first = extents.size();
    add_extents(rows_[r], static_cast<int32_t>(r), extents);
    for (size_t i = first; i < extents.size(); ++i)
      for (size_t j = first; j < i; ++j)
        if (std::max(extents[i].begin, extents[j].begin) < std::min(extents[i].end, extents[j].end)) return false;
    if (std::any_of(extents.begin() + static_cast<ptrdiff_t>(first), extents.end(),
                    [this](const Extent& extent) { return others_memory_.meets(extent); }))
      return false;
  }
  const std::vector<bool> meets = rows_that_meet(extents, size());
  for (size_t r = 0; r < rows_.size(); ++r)
    if (rows_[r].serial != meets[r]) return false;
  written_memory_ = ExtentSet(std::move(extents));
  for (Bucket& bucket : buckets_)
    if (bucket.on_device) bucket.on_device->set_changed();
  return true;
}

bool StepPlan::keep_off(std::vector<Extent> others) {
  const bool meets =
      std::any_of(others.begin(), others.end(), [this](const Extent& other) { return written_memory_.meets(other); });
  others_memory_ = ExtentSet(std::move(others));
  return meets;
}

void StepPlan::abandon() {
  for (const int64_t r : fresh_rows_) {
    PlanRow& row = rows_[static_cast<size_t>(r)];
    if (row.fresh) row.buffer = at::Tensor();
    row.fresh = false;
  }
  for (Bucket& bucket : buckets_)
    for (RowInput& input : bucket.inputs) {
      input.gradient = nullptr;
      input.is_averaged = false;
    }
  fresh_rows_.clear();
  forget();
}

// All that was kept for the step alone.
void StepPlan::forget() {
  first_rows_.clear();
  written_count_ = 0;
  held_.clear();
  amp_ = {};
  for (DeviceStep::Group& group : groups_) group.tensors = {};
  elements_ = 0;
}

void StepPlan::begin(const std::vector<Hyperparameters>& groups, Amp amp, Norm norm) {
  if (groups.size() < group_used_.size()) throw std::runtime_error("fewer groups than the plan was built on");
  abandon();
  amp_ = std::move(amp);
  norm_ = std::move(norm);
  if (has_options_) {
    of_options_.resize(group_used_.size());
    option_steps_.resize(group_used_.size());
  }
  scalars_.resize(group_used_.size());
  groups_.resize(group_used_.size());
  for (size_t g = 0; g < group_used_.size(); ++g) {
    if (!group_used_[g]) continue;
    scalars_[g].in_double = double_scalars(groups[g]);
    if (any_float_) scalars_[g].in_float = float_scalars(groups[g], g);
    groups_[g] = {groups[g].tensors, groups[g].momentum != 0};
    if (has_options_) read_option_scalars(groups[g], g);
  }
}

bool StepPlan::can_read(const at::Tensor& tensor) const {
  return is_plain(tensor.key_set(), target_) && tensor.numel() == 1 && storage_of(tensor.dtype()) &&
         !lacks_memory(*tensor.unsafeGetTensorImpl()) && is_aligned_for(target_, *tensor.unsafeGetTensorImpl()) &&
         !written_memory_.meets(extent_of(*tensor.unsafeGetTensorImpl(), -1));
}

bool StepPlan::is_ready() const {
  return target_ == Target::cpu ||
         (first_rows_.empty() &&
          std::none_of(buckets_.begin(), buckets_.end(), [](const auto& b) { return b.on_device->is_changed(); }));
}

void StepPlan::make_ready() {
  if (target_ == Target::cpu) return;
  for (size_t b = 0; b < buckets_.size(); ++b) {
    DeviceStep& step = *buckets_[b].on_device;
    const auto first = std::find_if(first_rows_.begin(), first_rows_.end(), [&](int64_t r) {
      return rows_[static_cast<size_t>(r)].bucket == static_cast<int32_t>(b);
    });
    // Captured, a first step would fill the buffer anew at every replay.
    if (first != first_rows_.end() && step.is_capturing())
      throw std::runtime_error(named(rows_[static_cast<size_t>(*first)]) +
                               " has no momentum buffer yet, and a first step cannot be captured in a CUDA graph: call "
                               "step() once before the capture (a warm-up iteration, not one that GradScaler skips)");
    if (!step.is_changed()) continue;
    std::vector<const StridedLayout*> layouts(buckets_[b].inputs.size());
    for (const PlanRow& row : rows_)
      if (row.bucket == static_cast<int32_t>(b)) layouts[static_cast<size_t>(row.row)] = row.layout.get();
    step.make_ready(layouts);
  }
}

std::vector<const CudaPlan::Launch*> StepPlan::launched() const {
  std::vector<const CudaPlan::Launch*> result;
  for (const Bucket& bucket : buckets_) {
    const auto* step = dynamic_cast<const CudaStep*>(bucket.on_device.get());
    if (step != nullptr) result.insert(result.end(), step->launched().begin(), step->launched().end());
  }
  return result;
}

std::vector<std::vector<std::byte>> StepPlan::tables() const {
  std::vector<std::vector<std::byte>> result;
  for (const Bucket& bucket : buckets_) {
    const auto* step = dynamic_cast<const CudaStep*>(bucket.on_device.get());
    if (step != nullptr && step->table() != nullptr) result.push_back(*step->table());
  }
  return result;
}

void StepPlan::hold_memory(int64_t row_number, const at::Tensor& param, const at::Tensor& gradient) {
  if (rows_[static_cast<size_t>(row_number)].input->gradient == nullptr) return;
  held_.push_back(param.unsafeGetTensorImpl()->unsafe_storage());
  held_.push_back(gradient.unsafeGetTensorImpl()->unsafe_storage());
}

CpuStep StepPlan::on_cpu(const Bucket& bucket) const {
  return {*bucket.on_cpu,     bucket.inputs, scalars_,     numerics_, multiply_add_rule() != MultiplyAddRule::separate,
          bucket.row_options, of_options_,   norm_.is_used};
}

DeviceStep::Inputs StepPlan::inputs_of(const Bucket& bucket) const {
  return {bucket.inputs, scalars_, groups_, amp_, of_options_, option_steps_, norm_};
}

void StepPlan::run_on_cpu(const Bucket& bucket) {
  const TensorTable& table = *bucket.on_cpu;
  const CpuStep step = on_cpu(bucket);
  for_tiles(table, elements_, [&](int64_t first, int64_t last) { sgd_cpu_tiles(step, first, last); });
  for (const int32_t row : table.serial_rows()) sgd_cpu_row(step, row);
}

void StepPlan::run() {
  if (elements_ != 0 || norm_.is_used) {  // a norm of no gradients is 0
    for (Bucket& bucket : buckets_)
      if (bucket.on_device) bucket.on_device->bring(inputs_of(bucket));
    for (Bucket& bucket : buckets_) {
      if (bucket.on_cpu)
        run_on_cpu(bucket);
      else
        bucket.on_device->run(inputs_of(bucket));
    }
  }
  for (size_t w = 0; w < written_count_; ++w) {
    if (w + 16 < written_count_) __builtin_prefetch(&written_[w + 16]->version_counter());
    if (w + 8 < written_count_) fetch_counter(*written_[w + 8]);
    written_[w]->bump_version();
  }
  std::vector<Extent> made;
  for (const int64_t r : fresh_rows_) {
    PlanRow& row = rows_[static_cast<size_t>(r)];
    row.fresh = false;
    made.push_back(extent_of(*row.buffer.unsafeGetTensorImpl(), static_cast<int32_t>(r)));
  }
  if (!made.empty()) written_memory_.add(std::move(made));
  forget();
}

}  // namespace wd_fused
