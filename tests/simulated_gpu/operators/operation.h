// An operator as an entry of a stream's queue: what the CPU's operator does, when its turn comes, over the same memory.
#pragma once

#include <memory>

#include "arguments.h"

namespace operators_on_cpu {

struct Operation {
  c10::OperatorHandle op;
  Stack arguments;                  // of the CPU, over device memory
  std::vector<at::Tensor> outputs;  // likewise: where the results go that are tensors of their own, in their order
  std::shared_ptr<Stack> results;   // where they go if their shapes depend on data; null: to `outputs`
};

// Neither autograd nor modes of Python's see what is called while this lives.
struct Isolated : c10::impl::ForceDispatchKeyGuard {
  Isolated();
};

// Puts it on the current stream of the current device, or into the graph that is being captured there.
void enqueue(Operation operation, const std::vector<SimulatedGpuRange>& ranges);

}  // namespace operators_on_cpu
