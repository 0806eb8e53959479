// What plans ask of tensors and numbers. Used by step_plan.cpp and options_plan.cpp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/COW.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "plan/tensor_table.h"

namespace wd_fused {

// Elements below which another thread costs more than it brings.
inline constexpr int64_t kGrain = 65536;
// Calls work(first tile, last tile) until all have had their turn, in threads where there are elements enough.
template <class Work>
void for_tiles(const TensorTable& table, int64_t elements, const Work& work) {
  if (elements <= kGrain) return work(0, static_cast<int64_t>(table.tiles().size()));
  at::parallel_for(0, table.tiled_elements(), kGrain, [&](int64_t begin, int64_t end) {
    const auto [first, last] = table.tiles_between(begin, end);
    work(first, last);
  });
}

template <class... Parts>
inline std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// As Python writes it: "bfloat16".
inline std::string name_of(caffe2::TypeMeta dtype) {
  return std::string(c10::getDtypeNames(dtype.toScalarType()).first);
}

inline float in_float(double value, const char* name, size_t group) {
  const auto narrow = static_cast<float>(value);
  if (std::isinf(narrow) && !std::isinf(value))
    throw std::runtime_error(joined("group ", group, ": ", name, "=", value, " does not fit into float32"));
  return narrow;
}

// The address of a plain tensor's first element. const_data_ptr() and mutable_data_ptr() say the same with checks that
// the keys have answered already, 70 instructions each, three times a row. A copy-on-write storage is made its owner's.
inline void* writable_address(const c10::TensorImpl& tensor) {
  std::optional<c10::DeviceGuard> there;  // or the storage's own memory would be taken on the current device
  if (c10::impl::cow::is_cow_data_ptr(tensor.unsafe_storage().data_ptr())) there.emplace(tensor.device());
  return static_cast<char*>(tensor.unsafe_storage().mutable_data()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
}
inline const void* readable_address(const c10::TensorImpl& tensor) {
  return static_cast<const char*>(tensor.unsafe_storage().data()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
}

inline at::Tensor owned(const c10::TensorImpl* tensor) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(
      const_cast<c10::TensorImpl*>(tensor)));
}

inline Extent extent_of(const c10::TensorImpl& tensor, int32_t row) {
  const auto begin = reinterpret_cast<uintptr_t>(readable_address(tensor));
  if (tensor.numel() == 0) return {begin, begin, row};
  int64_t last = 0;
  for (size_t d = 0; d < tensor.sizes().size(); ++d) last += (tensor.sizes()[d] - 1) * tensor.strides()[d];
  return {begin, begin + static_cast<uintptr_t>(last + 1) * tensor.itemsize(), row};
}

// Where a tensor's elements end, and where its storage does, which somebody may have resized.
inline uintptr_t end_of_elements(const c10::TensorImpl& tensor) {
  return tensor.numel() == 0 ? 0 : extent_of(tensor, -1).end;
}
inline uintptr_t end_of_memory(const c10::TensorImpl& tensor) {
  const c10::Storage& storage = tensor.unsafe_storage();
  return reinterpret_cast<uintptr_t>(storage.data()) + storage.nbytes();
}
inline bool lacks_memory(const c10::TensorImpl& tensor) {
  return (tensor.unsafe_storage().data() == nullptr && tensor.numel() > 0) ||
         end_of_memory(tensor) < end_of_elements(tensor);
}
inline std::string why_it_lacks_memory(const c10::TensorImpl& tensor) {
  const c10::Storage& storage = tensor.unsafe_storage();
  return joined("has a storage of ", storage.nbytes(), " bytes, and its shape and strides need ",
                end_of_elements(tensor) - reinterpret_cast<uintptr_t>(storage.data()));
}

}  // namespace wd_fused
