# Every target works in a fresh checkout: the environment is made on first use.
# PYTHON=python3.x chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
OLDER := .venv/older/bin
READY := .venv/.ready
# What is imported is compiled then: most of PyTorch never is.
PIP := pip install --quiet --no-compile
# By files: what a module's tests share is made once.
COMPATIBLE := bank/test_bank.py models/test_composed_model.py vectors/test_task_vector.py \
	$(addprefix ops/test_,backends.py compose.py cpp.py layout.py)
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
NATIVE := $(wildcard csrc/*.h csrc/*/*)
CXX_SOURCES := $(NATIVE) $(wildcard tests/ops/cuda_shim/* tests/ops/cpu_sanitize/*)

.DEFAULT_GOAL := help
.PHONY: help demo test compatibility lint format kernels gpu bench clean

help:
	@echo "make demo     set up .venv and learn a composition of task vectors on real images"
	@echo "make test     set up .venv if need be and pass the tests"
	@echo "make compatibility  the operator's tests on an older PyTorch, with the binary built here"
	@echo "make lint     formatting, style, types and the rooms"
	@echo "make format   rewrites the sources as lint wants them"
	@echo "make kernels  the proofs of the GPU kernels alone (part of make test)"
	@echo "make gpu      the operator's tests on this machine's GPU"
	@echo "make bench    measure the operator against its alternatives"

$(READY): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m $(PIP) -c constraints.txt torch 'setuptools>=77' wheel
	$(BIN)/python -m $(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/atlas-kernels demo

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

# One binary serves several versions of PyTorch: this one runs what was built on the newest.
compatibility: $(READY)
	test -x $(OLDER)/python || $(PYTHON) -m venv .venv/older
	$(OLDER)/python -m $(PIP) torch==2.13.0 hypothesis lazy_loader numpy pytest pytest-xdist safetensors tqdm zlib-ng
	ATLAS_KERNELS_REQUIRED_BACKENDS=torch,cpp $(OLDER)/python -m pytest $(PARALLEL) \
	  $(addprefix tests/,$(COMPATIBLE))

kernels: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) tests/ops/test_triton*.py tests/ops/test_cuda.py

gpu: $(READY)
	ATLAS_KERNELS_ON_GPU=1 $(BIN)/python -m pytest -k 'triton or cuda or test_gpu' \
	  tests/bank/test_bank.py \
	  $(addprefix tests/ops/test_,gpu.py compose.py codecs.py groups.py)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY)
	$(BIN)/python -m bench.run

clean:
	rm -rf .venv build *.egg-info atlas_kernels/ops/backends/*.so
