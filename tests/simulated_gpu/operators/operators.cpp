// torch's CUDA operators, which have no PTX to run, by the CPU's: registered in their place once torch.cuda is
// initialized.
//
// An operator that computes is checked and shaped by its Meta kernel, and becomes an entry of its stream's queue. What
// only allocates, or looks at memory otherwise, stays torch's own, and so does every copy that is a copy of bytes.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <set>

#include "operation.h"

namespace operators_on_cpu {

namespace {

// Whatever is drawn is drawn on the CPU, by a generator made of the state of CUDA's, which goes on.
at::Generator generator_on_cpu(const c10::IValue& given, int device) {
  at::Generator generator = given.isNone() ? at::cuda::detail::getDefaultCUDAGenerator(device) : given.toGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const at::PhiloxCudaState state = at::check_generator<at::CUDAGeneratorImpl>(generator)->philox_cuda_state(4);
  TORCH_CHECK(!state.captured_, "random numbers in a captured graph are not simulated");
  return at::detail::createCPUGenerator(state.seed_.val + 0x9e3779b97f4a7c15 * state.offset_.val);
}

c10::IValue argument_on_cpu(const c10::Argument& argument, const c10::IValue& value, int device) {
  const bool generator = argument.type()->str().find("Generator") != std::string::npos;
  if (generator) return generator_on_cpu(value, device);
  if (value.isDevice()) return at::Device(at::kCPU);
  return with_tensors(value, on_cpu);
}

// Whether the shapes of the results depend on data: where they do, the host waits.
bool depends_on_data(const c10::OperatorHandle& op, const Stack& arguments) {
  if (op.hasTag(at::Tag::data_dependent_output)) return true;
  if (!op.hasTag(at::Tag::dynamic_output_shape)) return false;
  bool indexed = false, masked = false;
  for (const c10::IValue& value : arguments) {
    if (!value.isOptionalTensorList()) continue;
    indexed = true;
    with_tensors(value, [&](const at::Tensor& index) {
      masked |= index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
      return index;
    });
  }
  return masked || !indexed;
}

// The results without their data; the arguments that are written are brought to the shape that the operator gives them.
Stack shapes(const c10::OperatorHandle& op, const Stack& arguments) {
  const Isolated isolated;
  Stack metas, results;
  for (const c10::IValue& value : arguments)
    metas.push_back(value.isDevice() ? c10::IValue(at::Device(at::kMeta)) : with_tensors(value, on_meta));
  results = metas;
  op.callBoxedForDispatchKey(c10::DispatchKey::Meta, results);
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!is_written(op.schema().arguments()[i]) || !arguments[i].isTensor()) continue;
    if (metas[i].toTensor().sizes() != arguments[i].toTensor().sizes())
      arguments[i].toTensor().resize_(metas[i].toTensor().sizes());
  }
  return results;
}

bool has_results(const c10::FunctionSchema& schema) {
  return std::any_of(schema.returns().begin(), schema.returns().end(),
                     [&](const c10::Argument& result) { return returned_argument(schema, result) < 0; });
}

void by_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const Stack arguments(stack->end() - count, stack->end());
  stack->resize(stack->size() - count);
  const int found = device_of(schema, arguments);
  const int device = found < 0 ? c10::cuda::current_device() : found;
  const c10::cuda::CUDAGuard current(static_cast<c10::DeviceIndex>(device));

  bool waits = depends_on_data(op, arguments);
  Stack results;
  try {
    if (!waits) results = shapes(op, arguments);
  } catch (const c10::NotImplementedError&) {
    waits = has_results(schema);  // it has no Meta kernel: the CPU's results tell their shapes
    if (!waits) results.resize(schema.returns().size());
  }

  Operation operation{op, {}, {}, waits ? std::make_shared<Stack>() : nullptr};
  std::vector<SimulatedGpuRange> ranges;
  for (size_t i = 0; i < count; ++i) {
    operation.arguments.push_back(argument_on_cpu(schema.arguments()[i], arguments[i], device));
    with_tensors(arguments[i], [&](const at::Tensor& tensor) {
      const bool writes = is_written(schema.arguments()[i]);
      if (writes) at::assert_no_internal_overlap(tensor);  // an error of the call, which would be found when it runs
      add_range(ranges, tensor, writes);
      return tensor;
    });
  }
  for (size_t i = 0; i < results.size(); ++i) {
    const int argument = returned_argument(schema, schema.returns()[i]);
    if (argument >= 0) {
      stack->push_back(arguments[argument]);
      continue;
    }
    stack->push_back(with_tensors(results[i], [&](const at::Tensor& shape) {
      at::Tensor made = at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(at::kCUDA, device));
      add_range(ranges, made, true);
      operation.outputs.push_back(on_cpu(made));
      return made;
    }));
  }
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const std::shared_ptr<Stack> data = operation.results;
  if (waits && c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    c10::cuda::stream_synchronize(stream);  // which fails
  enqueue(std::move(operation), ranges);
  if (!waits) return;
  c10::cuda::stream_synchronize(stream);
  for (const c10::IValue& result : *data)
    stack->push_back(with_tensors(result, [&](const at::Tensor& t) { return t.to(at::Device(at::kCUDA, device)); }));
}

