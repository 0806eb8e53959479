// The operators torch.ops.wd_fused.*, for functional use and torch.compile: schema, CPU, CUDA and Meta. FusedSGD.step()
// does not come through here: a dispatched call with three lists of tensors costs more than a step of a small model.
#include "python/ops.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <list>
#include <memory>
#include <mutex>

namespace wd_fused {
namespace {

void check_lists(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 const c10::List<bool>& first_steps, double momentum) {
  TORCH_CHECK_VALUE(params.size() == grads.size(), "sgd_: ", params.size(), " params but ", grads.size(), " grads");
  const size_t buffers = momentum == 0 ? 0 : params.size();
  TORCH_CHECK_VALUE(momentum_buffers.size() == buffers && first_steps.size() == buffers, "sgd_: momentum=", momentum,
                    " needs ", buffers, " momentum_buffers and first_steps, got ", momentum_buffers.size(), " and ",
                    first_steps.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_VALUE(params[i].sizes() == grads[i].sizes(), "sgd_: tensor ", i, ": param has shape ",
                      params[i].sizes(), ", grad ", grads[i].sizes());
    TORCH_CHECK_VALUE(buffers == 0 || params[i].sizes() == momentum_buffers[i].sizes(), "sgd_: tensor ", i,
                      ": param has shape ", params[i].sizes(), ", momentum buffer ", momentum_buffers[i].sizes());
  }
}

template <Target kTarget>
void sgd_of(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first_steps,
            double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
            bool opmath) {
  sgd(kTarget, {}, params, grads, momentum_buffers, first_steps,
      {lr, momentum, 1 - dampening, weight_decay, nesterov, maximize}, opmath ? Numerics::opmath : Numerics::torch);
}

// Shapes only: nothing is allocated and nothing returned.
void sgd_meta(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first_steps,
              double /*lr*/, double momentum, double /*dampening*/, double /*weight_decay*/, bool /*nesterov*/,
              bool /*maximize*/, bool /*opmath*/) {
  check_lists(params, grads, momentum_buffers, first_steps, momentum);
}

// A compiled graph steps the same tensors time and again: the plans of the last calls are kept, by addresses alone, so
// that none keeps a tensor alive. Whatever lies elsewhere, or is of another kind, by then makes a new one.
struct KeptPlan {
  Target target;
  Numerics numerics;
  bool has_momentum;
  size_t size;
  const void* first;  // where the first parameter's memory begins
  std::unique_ptr<StepPlan> plan;
};
constexpr size_t kMostKept = 16;

struct Shelf {
  std::mutex mutex;
  std::list<KeptPlan> plans;  // the last one first
};
Shelf& shelf() {
  static auto* all = new Shelf;  // not destroyed: CUDA and Python may be gone by then
  return *all;
}

KeptPlan taken_from_shelf(KeptPlan wanted) {
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  const auto found = std::find_if(shelf().plans.begin(), shelf().plans.end(), [&](const KeptPlan& kept) {
    return kept.target == wanted.target && kept.numerics == wanted.numerics &&
           kept.has_momentum == wanted.has_momentum && kept.size == wanted.size && kept.first == wanted.first;
  });
  if (found == shelf().plans.end()) return wanted;
  wanted.plan = std::move(found->plan);
  shelf().plans.erase(found);
  return wanted;
}

void put_on_shelf(KeptPlan kept) {
  std::list<KeptPlan> too_many;  // goes after the lock: what a plan has of Python's waits for the GIL
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  shelf().plans.push_front(std::move(kept));
  if (shelf().plans.size() > kMostKept) too_many.splice(too_many.begin(), shelf().plans, --shelf().plans.end());
}

}  // namespace

void sgd(Target target, const MakeDeviceStep& make_step, at::TensorList params, at::TensorList grads,
         at::TensorList momentum_buffers, const c10::List<bool>& first_steps, const Hyperparameters& hyperparameters,
         Numerics numerics) {
  const bool has_momentum = hyperparameters.momentum != 0;
  check_lists(params, grads, momentum_buffers, first_steps, hyperparameters.momentum);
  const void* first = params.empty() || !params[0].has_storage() ? nullptr : params[0].storage().data();
  KeptPlan kept = taken_from_shelf({target, numerics, has_momentum, params.size(), first, nullptr});
  // A former call's plan may take a gradient for the memory of a tensor that is gone: the last word has a new one.
  const auto reads_all = [&](StepPlan& plan, bool is_new) {
    plan.begin({hyperparameters});
    for (size_t i = 0; i < params.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      if (has_momentum) plan.lend(row, momentum_buffers[i]);
      const auto reading =
          plan.read(row, params[i], grads[i], has_momentum ? momentum_buffers[i].unsafeGetTensorImpl() : nullptr,
                    has_momentum && first_steps[i]);
      if (reading == StepPlan::Reading::taken) continue;
      if (!is_new) return false;
      TORCH_CHECK(false, "sgd_: tensor ", i, " cannot be stepped: ",
                  reading == StepPlan::Reading::no_gradient ? "its grad is undefined" : plan.why_left());
    }
    return true;
  };
  if (kept.plan == nullptr || !reads_all(*kept.plan, /*is_new=*/false)) {
    std::vector<PlannedParameter> parameters;
    parameters.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i)
      parameters.push_back(
          {params[i], has_momentum ? momentum_buffers[i] : at::Tensor(), 0, static_cast<int64_t>(i), {}, {}});
    kept.plan = std::make_unique<StepPlan>(std::move(parameters), numerics, target, make_step);
    reads_all(*kept.plan, /*is_new=*/true);
  }
  kept.plan->make_ready();
  kept.plan->run();
  for (int64_t row = 0; has_momentum && row < kept.plan->size(); ++row) kept.plan->lend(row, {});
  put_on_shelf(std::move(kept));
}

TORCH_LIBRARY(wd_fused, library) {
  library.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first_steps, *, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool opmath=False) -> ()");
}
TORCH_LIBRARY_IMPL(wd_fused, CPU, library) { library.impl("sgd_", sgd_of<Target::cpu>); }
#if defined(WD_FUSED_CUDA)
TORCH_LIBRARY_IMPL(wd_fused, CUDA, library) { library.impl("sgd_", sgd_of<Target::cuda>); }
#endif
TORCH_LIBRARY_IMPL(wd_fused, Meta, library) { library.impl("sgd_", sgd_meta); }

}  // namespace wd_fused
