// Which of torch's dtypes a step takes, and what they are called here. Used by step_plan.cpp and cuda_step.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "sgd_update.h"

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

}  // namespace wd_fused
