# `make test` and `make demo` are one command each on a fresh machine: they build the environment they need.
# The first call installs (minutes); later calls find the stamp files and start at once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# The first interpreter that is new enough and able to make a virtual environment.
NEW_ENOUGH := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.11 python3.12 python3.13 python; do \
	"$$python" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo "$$python" && break; done)
endif

# One torch thread per test process: with xdist, more threads than cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15

.PHONY: help setup check test test-all demo docs bench clean

help:
	@echo "make setup     create the development environment in $(VENV)"
	@echo "make check     run ruff, the formatter and mypy"
	@echo "make test      run the tests that take seconds"
	@echo "make test-all  run all tests"
	@echo "make demo      run the demo on the CPU; writes out/demo/report.html"
	@echo "make docs      build the documentation into site/"
	@echo "make bench     measure decoding overhead, multi-token loss and speculative decoding (hours)"
	@echo "make clean     remove caches and built files; keeps $(VENV) and out/"

# torch comes first and alone, so that a CPU-only wheel that lies on the index is not replaced by a later resolution.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with the venv module was found. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[dev,data,eval,mlflow,s3]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[docs]'
	touch $@

setup: $(VENV)/test.stamp

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow and not gpu and not hub and not real"

test-all: $(VENV)/test.stamp
	$(PYTEST)

demo: $(VENV)/core.stamp
	$(BIN)/mull demo --out out/demo

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/core.stamp
	$(BIN)/python benchmarks/decode_overhead.py
	$(BIN)/python benchmarks/multi_token_loss.py
	$(BIN)/python benchmarks/speculation.py

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
