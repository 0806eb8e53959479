// Builds a plan from tensors, checks at every step that it still holds, and runs it. Called by module.cpp and ops.cpp.
#include "step_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace wd_fused {
namespace {

// Elements below which another thread costs more than it brings.
constexpr int64_t kGrain = 65536;

std::optional<Storage> storage_of(caffe2::TypeMeta dtype) {
  switch (dtype.toScalarType()) {
    case at::kFloat:
      return Storage::float32;
    case at::kDouble:
      return Storage::float64;
    case at::kHalf:
      return Storage::float16;
    case at::kBFloat16:
      return Storage::bfloat16;
    default:
      return std::nullopt;
  }
}

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// As Python writes it: "bfloat16".
std::string name_of(caffe2::TypeMeta dtype) { return std::string(c10::getDtypeNames(dtype.toScalarType()).first); }

float in_float(double value, const char* name, size_t group) {
  const auto narrow = static_cast<float>(value);
  if (std::isinf(narrow) && !std::isinf(value))
    throw std::runtime_error(joined("group ", group, ": ", name, "=", value, " does not fit into float32"));
  return narrow;
}

Scalars<double> double_scalars(const Hyperparameters& h) {
  return {-h.lr, h.momentum, 1 - h.dampening, h.weight_decay, h.weight_decay != 0, h.nesterov, h.maximize};
}

Scalars<float> float_scalars(const Hyperparameters& h, size_t group) {
  return {-in_float(h.lr, "lr", group),
          in_float(h.momentum, "momentum", group),
          in_float(1 - h.dampening, "1 - dampening", group),
          in_float(h.weight_decay, "weight_decay", group),
          h.weight_decay != 0,
          h.nesterov,
          h.maximize};
}

// A plain tensor, made outside of any mode: what differs from its keys (subclass, lazy negation, function transform,
// ...) is not one.
at::Tensor plain_tensor(at::IntArrayRef sizes, double value) {
  const c10::impl::ExcludeDispatchKeyGuard no_python(c10::python_ks);
  const c10::InferenceMode lasting(false);
  return at::full(sizes, value, at::kFloat);
}

bool is_plain(c10::DispatchKeySet keys) {
  static const c10::DispatchKeySet plain = plain_tensor({0}, 0).key_set();
  return keys == plain;
}

// The address of a plain tensor's first element. const_data_ptr() and mutable_data_ptr() say the same with checks that
// the keys have answered already, 70 instructions each, three times a row. A copy-on-write storage is made its owner's.
void* writable_address(const c10::TensorImpl& tensor) {
  return static_cast<char*>(tensor.unsafe_storage().mutable_data()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
}
const void* readable_address(const c10::TensorImpl& tensor) {
  return static_cast<const char*>(tensor.unsafe_storage().data()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
}
bool lacks_memory(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().data() == nullptr && tensor.numel() > 0;
}

Extent extent_of(const c10::TensorImpl& tensor, int32_t row) {
  const auto begin = reinterpret_cast<uintptr_t>(readable_address(tensor));
  if (tensor.numel() == 0) return {begin, begin, row};
  int64_t last = 0;
  for (size_t d = 0; d < tensor.sizes().size(); ++d) last += (tensor.sizes()[d] - 1) * tensor.strides()[d];
  return {begin, begin + static_cast<uintptr_t>(last + 1) * tensor.itemsize(), row};
}

MultiplyAddRule ask_torch() {
  // a*x is 1 + 2^-11 + 2^-24: rounded it loses the last term. 67 elements are whole vectors and a rest.
  const double a = 1 + 0x1p-12;
  const at::Tensor x = plain_tensor({67}, a);
  const at::Tensor y = plain_tensor({67}, -1.0);
  const c10::impl::ExcludeDispatchKeyGuard no_python(c10::python_ks);
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

std::string why_not_planned(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has(c10::DispatchKey::Python)) return "it is a tensor subclass with its own dispatch";
  if (tensor.layout() != at::kStrided || tensor.is_nested()) return joined("its layout is ", tensor.layout());
  if (!tensor.device().is_cpu()) return joined("it is on ", tensor.device());
  if (!storage_of(tensor.dtype())) return joined("its dtype is ", name_of(tensor.dtype()));
  if (!is_plain(keys)) return "it carries a lazy negation or a function transform";
  if (tensor.is_inference()) return "it was made in inference mode";
  if (lacks_memory(*tensor.unsafeGetTensorImpl())) return "its storage holds no memory";
  if (!surely_distinct(tensor.sizes().vec(), tensor.strides().vec())) return "several of its elements may share memory";
  return {};
}

StepPlan::Geometry::Geometry(at::IntArrayRef sizes, at::IntArrayRef strides) {
  numbers_.append(sizes.begin(), sizes.end());
  numbers_.append(strides.begin(), strides.end());
}

// One loop over a few numbers: ArrayRef's own comparison calls memcmp, which costs more.
inline bool StepPlan::Geometry::is_that_of(const c10::TensorImpl& tensor) const {
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  if (2 * sizes.size() != numbers_.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != numbers_[d] || strides[d] != numbers_[sizes.size() + d]) return false;
  return true;
}

StepPlan::Seen::Seen(const at::Tensor& tensor)
    : data(writable_address(*tensor.unsafeGetTensorImpl())),
      keys(tensor.key_set()),
      dtype(tensor.dtype()),
      geometry(tensor.sizes(), tensor.strides()) {}

inline bool StepPlan::Seen::still_holds(const c10::TensorImpl& tensor) const {
  return tensor.key_set() == keys && tensor.dtype() == dtype && writable_address(tensor) == data &&
         geometry.is_that_of(tensor);
}

StepPlan::StepPlan(std::vector<PlannedParameter> parameters, Numerics numerics) : numerics_(numerics) {
  std::array<int32_t, kStorages> bucket_of{};
  bucket_of.fill(-1);
  std::vector<std::vector<Row>> table_rows;
  std::vector<Storage> storages;
  std::vector<Extent> extents;
  rows_.reserve(parameters.size());
  for (PlannedParameter& parameter : parameters) {
    PlanRow row;
    row.group = static_cast<int32_t>(parameter.group);
    row.index = parameter.index;
    const auto row_number = static_cast<int32_t>(rows_.size());
    for (const at::Tensor* tensor : {&parameter.param, &parameter.momentum_buffer}) {
      if (!tensor->defined()) continue;
      const std::string reason = why_not_planned(*tensor);
      if (!reason.empty()) throw std::runtime_error(named(row) + " cannot be planned: " + reason);
      extents.push_back(extent_of(*tensor->unsafeGetTensorImpl(), row_number));
    }
    row.param = Seen(parameter.param);
    if (parameter.momentum_buffer.defined()) {
      row.buffer = parameter.momentum_buffer;
      row.buffer_seen = Seen(row.buffer);
      if (row.buffer.sizes() != parameter.param.sizes() || row.buffer.dtype() != parameter.param.dtype())
        throw std::runtime_error(named(row) + " cannot be planned: its momentum buffer has another shape or dtype");
    }
    const Storage storage = *storage_of(row.param.dtype);
    int32_t& bucket = bucket_of[static_cast<size_t>(storage)];
    if (bucket < 0) {
      bucket = static_cast<int32_t>(storages.size());
      storages.push_back(storage);
      table_rows.emplace_back();
    }
    row.bucket = bucket;
    auto& rows_of_bucket = table_rows[static_cast<size_t>(bucket)];
    row.row = static_cast<int32_t>(rows_of_bucket.size());
    rows_of_bucket.push_back({const_cast<void*>(row.param.data),
                              row.buffer.defined() ? const_cast<void*>(row.buffer_seen.data) : nullptr,
                              parameter.param.numel(), row.group});
    if (static_cast<size_t>(row.group) >= group_used_.size()) group_used_.resize(static_cast<size_t>(row.group) + 1);
    group_used_[static_cast<size_t>(row.group)] = true;
    lay_out(row, parameter.param.strides());
    rows_.push_back(std::move(row));
  }

  const std::vector<bool> meets = rows_that_meet(extents, size());
  written_memory_ = ExtentSet(std::move(extents));
  for (size_t bucket = 0; bucket < storages.size(); ++bucket) {
    std::vector<bool> serial(table_rows[bucket].size());
    for (size_t r = 0; r < rows_.size(); ++r)
      if (static_cast<size_t>(rows_[r].bucket) == bucket)
        serial[static_cast<size_t>(rows_[r].row)] = rows_[r].serial = meets[r];
    const size_t count = table_rows[bucket].size();
    buckets_.push_back({storages[bucket], TensorTable(std::move(table_rows[bucket]), serial),
                        std::vector<RowInput>(count, RowInput{nullptr, nullptr, Momentum::none})});
  }
  for (PlanRow& row : rows_) {
    Bucket& bucket = buckets_[static_cast<size_t>(row.bucket)];
    row.input = &bucket.inputs[static_cast<size_t>(row.row)];
    row.table_row = &bucket.table.rows()[static_cast<size_t>(row.row)];
  }
}

std::string StepPlan::named(const PlanRow& row) const { return joined("group ", row.group, ", parameter ", row.index); }

void StepPlan::lay_out(PlanRow& row, at::IntArrayRef gradient_strides) {
  const Geometry& param = row.param.geometry;
  const Geometry& buffer = row.buffer.defined() ? row.buffer_seen.geometry : param;
  row.gradient = Geometry(param.sizes(), gradient_strides);
  StridedLayout layout;
  layout.sizes = param.sizes().vec();
  layout.strides[StridedLayout::param] = param.strides().vec();
  layout.strides[StridedLayout::gradient] = gradient_strides.vec();
  layout.strides[StridedLayout::momentum_buffer] = buffer.strides().vec();
  layout = simplified(layout);
  row.layout = is_flat(layout) ? nullptr : std::make_unique<StridedLayout>(std::move(layout));
}

void StepPlan::abandon() {
  for (const int64_t r : fresh_rows_) {
    PlanRow& row = rows_[static_cast<size_t>(r)];
    if (row.fresh) row.buffer = at::Tensor();
    row.fresh = false;
  }
  for (Bucket& bucket : buckets_)
    for (RowInput& input : bucket.inputs) input.gradient = nullptr;
  fresh_rows_.clear();
  written_.clear();
  held_.clear();
  elements_ = 0;
}

void StepPlan::begin(const std::vector<Hyperparameters>& groups) {
  if (groups.size() < group_used_.size()) throw std::runtime_error("fewer groups than the plan was built on");
  abandon();
  scalars_.resize(group_used_.size());
  has_momentum_.resize(group_used_.size());
  const bool any_float = std::any_of(buckets_.begin(), buckets_.end(),
                                     [](const Bucket& bucket) { return bucket.storage != Storage::float64; });
  for (size_t g = 0; g < group_used_.size(); ++g) {
    if (!group_used_[g]) continue;
    scalars_[g].in_double = double_scalars(groups[g]);
    if (any_float) scalars_[g].in_float = float_scalars(groups[g], g);
    has_momentum_[g] = groups[g].momentum != 0;
  }
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
  } else if (gradient.dtype() != param.dtype()) {
    why_left_ =
        joined("its gradient has dtype ", name_of(gradient.dtype()), ", the parameter ", name_of(param.dtype()));
  } else if (gradient.is_neg() || gradient._is_zerotensor()) {
    return gradient.resolve_neg().clone();
  } else if (!is_plain(gradient.key_set())) {
    why_left_ = "its gradient carries a function transform";
  } else if (lacks_memory(*gradient.unsafeGetTensorImpl())) {
    why_left_ = "its gradient's storage holds no memory";
  } else {
    return gradient;
  }
  return {};
}

StepPlan::Reading StepPlan::read_new_gradient(PlanRow& row, const at::Tensor& param,
                                              const at::Tensor& gradient_as_given) {
  const c10::TensorImpl* gradient = gradient_as_given.unsafeGetTensorImpl();
  at::Tensor usable;
  if (gradient->key_set() != row.param.keys || gradient->dtype() != row.param.dtype ||
      gradient->sizes() != row.param.geometry.sizes() || lacks_memory(*gradient)) {
    usable = usable_gradient(row, param, gradient_as_given);
    if (!usable.defined()) return Reading::left;
    gradient = usable.unsafeGetTensorImpl();
    held_.push_back(usable.storage());  // may be a copy of this step's own
  }
  // p.grad may be p itself: an element is read before it is written. Any other overlap depends on torch's order.
  const void* address = readable_address(*gradient);
  const bool is_param = address == row.param.data && gradient->strides() == row.param.geometry.strides();
  if (!is_param && written_memory_.meets(extent_of(*gradient, -1))) {
    why_left_ = "the gradient of " + named(row) + " shares memory with a parameter or a momentum buffer";
    return Reading::entangled;
  }
  if (!row.gradient.is_that_of(*gradient)) lay_out(row, gradient->strides());
  row.gradient_address = address;
  return Reading::taken;
}

StepPlan::Reading StepPlan::read(int64_t row_number, const at::Tensor& param, const at::Tensor& gradient_as_given,
                                 const c10::TensorImpl* buffer, bool fill_buffer) {
  PlanRow& row = rows_[static_cast<size_t>(row_number)];
  if (!row.param.still_holds(*param.unsafeGetTensorImpl())) return Reading::stale;
  if (buffer != row.buffer.unsafeGetTensorImpl() && (buffer != nullptr || row.buffer.defined())) return Reading::stale;
  if (!gradient_as_given.defined()) return Reading::no_gradient;

  const c10::TensorImpl* gradient = gradient_as_given.unsafeGetTensorImpl();
  const bool as_before = gradient->key_set() == row.param.keys && gradient->dtype() == row.param.dtype &&
                         row.gradient.is_that_of(*gradient) && readable_address(*gradient) == row.gradient_address;
  if (!as_before) {
    const Reading reading = read_new_gradient(row, param, gradient_as_given);
    if (reading != Reading::taken) return reading;
  }

  Momentum momentum = Momentum::none;
  if (has_momentum_[static_cast<size_t>(row.group)]) {
    if (row.buffer.defined()) {
      if (!row.buffer_seen.still_holds(*row.buffer.unsafeGetTensorImpl())) return Reading::stale;
      momentum = fill_buffer ? Momentum::first : Momentum::running;
    } else {
      const c10::InferenceMode lasting(false);
      row.buffer = at::empty_like(param.detach());
      row.buffer_seen = Seen(row.buffer);
      row.fresh = true;
      fresh_rows_.push_back(row_number);
      row.table_row->momentum_buffer = const_cast<void*>(row.buffer_seen.data);
      lay_out(row, row.gradient.strides().vec());
      momentum = Momentum::first;
    }
    written_.push_back(row.buffer.unsafeGetTensorImpl());
  }
  *row.input = {row.gradient_address, row.layout.get(), momentum};
  elements_ += row.table_row->numel;
  written_.push_back(param.unsafeGetTensorImpl());
  return Reading::taken;
}

void StepPlan::hold_memory(int64_t row_number, const at::Tensor& param, const at::Tensor& gradient) {
  if (rows_[static_cast<size_t>(row_number)].input->gradient == nullptr) return;
  held_.push_back(param.unsafeGetTensorImpl()->unsafe_storage());
  held_.push_back(gradient.unsafeGetTensorImpl()->unsafe_storage());
}

void StepPlan::run() {
  for (const Bucket& bucket : buckets_) {
    const CpuStep step{bucket.table,   bucket.inputs, scalars_,
                       bucket.storage, numerics_,     multiply_add_rule() != MultiplyAddRule::separate};
    if (elements_ > kGrain) {
      at::parallel_for(0, bucket.table.tiled_elements(), kGrain, [&](int64_t begin, int64_t end) {
        const auto [first, last] = bucket.table.tiles_between(begin, end);
        sgd_cpu_tiles(step, first, last);
      });
    } else {
      sgd_cpu_tiles(step, 0, static_cast<int64_t>(bucket.table.tiles().size()));
    }
    for (const int32_t row : bucket.table.serial_rows()) sgd_cpu_row(step, row);
  }
  for (c10::TensorImpl* written : written_) written->bump_version();
  std::vector<Extent> made;
  for (const int64_t r : fresh_rows_) {
    PlanRow& row = rows_[static_cast<size_t>(r)];
    row.fresh = false;
    made.push_back(extent_of(*row.buffer.unsafeGetTensorImpl(), static_cast<int32_t>(r)));
  }
  if (!made.empty()) written_memory_.add(std::move(made));
  written_.clear();
  held_.clear();
  elements_ = 0;
}

}  // namespace wd_fused
