// A group's hyperparameters as the kernels of a device read them, for CUDA and Triton alike. Plain C++: no torch, no
// CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/table.h"

namespace wd_fused {

// A hyperparameter's value, or where on the device it is read.
enum class ScalarKind : uint8_t { value, float32, float64, float16, bfloat16 };
inline constexpr ScalarKind read_as(Storage storage) { return static_cast<ScalarKind>(1 + static_cast<int>(storage)); }
static_assert(read_as(Storage::float32) == ScalarKind::float32 && read_as(Storage::float64) == ScalarKind::float64 &&
              read_as(Storage::float16) == ScalarKind::float16 && read_as(Storage::bfloat16) == ScalarKind::bfloat16);

// A group's hyperparameters for rows of one storage. Numbers are the bits of opmath.
struct CudaGroup {
  uint64_t lr;  // value: minus lr; else the address of lr
  uint64_t weight_decay;
  uint64_t momentum;
  uint64_t one_minus_dampening;
  ScalarKind lr_kind;
  ScalarKind weight_decay_kind;
  Storage storage;
  uint8_t has_momentum : 1, decays : 1, nesterov : 1, maximize : 1;
};
static_assert(sizeof(CudaGroup) == 40, "five words");

// The same with the numbers of the options.
struct CudaGroupOptions {
  CudaGroup sgd;
  uint64_t l1;
  uint64_t keep;  // where lr is read on the device: decoupled, c in 1 - lr c
  uint64_t average_weight;
  uint64_t clip;  // the coefficient; where it is formed on the device: the largest norm, in the bits of the norm's type
  uint32_t random_key[2];
  int32_t norm;  // which one the coefficient is formed of; -1: clip is the coefficient
  uint8_t clips, penalizes, shrinks, unused;
};
inline constexpr int kWordsOfGroupOptions = sizeof(CudaGroupOptions) / sizeof(uint64_t);
static_assert(sizeof(CudaGroupOptions) == 88, "eleven words of a parameter block");

// A hyperparameter that lies in device memory; kind `value`: it does not.
struct DeviceScalar {
  const void* address = nullptr;
  ScalarKind kind = ScalarKind::value;
};

// What a launch must know of a group, beyond what the CPU needs.
struct CudaGroupInput {
  DeviceScalar lr;
  DeviceScalar weight_decay;
  bool has_momentum;
};

// What torch.amp.GradScaler has the kernel read on the device; null where there is no such thing.
struct CudaAmp {
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
};

// All of a step that kernels must know. row_options, steps: a group's numbers of the options, after and before
// conversions; none where there are no options.
struct StepOptionsInput {
  const std::vector<RowInput>& rows;
  const std::vector<GroupScalars>& scalars;
  const std::vector<CudaGroupInput>& groups;
  const std::vector<GroupOptions>& row_options;
  const std::vector<GroupStep>& steps;
  const Norm& norm;
  const CudaAmp& amp;
};

// A group's hyperparameters for rows of one storage, as kernels read them.
CudaGroup in_words(const GroupScalars& scalars, const CudaGroupInput& input, Storage storage);
CudaGroupOptions in_words(const Table::Group& of, const StepOptionsInput& step);
// Whether the step forms a norm, and coefficients from it, on the device.
inline bool forms_norm(const Norm& norm) { return norm.is_used && norm.coefficients.empty(); }

}  // namespace wd_fused
