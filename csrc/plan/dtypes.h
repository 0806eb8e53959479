// Which of torch's dtypes a step takes, and what they are called here. Used by step_plan.cpp and cuda_step.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "update/sgd_update.h"

namespace wd_fused {

inline std::optional<Storage> storage_of(caffe2::TypeMeta dtype) {
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

// Of a momentum buffer, too: int8 in blocks.
inline std::optional<Storage> storage_of_buffer(caffe2::TypeMeta dtype) {
  return dtype.toScalarType() == at::kChar ? Storage::int8 : storage_of(dtype);
}
inline at::ScalarType dtype_of(Storage storage) {
  constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kChar};
  return kDtypes[static_cast<size_t>(storage)];
}

}  // namespace wd_fused
