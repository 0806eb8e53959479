// Builds a plan from tensors, checks at every step that it still holds, and runs it. Called by module.cpp and ops.cpp.
#include "plan/step_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>

#include <algorithm>
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

// A plain tensor, made outside of any mode: what differs from its keys (subclass, lazy negation, function transform,
// ...) is not one.
at::Tensor plain_tensor(at::IntArrayRef sizes, double value) {
  const Undisturbed undisturbed;
  return at::full(sizes, value, at::kFloat);
}

c10::DispatchKeySet plain_keys(c10::DeviceType device) {
  const Undisturbed undisturbed;
  return at::empty({0}, at::TensorOptions(at::kFloat).device(device)).key_set();
}

c10::DeviceType device_type(Target target) {
  return target == Target::cuda || target == Target::hosted ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
}

bool is_plain(c10::DispatchKeySet keys, Target target) {
  static const c10::DispatchKeySet on_cpu = plain_keys(c10::DeviceType::CPU);
  if (device_type(target) == c10::DeviceType::CPU) return keys == on_cpu;
  static const c10::DispatchKeySet on_cuda = plain_keys(c10::DeviceType::CUDA);
  return keys == on_cuda;
}

// A GPU faults on an element that straddles its own size; the CPU does not mind.
bool is_aligned_for(Target target, const c10::TensorImpl& tensor) {
  return target == Target::cpu || reinterpret_cast<uintptr_t>(readable_address(tensor)) % tensor.itemsize() == 0;
}

MultiplyAddRule ask_torch() {
  // a*x is 1 + 2^-11 + 2^-24: rounded it loses the last term. 67 elements are whole vectors and a rest.
  const double a = 1 + 0x1p-12;
  const at::Tensor x = plain_tensor({67}, a);
  const at::Tensor y = plain_tensor({67}, -1.0);
  const Undisturbed undisturbed;
  const at::Tensor sum = at::add(y, x, a);
  const auto* values = sum.const_data_ptr<float>();
  const auto fused = std::count(values, values + 67, 0x1p-11f + 0x1p-24f);
  return fused == 67 ? MultiplyAddRule::fused : fused == 0 ? MultiplyAddRule::separate : MultiplyAddRule::mixed;
}

}  // namespace

MultiplyAddRule multiply_add_rule() {
  static const MultiplyAddRule rule = ask_torch();
  return rule;
}

std::string why_not_planned(const at::Tensor& tensor, Target target) {
  if (storage_of(tensor.dtype()) || tensor.layout() != at::kStrided || tensor.device().type() != device_type(target))
    return why_not_in_state(tensor, target);
  return joined("its dtype is ", name_of(tensor.dtype()));
}

std::string why_not_in_state(const at::Tensor& tensor, Target target) {
  if (target == Target::cuda && !cuda_architectures()) return why_not_on(tensor.device());
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has(c10::DispatchKey::Python)) return "it is a tensor subclass with its own dispatch";
  if (tensor.layout() != at::kStrided || tensor.is_nested()) return joined("its layout is ", tensor.layout());
  if (tensor.device().type() != device_type(target)) return joined("it is on ", tensor.device());
  if (tensor.is_inference()) return "it was made in inference mode";
  if (!is_plain(keys, target)) return "it carries a lazy negation or a function transform";
  if (lacks_memory(*tensor.unsafeGetTensorImpl())) return "it " + why_it_lacks_memory(*tensor.unsafeGetTensorImpl());
  if (!is_aligned_for(target, *tensor.unsafeGetTensorImpl())) return "its address is no multiple of its element size";
  if (!tensor.is_contiguous() && !surely_distinct(tensor.sizes().vec(), tensor.strides().vec()))
    return "several of its elements may share memory";
  if (target == Target::cuda) return why_not_on(tensor.device());
  return {};
}

StepPlan::Geometry::Geometry(at::IntArrayRef sizes, at::IntArrayRef strides) {
  numbers_.append(sizes.begin(), sizes.end());
  numbers_.append(strides.begin(), strides.end());
}

