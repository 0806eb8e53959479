# What a person or CI does with this repository. Every target makes its own virtual environment in .venv first, installs the
# versions of constraints.txt there, and builds the package in place; both are done again only when their inputs change.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC   := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

.PHONY: demo test simulated-gpu integrations lint bench bench-full bench-smoke gpu-check sass ptx install clean

demo: install
	$(RUN) examples/train_digits.py

# Two processes, a file at a time, in the order of their names: the longest ones come first. The benchmarks' own test is that of
# bench-smoke. The tests that need a GPU run on a simulated one, whatever became of the others; on a real one too, if it is here.
test: install
	@failed=0; set -x; \
	$(RUN) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/test_bench_smoke.py \
	    $(if $(shell command -v nvidia-smi),,--ignore=tests/gpu) || failed=1; \
	$(SIMULATED_GPU) || failed=1; exit $$failed

# tests/simulated_gpu/README.md
SIMULATED_GPU := $(RUN) -m tests.simulated_gpu -m pytest tests/gpu tests/simulated_gpu -n 2
simulated-gpu: install
	$(SIMULATED_GPU)

# Other people's training frameworks, with pip's help: docs/integrations.md. Writes integrations/results/DATE-TIME.json.
integrations: $(VENV)/integrations.stamp
	$(RUN) -m pytest integrations tests/test_tail_reference.py::test_decoupled_weight_decay_is_timms_sgdw --write-results

# What a user gains, in five minutes: bench/README.md. Writes bench/results/DEVICES-DATE-TIME.json.
bench: $(VENV)/bench.stamp
	$(RUN) -m pytest $(addprefix bench/test_,step.py growth.py training.py memory.py) -q --benchmark-quiet
	$(RUN) -m bench.report

# All suites, whole cases as far as memory goes, more rounds: half an hour.
bench-full: $(VENV)/bench.stamp
	$(RUN) -m pytest bench --full -q --benchmark-quiet
	$(RUN) -m bench.report

# Every benchmark once, small: do they work?
bench-smoke: $(VENV)/bench.stamp
	$(RUN) -m pytest tests/test_bench_smoke.py

# Only on a machine with a GPU. With the torch that is there, not one of .venv's: PYTHON=.venv/bin/python takes that.
gpu-check:
	$(PYTHON) -m bench.gpu_check

sass: install
	$(RUN) -m bench.sass

ptx: install
	$(RUN) -m bench.ptx

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict wd_fused triton_kernels
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/cuda_on_cpu/*.* bench/*.cu bench/*.cpp)

install: $(VENV)/package.stamp

# torch comes first, by itself: the package is built against it.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the tools of constraints.txt into $(VENV): some minutes, once"
	$(PIP) torch ninja setuptools
	touch $@

# With the CUDA part where nvcc fits this torch, for TORCH_CUDA_ARCH_LIST, the GPUs present, or the default targets.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py wd_fused/build_config.py wd_fused/toolchain.py $(CSRC)
	@echo "building wd_fused in place: a minute or two"
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	@sed -n 's/^ *"without_cuda": "\(.*\)"$$/built without the CUDA part: \1/p' wd_fused/_C.json
	touch $@

# The package is there already, so pip installs only what the extra names.
$(VENV)/integrations.stamp: $(VENV)/package.stamp
	@echo "installing Lightning, Accelerate, Transformers and timm into $(VENV): a minute or so, once"
	$(PIP) 'wd_fused[integrations]'
	touch $@

# The other libraries that are compared with.
$(VENV)/bench.stamp: $(VENV)/package.stamp
	$(PIP) 'wd_fused[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f wd_fused/_C.*so wd_fused/_C.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
