// A row read for a step: whether parameter, state and gradient are what the plan takes. Called by the plan's owner.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include "plan/dtypes.h"
#include "plan/plan_tensors.h"
#include "plan/step_plan.h"
#include "plan/undisturbed.h"

namespace wd_fused {

inline bool StepPlan::PlanRow::Options::still_holds(const c10::TensorImpl* const* now) const {
  for (size_t t = 0; t < kOptionTensors; ++t) {
    if (!uses[t]) continue;
    if (now[t] != tensors.all[t].unsafeGetTensorImpl() && (now[t] != nullptr || tensors.all[t].defined())) return false;
    if (now[t] != nullptr && !seen[t].still_holds(*now[t])) return false;
  }
  return true;
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

}  // namespace wd_fused