// One loop over a few numbers: ArrayRef's own comparison calls memcmp, which costs more.
WD_FUSED_INLINE bool StepPlan::Geometry::is_that_of(const c10::TensorImpl& tensor) const {
  const size_t dims = tensor.sizes().size();
  if (2 * dims != numbers_.size()) return false;
  const int64_t* sizes = tensor.sizes().data();
  const int64_t* strides = tensor.strides().data();
  const int64_t* seen = numbers_.data();
  for (size_t d = 0; d < dims; ++d)
    if (sizes[d] != seen[d] || strides[d] != seen[dims + d]) return false;
  return true;
}

StepPlan::Place::Place(const c10::TensorImpl& tensor)
    : storage(tensor.unsafe_storage().data()),
      deleter(tensor.unsafe_storage().data_ptr().get_deleter()),
      offset(tensor.storage_offset()),
      end(end_of_elements(tensor)) {}

WD_FUSED_INLINE bool StepPlan::Place::is_that_of(const c10::TensorImpl& tensor) const {
  const c10::StorageImpl& now = *tensor.unsafe_storage().unsafeGetStorageImpl();
  const c10::DataPtr& data = now.data_ptr();
  return data.get() == storage && data.get_deleter() == deleter && tensor.storage_offset() == offset &&
         reinterpret_cast<uintptr_t>(storage) + now.nbytes() >= end;
}

StepPlan::Seen::Seen(const c10::TensorImpl& tensor)
    : data(writable_address(tensor)),
      place(tensor),
      device(tensor.device()),
      is_contiguous(tensor.is_contiguous()),
      keys(tensor.key_set()),
      dtype(tensor.dtype()),
      geometry(tensor.sizes(), tensor.strides()) {}

WD_FUSED_INLINE bool StepPlan::Seen::still_holds(const c10::TensorImpl& tensor) const {
  return tensor.key_set() == keys && tensor.dtype() == dtype && place.is_that_of(tensor) && geometry.is_that_of(tensor);
}

bool StepPlan::Seen::takes(const c10::TensorImpl& tensor, Target target) {
  if (tensor.key_set() != keys || tensor.dtype() != dtype || !geometry.is_that_of(tensor) ||
      tensor.device() != device || lacks_memory(tensor) || !is_aligned_for(target, tensor))
    return false;
  data = writable_address(tensor);
  place = Place(tensor);
  return true;
}

Extent StepPlan::Seen::extent(int32_t row) const {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, place.end == 0 ? begin : place.end, row};
}

inline bool StepPlan::PlanRow::Options::still_holds(const c10::TensorImpl* const* now) const {
  for (size_t t = 0; t < kOptionTensors; ++t) {
    if (!uses[t]) continue;
    if (now[t] != tensors.all[t].unsafeGetTensorImpl() && (now[t] != nullptr || tensors.all[t].defined())) return false;
    if (now[t] != nullptr && !seen[t].still_holds(*now[t])) return false;
  }
  return true;
}

