# demo · test · check (never writes) · fix (may write) · gen · bench · test-gpu
# Needs Python 3.11 or later; everything else goes into .venv, once.

PYTHON ?= python3
# Installed before the rest: left to choose within pyproject's range, pip may take a build with gigabytes of CUDA.
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/installed
SPECS := specs/*.yaml examples/*/spec.yaml
SCHEMA := specs/schema/spec.v1.schema.json

.PHONY: demo test check fix gen bench test-gpu

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Triton decides when it is imported whether kernels are interpreted, so these cannot be one run; and tests/hf_parity
# has processes of its own.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist
# What TVM packages compile is compiled once for all of these, unless the environment names a folder that stays.
LIBRARIES := $(CURDIR)/build/test-libraries
test: export QWENSPEC_CACHE ?= $(LIBRARIES)
# A process a core.
test: export OMP_NUM_THREADS ?= 1
test: $(INSTALLED)
	rm -rf '$(LIBRARIES)'
	$(PYTEST) $(PARALLEL) loadfile -m "not interpreter and not aot and not gpu" --ignore=tests/hf_parity --ignore=tests/equivalence
	$(PYTEST) tests/hf_parity
	$(PYTEST) $(PARALLEL) worksteal --complete tests/equivalence
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) worksteal -m interpreter tests/backends/kernels tests/equivalence
	$(PYTEST) $(PARALLEL) worksteal -m aot tests/backends/kernels

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/qwenspec schema --check
	$(BIN)/qwenspec validate $(SPECS)
	$(BIN)/qwenspec gen --all --check

fix: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/qwenspec schema -o $(SCHEMA)
	$(BIN)/qwenspec gen --all

gen: $(INSTALLED)
	$(BIN)/qwenspec gen --all

bench: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py

# On a machine with a GPU: torch, triton and numpy of its own, no network, nothing installed.
test-gpu:
	$(PYTHON) tests/gpu/run.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("qwenspec needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv, once: this takes minutes and about 2.5 GB"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
