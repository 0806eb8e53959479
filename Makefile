# What a person or CI does with this repository. Every target makes its own virtual environment in .venv first, installs the
# versions of constraints.txt there, and builds the package in place; both are done again only when their inputs change.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt
CSRC   := $(wildcard $(addprefix csrc/*/*.,cpp h cu cuh))

.DEFAULT_GOAL := help
.PHONY: help demo test simulated-gpu integrations docs pages lint bench bench-full bench-smoke gpu-check sass ptx wheel install constraints clean

help: # lists the targets; what each takes, once .venv is there
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*# \(.*\)$$/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target what; do \
	    printf '  make %-15s %s\n' "$$target" "$$what"; done
	@printf '\nThe first one makes %s: some minutes and 6 GB, once. PYTHON=python3.12 takes another Python, VENV=folder another place.\n' '$(VENV)'

# Each target says first what it does and how long that takes; without a terminal, too, something is printed as it goes on.
SAY    := @printf '==> %s\n'
export PYTHONUNBUFFERED := 1

# make test RECORD=name keeps what it found in tests/results/name.json, for the tables of docs/proof.md: tests/record.py.
recorded = $(if $(RECORD),-p tests.record --record tests/results/$(RECORD)$(1).json)

demo: install # trains a small CNN, compares, draws pictures into out/: a minute
	$(SAY) "training on handwritten digits, five comparisons: a minute"
	$(RUN) examples/train_digits.py

# Two processes, a file at a time, in the order of their names: the longest ones come first. The benchmarks' own test is that of
# bench-smoke. The tests that need a GPU run on a simulated one, whatever became of the others; on a real one too, if it is here.
test: install # the tests, and those of the GPU on a simulated one: some ten minutes
	$(SAY) "the tests, in two processes: some ten minutes on two cores"
	@failed=0; set -x; \
	$(RUN) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/benchmarks/test_bench_smoke.py $(call recorded) \
	    $(if $(shell command -v nvidia-smi),,--ignore=tests/gpu) || failed=1; \
	$(SIMULATED_GPU) || failed=1; exit $$failed

# tests/simulated_gpu/README.md
SIMULATED_GPU = $(RUN) -m tests.simulated_gpu -m pytest tests/gpu tests/simulated_gpu tests/bits -n 2 $(call recorded,-simulated-gpu)
simulated-gpu: install # the tests that need a GPU, on a simulated one: four minutes
	$(SAY) "the tests that need a GPU, on a simulated one: four minutes on two cores"
	$(SIMULATED_GPU)

# Other people's training frameworks, with pip's help: docs/proof.md. Writes integrations/results/DATE-TIME.json.
integrations: $(VENV)/integrations.stamp # trains in Lightning, Accelerate, Transformers and timm: two minutes
	$(SAY) "training in Lightning, Accelerate, Transformers and timm: two minutes"
	$(RUN) -m pytest integrations tests/bits/test_options_reference.py::test_decoupled_weight_decay_is_timms_sgdw --write-results
	$(RUN) -m pytest tests/documentation/test_docs.py -k snippet

# The documentation as a site, build/site/index.html. A dead link is an error.
docs: $(VENV)/docs.stamp # builds the documentation as a site, strictly: half a minute
	$(SAY) "the documentation, into build/site: half a minute"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "build/site/index.html; its search needs a server: python3 -m http.server -d build/site"

# All numbers and pictures of README.md and docs/: of the benchmarks' newest results, of the demo, of the frameworks' newest results.
DEMO_PICTURES := decay_and_penalty.png what_decays.png
pages: install # numbers and pictures of README and docs, from the newest results: two minutes
	$(SAY) "numbers and pictures of README.md and docs/: two minutes"
	$(RUN) -m bench.report --write
	$(RUN) -m integrations.report --write docs/proof.md
	$(RUN) -m tests.record --write docs/proof.md
	$(RUN) examples/train_digits.py --out build/demo
	cp $(addprefix build/demo/,$(DEMO_PICTURES)) docs/images/

# What a user gains, in five minutes: bench/README.md. Writes bench/results/DEVICES-DATE-TIME.json.
bench: $(VENV)/bench.stamp # what a user gains: five minutes, on an idle machine
	$(SAY) "the benchmarks: five minutes"
	$(RUN) -m pytest $(addprefix bench/test_,step.py growth.py training.py memory.py) --benchmark-quiet
	$(RUN) -m bench.report
	$(RUN) -m bench.replaced

# All suites, whole cases as far as memory goes, more rounds: half an hour.
bench-full: $(VENV)/bench.stamp # all benchmarks, whole cases: half an hour, on an idle machine
	$(SAY) "all benchmarks: half an hour"
	$(RUN) -m pytest bench --full --benchmark-quiet
	$(RUN) -m bench.report

# Every benchmark once, small: do they work?
bench-smoke: $(VENV)/bench.stamp # every benchmark once, small: two minutes
	$(SAY) "every benchmark once, small: two minutes"
	$(RUN) -m pytest tests/benchmarks/test_bench_smoke.py

# Only on a machine with a GPU. With the torch that is there, else with that of .venv.
gpu-check: # all that only a real GPU can tell: up to half an hour
	$(SAY) "all that only a GPU can tell: up to half an hour"
	@for python in $(PYTHON) $(RUN); do \
	    if "$$python" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then \
	        echo "$$python -m bench.gpu.check"; exec "$$python" -m bench.gpu.check; \
	    fi; \
	done; \
	echo "gpu-check: neither $(PYTHON) nor $(RUN) has torch: PYTHON=... names one that has, make install makes $(RUN)" >&2; exit 2

sass: install # what nvcc makes of the kernels: some minutes
	$(SAY) "what nvcc makes of the kernels: some minutes"
	$(RUN) -m bench.sass

ptx: install # what Triton makes of the kernels: some minutes
	$(SAY) "what Triton makes of the kernels: some minutes"
	$(RUN) -m bench.ptx

# For machines without a compiler. auditwheel tells which C library it needs, the last lines which torch, Python and GPUs.
wheel: $(VENV)/wheel.stamp # a wheel with the compiled part, for this torch and Python, into dist/: minutes
	$(SAY) "a wheel for machines with the same torch and Python, into dist: some minutes"
	rm -rf dist
	@mkdir -p build && cp wd_fused/_C.json build/_C.json # every build forgets the record of the module in place
	$(RUN) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .; \
	    status=$$?; cp build/_C.json wd_fused/_C.json; exit $$status
	$(RUN) -m twine check --strict dist/*.whl
	$(RUN) -m auditwheel show dist/*.whl
	@$(RUN) -m zipfile -e dist/*.whl build/wheel && cat build/wheel/wd_fused/_C.json

# constraints.txt, from what is installed. For newer versions: $(RUN) -m pip install --upgrade ..., then this.
constraints: $(VENV)/integrations.stamp $(VENV)/bench.stamp $(VENV)/docs.stamp $(VENV)/wheel.stamp # constraints.txt, from what is installed: seconds
	$(RUN) .ci/constraints.py

lint: install # ruff, mypy, clang-format: a minute
	$(SAY) "the linters: a minute"
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict wd_fused triton_kernels
	$(RUN) .ci/constraints.py --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard $(addprefix tests/simulated_gpu/,*.cpp */*.cpp */*.h) bench/gpu/*.cu bench/measure/*.cpp)

install: $(VENV)/package.stamp # .venv, torch, and the package in place: minutes, once

# torch comes first, by itself: the package is built against it.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) .ci/prerequisites.py $(VENV)
	$(SAY) "installing torch into $(VENV): 6 GB, some minutes, once; the last of them is silent"
	@existed=$$(ls -d $(VENV) 2>/dev/null); $(PYTHON) -m venv $(VENV) || { [ "$$existed" ] || rm -rf $(VENV); exit 1; }
	$(PIP) torch ninja setuptools
	touch $@

# With the CUDA part where nvcc fits this torch, for TORCH_CUDA_ARCH_LIST, the GPUs present, or the default targets.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py wd_fused/build/config.py wd_fused/build/toolchain.py $(CSRC)
	$(SAY) "building wd_fused in place, and installing what its tests need: a minute or two, more with nvcc"
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	@sed -n 's/^ *"without_cuda": "\(.*\)"$$/built without the CUDA part: \1/p' wd_fused/_C.json
	touch $@

# The package is there already, so pip installs only what the extra names.
$(VENV)/integrations.stamp: $(VENV)/package.stamp
	$(SAY) "installing Lightning, Accelerate, Transformers and timm into $(VENV): a minute or so, once"
	$(PIP) 'wd_fused[integrations]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/package.stamp
	$(SAY) "installing mkdocs into $(VENV): half a minute, once"
	$(PIP) 'wd_fused[docs]'
	touch $@

$(VENV)/wheel.stamp: $(VENV)/package.stamp
	$(SAY) "installing what checks a wheel into $(VENV): half a minute, once"
	$(PIP) 'wd_fused[wheel]'
	touch $@

# The other libraries that are compared with.
$(VENV)/bench.stamp: $(VENV)/package.stamp
	$(SAY) "installing what the benchmarks compare with into $(VENV): half a minute, once"
	$(PIP) 'wd_fused[bench]'
	touch $@

clean: # removes .venv and all that was built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f wd_fused/_C.*so wd_fused/_C.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
