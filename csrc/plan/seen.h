// What a plan has seen of a tensor, and whether a tensor is still, or again, what it has seen. Used by step_plan.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <string>

#include "plan/plan_tensors.h"

namespace wd_fused {

// Where a plan's parameters are, and what steps them: our loops on the CPU, our CUDA kernel, or a caller's own kernels
// on a GPU.
enum class Target : int8_t { cpu, cuda, hosted };

// Parameters and momentum buffers that a plan takes: strided, real, on the target, of one of four dtypes, no subclass
// that dispatches to Python, no lazy negation, no inference tensor, no element under two indices. Else the reason.
std::string why_not_planned(const at::Tensor& tensor, Target target);
// The same but for the dtype, of a tensor in the state of options.
std::string why_not_in_state(const at::Tensor& tensor, Target target);

// Whether its keys are those of a tensor made outside of any mode: no subclass, lazy negation, function transform.
bool is_plain(c10::DispatchKeySet keys, Target target);
// A GPU faults on an element that straddles its own size; the CPU does not mind.
bool is_aligned_for(Target target, const c10::TensorImpl& tensor);

// Sizes and strides, to compare with a tensor's at every step.
class Geometry {
 public:
  Geometry() = default;
  Geometry(at::IntArrayRef sizes, at::IntArrayRef strides);
  at::IntArrayRef sizes() const { return {numbers_.data(), numbers_.size() / 2}; }
  at::IntArrayRef strides() const { return {numbers_.data() + numbers_.size() / 2, numbers_.size() / 2}; }
  bool is_that_of(const c10::TensorImpl& tensor) const;

 private:
  c10::SmallVector<int64_t, 8> numbers_;  // sizes, then strides
};
// Where a tensor's elements lie: compared at every step, at a third of the instructions that their address takes. The
// storage's deleter tells a copy-on-write one, which would have to be made the tensor's own before it is written.
struct Place {
  static inline const char kNowhere{};
  const void* storage = &kNowhere;
  c10::DeleterFnPtr deleter = nullptr;
  int64_t offset = 0;  // elements
  uintptr_t end = 0;   // of the elements: a storage that is resized may end before that, where it began before

  Place() = default;
  explicit Place(const c10::TensorImpl& tensor);
  bool is_that_of(const c10::TensorImpl& tensor) const;
};
// What was seen of a tensor when the plan was built, or pointed to it. keys tell kind of device, layout, subclass and
// lazy bits at once.
struct Seen {
  const void* data = nullptr;  // the address of its first element
  Place place;
  c10::Device device{c10::DeviceType::CPU};
  bool is_contiguous = false;
  c10::DispatchKeySet keys;
  caffe2::TypeMeta dtype;
  Geometry geometry;

  Seen() = default;
  explicit Seen(const c10::TensorImpl& tensor);
  bool still_holds(const c10::TensorImpl& tensor) const;
  // Whether it may take the place of what was seen; then it is what was seen.
  bool takes(const c10::TensorImpl& tensor, Target target);
  Extent extent(int32_t row) const;
};

// One loop over a few numbers: ArrayRef's own comparison calls memcmp, which costs more.
WD_FUSED_INLINE bool Geometry::is_that_of(const c10::TensorImpl& tensor) const {
  const size_t dims = tensor.sizes().size();
  if (2 * dims != numbers_.size()) return false;
  const int64_t* sizes = tensor.sizes().data();
  const int64_t* strides = tensor.strides().data();
  const int64_t* seen = numbers_.data();
  for (size_t d = 0; d < dims; ++d)
    if (sizes[d] != seen[d] || strides[d] != seen[dims + d]) return false;
  return true;
}

WD_FUSED_INLINE bool Place::is_that_of(const c10::TensorImpl& tensor) const {
  const c10::StorageImpl& now = *tensor.unsafe_storage().unsafeGetStorageImpl();
  const c10::DataPtr& data = now.data_ptr();
  return data.get() == storage && data.get_deleter() == deleter && tensor.storage_offset() == offset &&
         reinterpret_cast<uintptr_t>(storage) + now.nbytes() >= end;
}

WD_FUSED_INLINE bool Seen::still_holds(const c10::TensorImpl& tensor) const {
  return tensor.key_set() == keys && tensor.dtype() == dtype && place.is_that_of(tensor) && geometry.is_that_of(tensor);
}

}  // namespace wd_fused
