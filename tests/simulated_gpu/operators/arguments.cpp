#include "arguments.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

namespace operators_on_cpu {

c10::IValue with_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& replaced) {
  const auto each = [&](const at::Tensor& tensor) { return tensor.defined() ? replaced(tensor) : tensor; };
  if (value.isTensor()) return each(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(each(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(each(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

int returned_argument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  if (result.alias_info() == nullptr) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* info = schema.arguments()[i].alias_info();
    if (info != nullptr && info->beforeSets() == result.alias_info()->beforeSets()) return static_cast<int>(i);
  }
  return -1;
}

int device_of(const c10::FunctionSchema& schema, const Stack& arguments) {
  int device = -1;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool indices = arguments[i].isOptionalTensorList();
    with_tensors(arguments[i], [&](const at::Tensor& tensor) {
      const bool number = tensor.is_cpu() && (indices || (tensor.dim() == 0 && !is_written(schema.arguments()[i])));
      TORCH_CHECK(number || (tensor.is_cuda() && (device < 0 || device == tensor.get_device())),
                  "Expected all tensors to be on the same device, but argument ", schema.arguments()[i].name(), " of ",
                  schema.name(), " is on ", tensor.device(),
                  device < 0 ? "" : ", another on cuda:" + std::to_string(device));
      if (!number) device = tensor.get_device();
      return tensor;
    });
  }
  return device;
}

at::Tensor on_cpu(const at::Tensor& tensor) {
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  if (tensor.is_cpu()) {
    at::Tensor copy = at::empty_strided(tensor.sizes(), tensor.strides(), options).copy_(tensor);
    copy.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
    return copy;
  }
  void* data = tensor.numel() == 0 ? nullptr : static_cast<char*>(tensor.data_ptr()) + simulated_gpu_alias_distance();
  at::Tensor alias = at::from_blob(data, tensor.sizes(), tensor.strides(), options);
  alias._set_neg(tensor.is_neg());
  alias._set_conj(tensor.is_conj());
  return alias;
}

at::Tensor on_meta(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.dim() == 0) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(),
                           at::TensorOptions().dtype(tensor.dtype()).device(at::kMeta));
}

void add_range(std::vector<SimulatedGpuRange>& ranges, const at::Tensor& tensor, bool writes) {
  if (!tensor.is_cuda() || tensor.numel() == 0) return;
  std::uint64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto begin = reinterpret_cast<std::uint64_t>(tensor.data_ptr());
  ranges.push_back({begin, begin + (last + 1) * tensor.element_size(), writes});
}

}  // namespace operators_on_cpu
