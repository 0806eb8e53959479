// The tensors among an operator's arguments and results: what each is to the CPU, to Meta, and as bytes of device
// memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <vector>

#include "../runtime/control.h"

namespace operators_on_cpu {

using Stack = torch::jit::Stack;

// The value with each tensor in it, alone or in a list, replaced. Undefined tensors are not asked about.
c10::IValue with_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& replaced);

// Whether the operator writes the argument.
bool is_written(const c10::Argument& argument);

// The argument that an operator returns as this result; -1: a tensor of its own.
int returned_argument(const c10::FunctionSchema& schema, const c10::Argument& result);

// The CUDA device that the tensors lie on; -1 where there is none. Throws, as torch does, where one lies elsewhere: on
// the CPU only numbers may, and indices.
int device_of(const c10::FunctionSchema& schema, const Stack& arguments);

// A CPU tensor over the same bytes, which may be read and written when the operator's turn has come, and not before. A
// CPU tensor's values are those of now.
at::Tensor on_cpu(const at::Tensor& tensor);

// A tensor without data. Numbers stay as they are.
at::Tensor on_meta(const at::Tensor& tensor);

// From the first to the last byte of the tensor.
void add_range(std::vector<SimulatedGpuRange>& ranges, const at::Tensor& tensor, bool writes);

}  // namespace operators_on_cpu
