# What a person or CI does with this repository. Every target makes its own virtual environment in .venv first, installs the
# versions of constraints.txt there, and builds the package in place; both are done again only when their inputs change.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt
CSRC   := $(wildcard $(addprefix csrc/*/*.,cpp h cu cuh))

.PHONY: demo test simulated-gpu integrations lint bench bench-full bench-smoke gpu-check sass ptx install constraints clean

# Each target says first what it does and how long that takes; without a terminal, too, something is printed as it goes on.
SAY    := @printf '==> %s\n'
export PYTHONUNBUFFERED := 1

demo: install
	$(SAY) "training on handwritten digits, five comparisons: a minute"
	$(RUN) examples/train_digits.py

# Two processes, a file at a time, in the order of their names: the longest ones come first. The benchmarks' own test is that of
# bench-smoke. The tests that need a GPU run on a simulated one, whatever became of the others; on a real one too, if it is here.
test: install
	$(SAY) "the tests, in two processes: a quarter of an hour on two cores"
	@failed=0; set -x; \
	$(RUN) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/test_bench_smoke.py \
	    $(if $(shell command -v nvidia-smi),,--ignore=tests/gpu) || failed=1; \
	$(SIMULATED_GPU) || failed=1; exit $$failed

# tests/simulated_gpu/README.md
SIMULATED_GPU := $(RUN) -m tests.simulated_gpu -m pytest tests/gpu tests/simulated_gpu -n 2
simulated-gpu: install
	$(SAY) "the tests that need a GPU, on a simulated one: six minutes on two cores"
	$(SIMULATED_GPU)

# Other people's training frameworks, with pip's help: docs/integrations.md. Writes integrations/results/DATE-TIME.json.
integrations: $(VENV)/integrations.stamp
	$(SAY) "training in Lightning, Accelerate, Transformers and timm: two minutes"
	$(RUN) -m pytest integrations tests/test_tail_reference.py::test_decoupled_weight_decay_is_timms_sgdw --write-results

# What a user gains, in five minutes: bench/README.md. Writes bench/results/DEVICES-DATE-TIME.json.
bench: $(VENV)/bench.stamp
	$(SAY) "the benchmarks: five minutes"
	$(RUN) -m pytest $(addprefix bench/test_,step.py growth.py training.py memory.py) --benchmark-quiet
	$(RUN) -m bench.report

# All suites, whole cases as far as memory goes, more rounds: half an hour.
bench-full: $(VENV)/bench.stamp
	$(SAY) "all benchmarks: half an hour"
	$(RUN) -m pytest bench --full --benchmark-quiet
	$(RUN) -m bench.report

# Every benchmark once, small: do they work?
bench-smoke: $(VENV)/bench.stamp
	$(SAY) "every benchmark once, small: two minutes"
	$(RUN) -m pytest tests/test_bench_smoke.py

# Only on a machine with a GPU. With the torch that is there, else with that of .venv.
gpu-check:
	$(SAY) "all that only a GPU can tell: up to half an hour"
	@for python in $(PYTHON) $(RUN); do \
	    if "$$python" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then \
	        echo "$$python -m bench.gpu_check"; exec "$$python" -m bench.gpu_check; \
	    fi; \
	done; \
	echo "gpu-check: neither $(PYTHON) nor $(RUN) has torch: PYTHON=... names one that has, make install makes $(RUN)" >&2; exit 2

sass: install
	$(SAY) "what nvcc makes of the kernels: some minutes"
	$(RUN) -m bench.sass

ptx: install
	$(SAY) "what Triton makes of the kernels: some minutes"
	$(RUN) -m bench.ptx

# constraints.txt, from what is installed. For newer versions: $(RUN) -m pip install --upgrade ..., then this.
constraints: $(VENV)/integrations.stamp $(VENV)/bench.stamp
	$(RUN) .ci/constraints.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict wd_fused triton_kernels
	$(RUN) .ci/constraints.py --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard $(addprefix tests/simulated_gpu/,*.cpp */*.cpp */*.h) bench/*.cu bench/*.cpp)

install: $(VENV)/package.stamp

# torch comes first, by itself: the package is built against it.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) .ci/prerequisites.py $(VENV)
	$(SAY) "installing torch into $(VENV): 6 GB, some minutes, once; the last of them is silent"
	@existed=$$(ls -d $(VENV) 2>/dev/null); $(PYTHON) -m venv $(VENV) || { [ "$$existed" ] || rm -rf $(VENV); exit 1; }
	$(PIP) torch ninja setuptools
	touch $@

# With the CUDA part where nvcc fits this torch, for TORCH_CUDA_ARCH_LIST, the GPUs present, or the default targets.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py wd_fused/build_config.py wd_fused/toolchain.py $(CSRC)
	$(SAY) "building wd_fused in place, and installing what its tests need: a minute or two, more with nvcc"
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	@sed -n 's/^ *"without_cuda": "\(.*\)"$$/built without the CUDA part: \1/p' wd_fused/_C.json
	touch $@

# The package is there already, so pip installs only what the extra names.
$(VENV)/integrations.stamp: $(VENV)/package.stamp
	$(SAY) "installing Lightning, Accelerate, Transformers and timm into $(VENV): a minute or so, once"
	$(PIP) 'wd_fused[integrations]'
	touch $@

# The other libraries that are compared with.
$(VENV)/bench.stamp: $(VENV)/package.stamp
	$(SAY) "installing what the benchmarks compare with into $(VENV): half a minute, once"
	$(PIP) 'wd_fused[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f wd_fused/_C.*so wd_fused/_C.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
