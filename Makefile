# Everything a developer runs; `make help` lists it. Without PYTHON a .venv is made and pinned versions are installed into it.
# PYTHON=python3 uses that interpreter as it is if it has a torch (nothing is installed), else makes the .venv from it.

SHELL := /bin/bash
VENV := .venv
PYTHON ?=
export MAX_JOBS ?=
ifeq ($(MAX_JOBS),)
unexport MAX_JOBS
endif

FIND_TORCH := import importlib.util as u; print("yes" if u.find_spec("torch") else "")
ifneq ($(and $(PYTHON),$(shell $(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null)),)
PY := PYTHONPATH="$(CURDIR)" $(PYTHON) -P
DEMO_READY := build/.extension
TEST_READY := build/.extension
else
PY := $(VENV)/bin/python -P
DEMO_READY := $(VENV)/.demo build/.extension
TEST_READY := $(VENV)/.demo $(VENV)/.test build/.extension
endif
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c .ci/constraints.txt
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test lint build aot asan mutate crash campaigns bench clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_READY)  ## train a small GPT on the Python standard library's source and let it write (first run 5-8 min, then 3)
	$(PY) -m gptfast demo

test: $(TEST_READY)  ## the whole test suite (10-15 min on 2 cores; -k and paths through ARGS="...")
	$(PY) -m pytest $(ARGS)

lint: $(TEST_READY)  ## ruff, mypy (1 min)
	$(PY) -m ruff check .
	$(PY) -m mypy

build: build/.extension  ## the C++ and CUDA extension, in place (1-2 min)

aot: $(TEST_READY)  ## every Triton kernel and config compiled ahead of time for sm_80, sm_90, sm_100 (2 min)
	$(PY) -m gptfast._aot --full

asan: $(TEST_READY)  ## the C++ op suite under Address- and UndefinedBehaviorSanitizer (build 3-10 min, then about 10; a part through ARGS)
	$(PY) tests/asan.py $(ARGS)

mutate: $(TEST_READY)  ## does each op's test notice 12 one-place changes of its C++ kernel (3 min a kernel; ARGS="--file F --count 3")
	$(PY) tests/mutate.py $(ARGS)

crash: $(TEST_READY)  ## 200 runs, each killed at a system call of a save and resumed, end with the same bits (5-20 min)
	$(PY) tests/crash.py $(ARGS)

campaigns: aot asan mutate crash  ## all long proofs, one after the other (1.5-2 h); counts go to tests/campaigns.json

bench: $(TEST_READY)  ## GPT-2's training step beside PyTorch and nanoGPT (20-40 min; ARGS="-k char --nanogpt PATH" and bench/README.md)
	$(PY) -m pytest bench/bench_train.py $(ARGS)

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build gptfast/*.so gptfast/_build.json *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(VENV)/bin/python:
	@found=""; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo "make: Python >= 3.11 with venv is needed; none of $(or $(PYTHON),python3 python3.13 python3.12 python3.11) is" >&2; exit 2; fi; \
	echo "making $(VENV) with $$($$found --version)"; $$found -m venv $(VENV)

$(VENV)/.demo: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	@echo "installing torch and the other dependencies into $(VENV)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[plot,build]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests compare with into $(VENV)"
	@$(PIP) -e '.[test]'
	@touch $@

build/.extension: $(SOURCES) | $(DEMO_READY:build/.extension=)
	@mkdir -p build
	@$(PY) setup.py -q build_ext --inplace || echo "the extension could not be built (messages above): going on with PyTorch alone"
	@touch $@
