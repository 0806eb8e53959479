// Tensors as a plan takes and sees them. Called by step_plan.cpp and plan_read.cpp.
#include "plan/seen.h"

#include <ATen/ops/empty.h>

#include "cuda/cuda_step.h"
#include "plan/dtypes.h"
#include "plan/undisturbed.h"

namespace wd_fused {
namespace {

c10::DispatchKeySet plain_keys(c10::DeviceType device) {
  const Undisturbed undisturbed;
  return at::empty({0}, at::TensorOptions(at::kFloat).device(device)).key_set();
}

c10::DeviceType device_type(Target target) {
  return target == Target::cuda || target == Target::hosted ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
}

}  // namespace

bool is_plain(c10::DispatchKeySet keys, Target target) {
  static const c10::DispatchKeySet on_cpu = plain_keys(c10::DeviceType::CPU);
  if (device_type(target) == c10::DeviceType::CPU) return keys == on_cpu;
  static const c10::DispatchKeySet on_cuda = plain_keys(c10::DeviceType::CUDA);
  return keys == on_cuda;
}

bool is_aligned_for(Target target, const c10::TensorImpl& tensor) {
  return target == Target::cpu || reinterpret_cast<uintptr_t>(readable_address(tensor)) % tensor.itemsize() == 0;
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

Geometry::Geometry(at::IntArrayRef sizes, at::IntArrayRef strides) {
  numbers_.append(sizes.begin(), sizes.end());
  numbers_.append(strides.begin(), strides.end());
}

Place::Place(const c10::TensorImpl& tensor)
    : storage(tensor.unsafe_storage().data()),
      deleter(tensor.unsafe_storage().data_ptr().get_deleter()),
      offset(tensor.storage_offset()),
      end(end_of_elements(tensor)) {}

Seen::Seen(const c10::TensorImpl& tensor)
    : data(writable_address(tensor)),
      place(tensor),
      device(tensor.device()),
      is_contiguous(tensor.is_contiguous()),
      keys(tensor.key_set()),
      dtype(tensor.dtype()),
      geometry(tensor.sizes(), tensor.strides()) {}

bool Seen::takes(const c10::TensorImpl& tensor, Target target) {
  if (tensor.key_set() != keys || tensor.dtype() != dtype || !geometry.is_that_of(tensor) ||
      tensor.device() != device || lacks_memory(tensor) || !is_aligned_for(target, tensor))
    return false;
  data = writable_address(tensor);
  place = Place(tensor);
  return true;
}

Extent Seen::extent(int32_t row) const {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, place.end == 0 ? begin : place.end, row};
}

}  // namespace wd_fused
