# The commands of this repository. `make help` lists them; set-up happens once, by itself, before whatever needs it.

PYTHON ?= python3
TORCH ?=
EXAMPLE ?= examples/digits.py
DEMO ?= --out runs/digits --overwrite --epochs 12 --retrain 30
BENCH ?=
N ?= 200
FUZZ ?=
TESTS ?= tests
export TORCH

STATE := build/setup
SETUP := $(PYTHON) scripts/setup_env.py
# read when a recipe runs, that is, after the set-up wrote it
PY = $(shell cat $(STATE)/python 2>/dev/null)
NASCOMPILE = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/nascompile
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)

# an interpreter that has been removed is set up again
$(if $(wildcard $(PY)),,$(shell rm -f $(STATE)/environment))

# one thread a process, one process a core: on two cores faster than two threads, and sums have one order
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8

.PHONY: help setup setup-dev demo test fuzz check format lint types fix bench clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up what is missing, then search, prune and export a network on real data"
	@echo "make test       all tests                                  (TESTS=tests/kernels narrows them)"
	@echo "make fuzz       random search spaces, compiled and eager   (N=1000 FUZZ='--seed 7 --seconds 600')"
	@echo "make check      format, lint, types, tests: what CI runs"
	@echo "make bench      the benchmarks of this machine             (BENCH='--help' shows the options)"
	@echo "make setup      the environment and the C++ extension only"
	@echo "make fix        format the code and repair what ruff can"
	@echo "make clean      remove what was built; make distclean removes .venv too"
	@echo "Variables: PYTHON=python3.12 (the interpreter to start from), TORCH='torch==2.12.0' (instead of our choice)"

setup: $(STATE)/extension
setup-dev: $(STATE)/extension $(STATE)/dev

$(STATE)/environment: pyproject.toml scripts/setup_env.py
	@command -v $(PYTHON) >/dev/null || { echo "set-up: no $(PYTHON) found; nascompile needs Python 3.11 or newer" >&2; exit 1; }
	@$(SETUP) environment
	@touch $@

$(STATE)/extension: $(STATE)/environment $(NATIVE)
	@$(SETUP) extension
	@touch $@

$(STATE)/dev: $(STATE)/environment
	@$(SETUP) dev
	@touch $@

demo: setup
	$(NASCOMPILE) $(EXAMPLE) $(DEMO)

test: setup-dev
	$(PYTEST) $(TESTS)

fuzz: setup-dev
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --examples $(N) $(FUZZ)

check: format lint types test

format: setup-dev
	$(PY) -m ruff format --check .

lint: setup-dev
	$(PY) -m ruff check .

types: setup-dev
	$(PY) scripts/link_typings.py
	$(PY) -m pyright --pythonpath $(PY)

fix: setup-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup-dev
	$(PY) benchmarks/run.py $(BENCH)

clean:
	rm -rf build dist typings .pytest_cache .ruff_cache .hypothesis *.egg-info nascompile/_C*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv runs