// Lists of tensors, and whatever else the CPU has no kernel of its own for: one operator after the other, on the GPU.
void by_other_operators(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

bool same_bytes(const at::Tensor& to, const at::Tensor& from) {
  return to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() && to.strides() == from.strides() &&
         to.is_non_overlapping_and_dense() && to.is_conj() == from.is_conj() && to.is_neg() == from.is_neg();
}

void copy_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const bool non_blocking = stack->back().toBool();
  const at::Tensor from = (*stack)[stack->size() - 2].toTensor();
  at::Tensor to = (*stack)[stack->size() - 3].toTensor();
  if (!to.is_cuda() || !from.is_cuda() || same_bytes(to, from) || to.numel() == 0) {
    stack->resize(stack->size() - 3);
    stack->push_back(at::native::copy_(to, from, non_blocking));
  } else if (to.device() == from.device()) {
    by_the_cpu(op, keys, stack);
  } else {  // its elements on its own device, the bytes to the other, and there to their places
    at::Tensor packed = at::empty(from.sizes(), to.options().device(from.device())).copy_(from);
    at::Tensor moved = at::empty(from.sizes(), to.options());
    at::native::copy_(moved, packed, non_blocking);
    to.copy_(moved);
    stack->resize(stack->size() - 3);
    stack->push_back(to);
  }
}

// Of the host, or a view, or without a counterpart on the CPU: as torch has it.
bool stays(const c10::OperatorHandle& op) {
  static const std::set<std::string> of_the_host = {"aten::empty",
                                                    "aten::empty_strided",
                                                    "aten::_efficientzerotensor",
                                                    "aten::resize_",
                                                    "aten::set_",
                                                    "aten::is_set_to",
                                                    "aten::record_stream",
                                                    "aten::_local_scalar_dense",
                                                    "aten::_cudnn_init_dropout_state"};
  const auto& returns = op.schema().returns();
  return of_the_host.count(op.schema().name()) || !op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) ||
         std::any_of(returns.begin(), returns.end(), [](const c10::Argument& result) {
           return result.alias_info() != nullptr && !result.alias_info()->isWrite();
         });
}

// Memory may be garbage, and in use elsewhere, when torch's allocator gives it to a tensor: the device looks.
void watch_allocations() {
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const auto& entry) {
    if (entry.action_ == std::decay_t<decltype(entry)>::ALLOC)
      simulated_gpu_allocated(entry.stream_, entry.device_, entry.addr_, entry.size_);
  });
}

struct Silent : c10::WarningHandler {  // torch warns of kernels that are registered in another's place
  void process(const c10::Warning&) override {}
};

}  // namespace

}  // namespace operators_on_cpu

extern "C" __attribute__((visibility("default"))) void simulated_gpu_install_operators() {
  using namespace operators_on_cpu;
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  Silent silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CUDA)) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const std::optional<c10::OperatorHandle> op = dispatcher.findSchema(name);
    if (!op || stays(*op)) continue;
    const std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CPU))
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
    else
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&by_other_operators>());
  }
  // Above what torch chooses for a GPU, which has no Meta kernel.
  for (const char* name : {"aten::convolution", "aten::convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
  library.impl("aten::copy_", torch::CppFunction::makeFromBoxedFunction<&copy_boxed>());
  watch_allocations();
  at::globalContext().setUserEnabledCuDNN(false);  // norms then are operators that the CPU has
}
