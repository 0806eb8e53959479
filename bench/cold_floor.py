"""How fast a step between other optimizers' steps, its caches filled by them, could be at best: loops that know all
addresses beforehand, and then look at what a step has to look at, one thing more each, beside the steps themselves.
On the CPU. python -m bench.cold_floor
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.cpp_extension import load_inline

from bench.cases import many, parameters
from bench.replaced import DEFAULT, FUSED, MAKERS

SOURCE = r"""
#include <torch/csrc/autograd/python_variable.h>

#include <deque>

struct Row {
  float* p; const float* g; float* b;
  int64_t n;
  c10::TensorImpl *param, *buffer;
};
static std::deque<std::vector<Row>> plans;

static void fetch(const void* at, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i);
}

int64_t plan(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& buffers) {
  std::vector<Row>& rows = plans.emplace_back();
  for (size_t i = 0; i < params.size(); ++i)
    rows.push_back({params[i].data_ptr<float>(), params[i].grad().data_ptr<float>(), buffers[i].data_ptr<float>(),
                    params[i].numel(), params[i].unsafeGetTensorImpl(), buffers[i].unsafeGetTensorImpl()});
  return static_cast<int64_t>(plans.size()) - 1;
}

// Every element read and written, a formula as long as SGD's.
void elements(int64_t plan) {
  const std::vector<Row>& rows = plans[plan];
  for (size_t r = 0; r < rows.size(); ++r) {
    if (r + 8 < rows.size())
      for (const void* at : {(const void*)rows[r + 8].p, (const void*)rows[r + 8].g, (const void*)rows[r + 8].b})
        fetch(at, 256);
    const Row& row = rows[r];
    for (int64_t i = 0; i < row.n; ++i) {
      const float g = row.g[i] + 5e-4f * row.p[i];
      row.b[i] = 0.9f * row.b[i] + g;
      row.p[i] -= 0.1f * row.b[i];
    }
  }
}

static int64_t look(const c10::TensorImpl* tensor, const void*& address) {
  address = tensor->unsafe_storage().data();
  return tensor->numel();
}

// Where each parameter, gradient and buffer lies now.
int64_t tensors(int64_t plan) {
  std::vector<Row>& rows = plans[plan];
  int64_t seen = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (r + 16 < rows.size()) {
      fetch(rows[r + 16].param, sizeof(c10::TensorImpl));
      fetch(rows[r + 16].buffer, sizeof(c10::TensorImpl));
    }
    if (r + 8 < rows.size()) {
      fetch(rows[r + 8].param->grad().unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      fetch(rows[r + 8].param->unsafe_storage().unsafeGetStorageImpl(), 64);
      fetch(rows[r + 8].buffer->unsafe_storage().unsafeGetStorageImpl(), 64);
    }
    Row& row = rows[r];
    seen += look(row.param, (const void*&)row.p) + look(row.param->grad().unsafeGetTensorImpl(), (const void*&)row.g) +
            look(row.buffer, (const void*&)row.b);
  }
  return seen;
}

// Which buffer the optimizer's state has for each parameter.
int64_t state(int64_t plan, const pybind11::dict& of_optimizer) {
  std::vector<Row>& rows = plans[plan];
  int64_t seen = 0;
  Py_ssize_t at = 0;
  PyObject *key, *entry, *buffer;
  while (PyDict_Next(of_optimizer.ptr(), &at, &key, &entry)) {
    Py_ssize_t first = 0;
    if (PyDict_Next(entry, &first, &key, &buffer))
      rows[seen++].buffer = THPVariable_Unpack(buffer).unsafeGetTensorImpl();
  }
  return seen;
}
"""
LOOPS = ("elements", "and where tensors lie", "and the state's buffers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cold_floor", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    native = load_inline(
        "wd_fused_cold_floor",
        SOURCE,
        functions=["plan", "elements", "tensors", "state"],
        extra_cflags=["-O3", "-mavx2"],
    )
    case = many(1_000, 64)
    others = [MAKERS[DEFAULT](parameters(case)) for _ in range(3)]
    turns: dict[str, Callable[[], Any]] = {}
    for name in ("wd_fused", FUSED, *LOOPS):
        params = parameters(case)
        optimizer = MAKERS["wd_fused" if name in LOOPS else name](params)
        optimizer.step()
        turns[name] = optimizer.step
        if name in LOOPS:
            turns[name] = _loop(native, optimizer, params, LOOPS.index(name))
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, step in turns.items():
            for other in others:
                other.step()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: 1e6 * statistics.median(found) for name, found in seconds.items()}
    print(f"{case.title}, between three other optimizers' steps: {FUSED} takes so many times as long")
    for name, median in medians.items():
        print(f"{name:28}{median:9,.0f} µs{medians[FUSED] / median:8.1f}")


def _loop(native: Any, optimizer: Any, params: list[torch.Tensor], looks: int) -> Callable[[], Any]:
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
    plan = native.plan(params, buffers)

    def step() -> None:
        if looks > 1:
            native.state(plan, optimizer.state)
        if looks > 0:
            native.tensors(plan)
        native.elements(plan)

    return step


if __name__ == "__main__":
    main()
