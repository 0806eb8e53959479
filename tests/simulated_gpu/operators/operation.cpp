#include "operation.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>

namespace operators_on_cpu {

namespace {

bool is_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// CUDA's operators compute half precision in float32 and round once. Not those whose result depends on the dtype.
bool computes_in_float(const c10::FunctionSchema& schema) {
  return schema.name().find("nextafter") == std::string::npos && schema.name() != "aten::random_";
}

void collect(const c10::IValue& value, std::vector<at::Tensor>& tensors) {
  with_tensors(value, [&](const at::Tensor& tensor) { return tensors.emplace_back(tensor); });
}

void operate(const Operation& operation) {
  const Isolated isolated;
  const c10::FunctionSchema& schema = operation.op.schema();
  const bool widen = computes_in_float(schema);
  at::ScalarType narrow = at::kFloat;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  Stack stack;
  for (size_t i = 0; i < operation.arguments.size(); ++i) {
    stack.push_back(with_tensors(operation.arguments[i], [&](const at::Tensor& tensor) {
      if (!widen || !is_half(tensor)) return tensor;
      narrow = tensor.scalar_type();
      at::Tensor wide = tensor.to(at::kFloat);
      if (is_written(schema.arguments()[i])) written.emplace_back(tensor, wide);
      return wide;
    }));
  }
  operation.op.callBoxed(stack);
  for (const auto& [tensor, wide] : written) tensor.copy_(wide);
  if (operation.results != nullptr) {
    for (c10::IValue& result : stack)
      result =
          with_tensors(result, [&](const at::Tensor& t) { return t.scalar_type() == at::kFloat ? t.to(narrow) : t; });
    *operation.results = std::move(stack);
    return;
  }
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < stack.size(); ++i)
    if (returned_argument(schema, schema.returns()[i]) < 0) collect(stack[i], results);
  TORCH_CHECK(results.size() == operation.outputs.size(), schema.name(), ": ", results.size(), " results on the CPU, ",
              operation.outputs.size(), " by Meta");
  for (size_t i = 0; i < results.size(); ++i) {
    TORCH_CHECK(results[i].sizes() == operation.outputs[i].sizes(), schema.name(), ": a result of shape ",
                results[i].sizes(), " on the CPU, ", operation.outputs[i].sizes(), " by Meta");
    operation.outputs[i].copy_(results[i]);
  }
}

const char* run(void* data) {
  const auto& operation = *static_cast<const Operation*>(data);
  try {
    operate(operation);
    return nullptr;
  } catch (const std::exception& error) {
    return strdup((operation.op.schema().name() + ": " + error.what()).c_str());
  }
}

void destroy(void* data) { delete static_cast<Operation*>(data); }

}  // namespace

Isolated::Isolated()
    : ForceDispatchKeyGuard(c10::default_included_set,
                            c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView) {}

void enqueue(Operation operation, const std::vector<SimulatedGpuRange>& ranges) {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const std::string name = operation.op.schema().name();
  C10_CUDA_CHECK(static_cast<cudaError_t>(simulated_gpu_enqueue(stream.stream(), stream.device_index(), name.c_str(),
                                                                run, destroy, new Operation(std::move(operation)),
                                                                ranges.data(), ranges.size())));
}

}  // namespace operators_on_cpu
