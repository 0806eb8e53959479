// Hyperparameters into words. Called by what steps the rows of a device.
#include "plan/group_words.h"

#include <cstring>

namespace wd_fused {
namespace {

template <class Op>
CudaGroup in_words(const Scalars<Op>& scalars, const CudaGroupInput& input, Storage storage) {
  const auto word = [](Op value, const DeviceScalar& on_device) {
    return on_device.kind == ScalarKind::value ? to_word(value) : reinterpret_cast<uint64_t>(on_device.address);
  };
  CudaGroup group{};
  group.lr = word(scalars.minus_lr, input.lr);
  group.weight_decay = word(scalars.weight_decay, input.weight_decay);
  group.momentum = to_word(scalars.momentum);
  group.one_minus_dampening = to_word(scalars.one_minus_dampening);
  group.lr_kind = input.lr.kind;
  group.weight_decay_kind = input.weight_decay.kind;
  group.storage = storage;
  group.has_momentum = input.has_momentum;
  group.decays = scalars.decays != 0;
  group.nesterov = scalars.nesterov != 0;
  group.maximize = scalars.maximize != 0;
  return group;
}

template <class Op>
void set_numbers(CudaGroupOptions& group, const OptionScalars<Op>& scalars, double decoupled, bool lr_on_device) {
  group.l1 = to_word(scalars.l1);
  group.keep = to_word(lr_on_device ? static_cast<Op>(decoupled) : scalars.keep);
  group.average_weight = to_word(scalars.average_weight);
  group.clip = to_word(scalars.clip);
  group.penalizes = scalars.penalizes != 0;
  group.shrinks = scalars.shrinks != 0;
}

}  // namespace

CudaGroup in_words(const GroupScalars& scalars, const CudaGroupInput& input, Storage storage) {
  return storage == Storage::float64 ? in_words(scalars.in_double, input, storage)
                                     : in_words(scalars.in_float, input, storage);
}

CudaGroupOptions in_words(const Table::Group& of, const StepOptionsInput& step) {
  const auto g = static_cast<size_t>(of.group);
  CudaGroupInput input = step.groups[g];
  CudaGroupOptions group{};
  group.norm = -1;
  if (step.steps.empty()) {
    group.sgd = in_words(step.scalars[g], input, of.storage);
    return group;
  }
  if (!step.steps[g].l2) input.weight_decay = {};  // the number, which does nothing
  group.sgd = in_words(step.scalars[g], input, of.storage);
  const bool lr_on_device = input.lr.kind != ScalarKind::value;
  if (of.storage == Storage::float64)
    set_numbers(group, step.row_options[g].in_double, step.steps[g].decoupled, lr_on_device);
  else
    set_numbers(group, step.row_options[g].in_float, step.steps[g].decoupled, lr_on_device);
  std::memcpy(group.random_key, step.row_options[g].random_key, sizeof(group.random_key));
  group.clips = step.norm.is_used && step.steps[g].clips();
  if (group.clips && forms_norm(step.norm)) {
    group.norm = step.norm.per_group ? of.group : 0;
    const double max_norm = step.steps[g].max_norm;
    group.clip = step.norm.in_double ? to_word(max_norm) : to_word(static_cast<float>(max_norm));
  }
  return group;
}

}  // namespace wd_fused
