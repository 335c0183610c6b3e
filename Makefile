# Every target sets up what it needs: a virtual environment with the pinned packages, and transfuse
# built and installed into it. `make help` lists the targets.
#
#   PYTHON=python3.12   the interpreter of the virtual environment
#   VENV=.venv          where it lives
#   ARGS="-k attend"    passed on to pytest or to the benchmark

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# Folders are listed too: their time changes when a file is removed. (Not `bench`, a target's name.)
PACKAGE_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python triton_kernels bench/* \
  \( -name __pycache__ -o -path bench/results \) -prune -o -print)
NATIVE := build/native
SANITIZED := build/sanitized

.DEFAULT_GOAL := help
.PHONY: help setup build test bench lint fmt typecheck docs docs-check doctest selftest sanitize \
  wheel sdist cuda-check triton-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 15

# ---- set-up ---------------------------------------------------------------------------------------

$(VENV)/.packages: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if v >= (3, 11) else f"development needs Python >= 3.11, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r constraints.txt
	@touch $@

# What makes the package of this tree. The object files stay in build/, so making it again after a change
# of Python code takes seconds. A torch without CUDA cannot open the CUDA library, so it is left out then
# (`make cuda-check` compiles it all the same).
COMPILED = --no-build-isolation --no-deps -C cmake.define.TRANSFUSE_CUDA=$$($(PY) -c \
  'import torch; print("OFF" if torch.version.cuda is None else "AUTO")') .

# An ordinary install: what is tested is what a wheel holds.
$(VENV)/.package: $(VENV)/.packages $(PACKAGE_SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -q --force-reinstall $(COMPILED)
	@touch $@

setup: $(VENV)/.packages  ## virtual environment with the pinned packages
build: $(VENV)/.package  ## transfuse, built and installed into it

# ---- the two jobs ---------------------------------------------------------------------------------

test: $(VENV)/.package  ## all tests
	TRANSFUSE_REQUIRE_NATIVE=1 $(PY) -m pytest $(ARGS)

bench: $(VENV)/.package  ## the quick benchmark: checked against the oracle, timed, printed
	$(PY) -m transfuse.bench --quick $(ARGS)

# ---- checks ---------------------------------------------------------------------------------------

lint: $(VENV)/.packages  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

fmt: $(VENV)/.packages  ## format everything in place
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

typecheck: $(VENV)/.package  ## mypy on the installed package
	$(BIN)/mypy

docs: $(VENV)/.package  ## bring the generated tables of README.md up to date
	$(PY) -m transfuse.testing.matrix --write README.md
	$(PY) -m transfuse.methods --table --write README.md

docs-check: $(VENV)/.package  ## fail if a generated table of README.md is stale
	$(PY) -m transfuse.testing.matrix --check README.md
	$(PY) -m transfuse.methods --table --check README.md

doctest: $(VENV)/.package  ## the examples of docstrings and of README.md
	$(PY) -m pytest tests/test_doctests.py $(ARGS)

# The kernels alone: no Python, no torch. Every ISA level that this processor runs, and CUDA on the CPU.
selftest: $(VENV)/.packages  ## self-test of the kernels at every ISA level, and of the CUDA ones, emulated
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(NATIVE) -G Ninja -DTRANSFUSE_SELFTEST_ONLY=ON
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(NATIVE)
	@set -e; for level in $$($(NATIVE)/transfuse_selftest --levels); do \
	  TRANSFUSE_CPU_ISA=$$level $(NATIVE)/transfuse_selftest; done
	@$(NATIVE)/transfuse_cuda_selftest

# Sanitized kernels take long to compile and to run: those that could not run here are left out, and
# each draws fewer cases than in `selftest`.
SANITIZED_CASES := 12
SANITIZED_AVX512 := $(if $(shell grep -m1 -o avx512f /proc/cpuinfo 2>/dev/null),ON,OFF)
sanitize: $(VENV)/.packages  ## the same under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DTRANSFUSE_SELFTEST_ONLY=ON \
	  -DTRANSFUSE_SANITIZE=address,undefined -DTRANSFUSE_AVX512=$(SANITIZED_AVX512)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	@set -e; for level in $$($(SANITIZED)/transfuse_selftest --levels | grep -v portable); do \
	  TRANSFUSE_CPU_ISA=$$level $(SANITIZED)/transfuse_selftest --cases $(SANITIZED_CASES); done
	@$(SANITIZED)/transfuse_cuda_selftest

triton-check: $(VENV)/.package  ## compile the Triton kernels for sm_80 and sm_90, without a GPU
	$(PY) -m transfuse.triton_kernels.compile_check $(ARGS)

cuda-check: $(VENV)/.packages  ## compile the CUDA sources for sm_80 and sm_90 (Hopper: sm_90a), without a GPU
	$(PY) csrc/cuda/compile_check.py $(ARGS)

# ---- packages -------------------------------------------------------------------------------------

sdist: $(VENV)/.packages  ## source distribution in dist/
	$(PY) -m build -q --sdist --no-isolation

wheel: $(VENV)/.package  ## wheel in dist/
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) wheel -q -w dist $(COMPILED)

clean:  ## remove build output and the virtual environment
	rm -rf build dist $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