StepPlan::StepPlan(std::vector<PlannedParameter> parameters, Numerics numerics, Target target,
                   const MakeDeviceStep& make_step, size_t groups)
    : numerics_(numerics), target_(target), group_used_(groups) {
  std::vector<c10::Device> devices;
  std::vector<std::vector<Row>> table_rows;
  std::vector<std::vector<RowOptions>> row_options;
  std::vector<Extent> extents;
  rows_.reserve(parameters.size());
  for (PlannedParameter& parameter : parameters) {
    PlanRow row;
    row.group = static_cast<int32_t>(parameter.group);
    row.index = parameter.index;
    for (const at::Tensor* tensor : {&parameter.param, &parameter.momentum_buffer}) {
      if (!tensor->defined()) continue;
      const bool is_int8 = tensor->scalar_type() == at::kChar && parameter.options.momentum == Storage::int8;
      const std::string reason = is_int8 ? why_not_in_state(*tensor, target) : why_not_planned(*tensor, target);
      if (!reason.empty()) throw std::runtime_error(named(row) + " cannot be planned: " + reason);
    }
    row.param = Seen(*parameter.param.unsafeGetTensorImpl());
    row.gradient_dtype = row.param.dtype;
    if (parameter.options.is_used) add_options(row, parameter);
    has_options_ |= parameter.options.is_used;
    has_zeroing_ |= parameter.options.zeroes;
    is_only_options_ &= parameter.options.is_used;
    if (parameter.momentum_buffer.defined()) {
      row.buffer = parameter.momentum_buffer;
      row.buffer_seen = Seen(*row.buffer.unsafeGetTensorImpl());
      if (row.buffer.sizes() != parameter.param.sizes() ||
          row.buffer.scalar_type() !=
              (row.options ? dtype_of(row.options->of_row.momentum) : parameter.param.scalar_type()) ||
          row.buffer.device() != parameter.param.device())
        throw std::runtime_error(named(row) +
                                 " cannot be planned: its momentum buffer has another shape, dtype or device");
    }
    add_extents(row, static_cast<int32_t>(rows_.size()), extents);
    const c10::Device device = parameter.param.device();
    const auto place = std::find(devices.begin(), devices.end(), device);
    row.bucket = static_cast<int32_t>(place - devices.begin());
    if (place == devices.end()) {
      devices.push_back(device);
      table_rows.emplace_back();
      row_options.emplace_back();
    }
    auto& rows_of_bucket = table_rows[static_cast<size_t>(row.bucket)];
    row.row = static_cast<int32_t>(rows_of_bucket.size());
    row_options[static_cast<size_t>(row.bucket)].push_back(row.options ? row.options->of_row : RowOptions{});
    rows_of_bucket.push_back({const_cast<void*>(row.param.data),
                              row.buffer.defined() ? const_cast<void*>(row.buffer_seen.data) : nullptr,
                              parameter.param.numel(), row.group, *storage_of(row.param.dtype)});
    if (static_cast<size_t>(row.group) >= group_used_.size()) group_used_.resize(static_cast<size_t>(row.group) + 1);
    group_used_[static_cast<size_t>(row.group)] = true;
    any_float_ |= rows_of_bucket.back().storage != Storage::float64;
    rows_.push_back(std::move(row));
  }

  const std::vector<bool> meets = rows_that_meet(extents, size());
  written_memory_ = ExtentSet(std::move(extents));
  std::vector<std::vector<bool>> serial(devices.size());
  for (size_t r = 0; r < rows_.size(); ++r)
    serial[static_cast<size_t>(rows_[r].bucket)].push_back(rows_[r].serial = meets[r]);
  for (size_t d = 0; d < devices.size(); ++d) {
    Bucket& bucket = buckets_.emplace_back();
    bucket.inputs.resize(table_rows[d].size(), RowInput{nullptr, nullptr, Momentum::none});
    if (target == Target::cpu)
      bucket.on_cpu.emplace(std::move(table_rows[d]), serial[d]);
    else if (target == Target::cuda)
      bucket.on_device =
          std::make_unique<CudaStep>(devices[d], std::move(table_rows[d]), std::move(serial[d]), numerics);
    else
      bucket.on_device = make_step(devices[d], std::move(table_rows[d]), std::move(serial[d]));
    if (has_options_) bucket.all_row_options() = std::move(row_options[d]);
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

at::Tensor StepPlan::usable_gradient(const PlanRow& row, const at::Tensor& param, const at::Tensor& gradient) {
  if (gradient.sizes() != param.sizes())
    throw std::runtime_error(joined(named(row), ": its gradient has shape ", gradient.sizes(),
                                    ", the parameter has shape ", param.sizes(),
                                    "; set the gradient to None or make a new one by backward()"));
  if (gradient.device() != param.device())
    throw std::runtime_error(joined(named(row), ": its gradient is on ", gradient.device(), ", the parameter on ",
                                    param.device(), "; move the gradient with the parameter"));
  if (!c10::canCast(gradient.scalar_type(), param.scalar_type()))
    throw std::runtime_error(joined(named(row), ": its gradient has dtype ", name_of(gradient.dtype()),
                                    ", which cannot be used for a parameter of dtype ", name_of(param.dtype())));
  if (gradient.layout() != at::kStrided || gradient.is_nested()) {
    why_left_ = joined("its gradient has layout ", gradient.layout());
  } else if (gradient.key_set().has(c10::DispatchKey::Python)) {
    why_left_ = "its gradient is a tensor subclass with its own dispatch";
  } else if (lacks_memory(*gradient.unsafeGetTensorImpl())) {
    throw std::runtime_error(
        joined(named(row), ": its gradient ", why_it_lacks_memory(*gradient.unsafeGetTensorImpl())));
  } else if (gradient.dtype() != param.dtype() && (!row.options || !storage_of(gradient.dtype()))) {
    why_left_ =
        joined("its gradient has dtype ", name_of(gradient.dtype()), ", the parameter ", name_of(param.dtype()));
  } else if (gradient.is_neg() || gradient._is_zerotensor()) {
    if (!row.options || !row.options->of_row.zeroes) return gradient.resolve_neg().clone();
    why_left_ = "its gradient, to be set to zero, is a lazy negation";
  } else if (!is_plain(gradient.key_set(), target_)) {
    why_left_ = "its gradient carries a function transform";
  } else if (!is_aligned_for(target_, *gradient.unsafeGetTensorImpl())) {
    why_left_ = "its gradient's address is no multiple of its element size";
  } else {
    return gradient;
  }
  return {};
}

StepPlan::Reading StepPlan::read_new_gradient(PlanRow& row, const at::Tensor& param,
                                              const at::Tensor& gradient_as_given) {
  const c10::TensorImpl* gradient = gradient_as_given.unsafeGetTensorImpl();
  at::Tensor usable;
  gradients_moved_ = true;
  if (gradient->key_set() != row.param.keys || gradient->dtype() != row.param.dtype ||
      gradient->sizes() != row.param.geometry.sizes() || gradient->device() != param.device() ||
      lacks_memory(*gradient) || !is_aligned_for(target_, *gradient)) {
    usable = usable_gradient(row, param, gradient_as_given);
    if (!usable.defined()) return Reading::left;
    gradient = usable.unsafeGetTensorImpl();
    held_.push_back(usable.storage());  // may be a copy of this step's own
  }
  // p.grad may be p itself: an element is read before it is written. Any other overlap depends on torch's order.
  const bool zeroes = row.options && row.options->of_row.zeroes;
  const void* address = zeroes ? writable_address(*gradient) : readable_address(*gradient);
  const bool is_param = address == row.param.data && gradient->strides() == row.param.geometry.strides() && !zeroes &&
                        gradient->dtype() == row.param.dtype;
  if (zeroes && !surely_distinct(gradient->sizes().vec(), gradient->strides().vec())) {
    why_left_ = "several elements of its gradient, to be set to zero, may share memory";
    return Reading::left;
  }
  if (!is_param && written_memory_.meets(extent_of(*gradient, -1))) {
    why_left_ = "the gradient of " + named(row) + " shares memory with a parameter or a momentum buffer";
    return Reading::entangled;
  }
  if (!row.gradient.is_that_of(*gradient)) lay_out(row, gradient->strides());
  if (gradient->dtype() != row.gradient_dtype && target_ != Target::cpu) {
    DeviceStep& step = *buckets_[static_cast<size_t>(row.bucket)].on_device;
    step.row_options()[static_cast<size_t>(row.row)].gradient = *storage_of(gradient->dtype());
    step.set_changed();
  }
  row.gradient_dtype = gradient->dtype();
  row.gradient_address = address;
  row.gradient_place = Place(*gradient);
  return Reading::taken;
}

// Without options nothing is left of what is asked about one.
template <bool kHasOptions>
WD_FUSED_INLINE StepPlan::Reading StepPlan::read_row(int64_t row_number, const at::Tensor& param,
                                                     const at::Tensor& gradient_as_given, const c10::TensorImpl* buffer,
                                                     bool fill_buffer, const c10::TensorImpl* const* option_tensors) {
  PlanRow& row = rows_[static_cast<size_t>(row_number)];
  if (!row.param.still_holds(*param.unsafeGetTensorImpl())) return Reading::stale;
  if (buffer != row.buffer.unsafeGetTensorImpl() && (buffer != nullptr || row.buffer.defined())) return Reading::stale;
  if (row.buffer.defined() && !row.buffer_seen.still_holds(*row.buffer.unsafeGetTensorImpl())) return Reading::stale;
  const bool has_momentum = groups_[static_cast<size_t>(row.group)].has_momentum;
  PlanRow::Options* const options = kHasOptions ? row.options.get() : nullptr;
  if constexpr (kHasOptions)
    if (options != nullptr && !options->still_holds(option_tensors)) return Reading::stale;
  if (!gradient_as_given.defined()) {
    if (kHasOptions && has_zeroing_) row.gradient_place = {};  // meanwhile another row's may come to lie there
    if (options != nullptr && options->of_row.averages) {
      if (!options->tensors.average().defined()) return Reading::stale;
      *row.input = {nullptr, row.layout.get(), Momentum::none, Storage::float32, /*is_averaged=*/true};
      elements_ += row.table_row->numel;
      will_write(options->tensors.average().unsafeGetTensorImpl());
    }
    return Reading::no_gradient;
  }
  if (options != nullptr && (options->lacks_state || (options->of_row.momentum == Storage::int8 && has_momentum &&
                                                      !options->tensors.momentum_scale().defined())))
    return Reading::stale;

  const c10::TensorImpl* gradient = gradient_as_given.unsafeGetTensorImpl();
  const bool as_before = gradient->key_set() == row.param.keys && gradient->dtype() == row.gradient_dtype &&
                         row.gradient_place.is_that_of(*gradient) && row.gradient.is_that_of(*gradient);
  if (!as_before) {
    const Reading reading = read_new_gradient(row, param, gradient_as_given);
    if (reading != Reading::taken) return reading;
  }

  Momentum momentum = Momentum::none;
  if (has_momentum) {
    if (row.buffer.defined()) {
      momentum = fill_buffer ? Momentum::first : Momentum::running;
    } else {
      const Undisturbed undisturbed;
      // What empty_like() does for a tensor without gaps, without asking as much.
      row.buffer = options != nullptr ? at::empty_like(param.detach(), dtype_of(options->of_row.momentum))
                   : param.is_non_overlapping_and_dense()
                       ? at::empty_strided(param.sizes(), param.strides(), param.options())
                       : at::empty_like(param.detach());
      row.buffer_seen = Seen(*row.buffer.unsafeGetTensorImpl());
      row.fresh = true;
      fresh_rows_.push_back(row_number);
      row.table_row->momentum_buffer = const_cast<void*>(row.buffer_seen.data);
      lay_out(row, row.gradient.strides().vec());
      if (target_ != Target::cpu) buckets_[static_cast<size_t>(row.bucket)].on_device->set_changed();
      momentum = Momentum::first;
    }
    if (momentum == Momentum::first) first_rows_.push_back(row_number);
    will_write(row.buffer.unsafeGetTensorImpl());
  }
  *row.input = {row.gradient_address, row.layout.get(), momentum};
  if (options != nullptr) {
    row.input->gradient_storage = *storage_of(row.gradient_dtype);
    for (const at::Tensor& tensor : options->tensors.all)
      if (tensor.defined()) will_write(tensor.unsafeGetTensorImpl());
    if (options->of_row.zeroes) will_write(gradient_as_given.unsafeGetTensorImpl());
  }
  elements_ += row.table_row->numel;
  will_write(param.unsafeGetTensorImpl());
  return Reading::taken;
}

StepPlan::Reading StepPlan::read(int64_t row, const at::Tensor& param, const at::Tensor& gradient,
                                 const c10::TensorImpl* buffer, bool fill_buffer) {
  return read_row<false>(row, param, gradient, buffer, fill_buffer, nullptr);
}

StepPlan::Reading StepPlan::read_with_options(int64_t row, const at::Tensor& param, const at::Tensor& gradient,
                                              const c10::TensorImpl* buffer,
                                              const c10::TensorImpl* const* option_tensors) {
  return read_row<true>(row, param, gradient, buffer, /*fill_buffer=*/false, option_tensors);
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
  if (elements_ > kGrain) {
    at::parallel_for(0, table.tiled_elements(), kGrain, [&](int64_t begin, int64_t end) {
      const auto [first, last] = table.tiles_between(begin, end);
      sgd_cpu_tiles(step, first, last);
    });
  } else {
    sgd_cpu_tiles(step, 0, static_cast<int64_t>(table.tiles().size()));
  }
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
  for (size_t w = 0; w < written_count_; ++w) written_[w]->bump_version();
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
