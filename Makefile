# Every target makes .venv first, once: the commands work on a machine that has only python and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
SERVES := $(VENV)/.ready-serve
READY := $(VENV)/.ready
LOWEST := .venv-lowest
# What the dependencies' own behaviour decides: command line, settings, HTTP, wire, model, wheel. No plane, no process.
# Not the control that shows what transformers does without our guard: that is a newer transformers' doing.
LOWEST_TESTS := tests/cli tests/config tests/api tests/router tests/packaging/test_wheel.py tests/transceiver/test_codec.py \
	tests/transceiver/test_zmq_plane.py tests/engine/test_model.py tests/engine/test_engine.py \
	--deselect 'tests/engine/test_model.py::test_a_hub_kernels_package_on_the_path_does_no_harm[False]'
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60  # by then the readers of single frames have stopped finding paths; the two cores repay hours

.PHONY: help setup setup-serve demo test test-lowest test-slow test-gpu faults fuzz coverage check prose format bench \
	wheel
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv with everything the other commands need

setup-serve: $(SERVES)  ## make .venv with what serving needs

$(SERVES): pyproject.toml constraints.txt tools/setup_venv.py
	@command -v $(PYTHON) >/dev/null || { echo "error: \`$(PYTHON)\` not found: install Python 3.11 or later, or name one with \`make PYTHON=...\`" >&2; exit 2; }
	@$(PYTHON) tools/setup_venv.py serve $(VENV)

$(READY): $(SERVES)
	@$(PYTHON) tools/setup_venv.py dev $(VENV)

demo: $(SERVES)  ## serve the bundled model with prefill and decode workers, send one request, show what moved
	@$(BIN)/disagg demo

test: $(READY)  ## all tests that need neither a GPU nor patience
	@$(BIN)/python tools/run_tests.py

test-lowest: $(LOWEST)/.ready  ## a fast part of the tests, with the oldest dependencies that are allowed
	$(LOWEST)/bin/pytest -m "not slow and not gpu and not processes" -n auto --maxprocesses 4 --hypothesis-profile=ci \
		-o filterwarnings=default $(LOWEST_TESTS)  # old releases warn of their own newer dependencies

$(LOWEST)/.ready: pyproject.toml constraints.txt tools/setup_lowest.py tools/setup_venv.py
	@$(PYTHON) tools/setup_lowest.py $(LOWEST)

test-slow: $(READY)  ## the long tests
	$(BIN)/pytest -m slow --durations=15

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu --durations=15

faults: $(READY)  ## every fault in every state of a transfer, on every plane and at true times, with tables; a pair under abuse
	$(BIN)/pytest tests/faults tests/abuse --durations=15

fuzz: $(READY)  ## bytes that coverage chooses, into whatever reads a peer's bytes; FUZZ_SECONDS for each reader
	@$(BIN)/pip install --quiet --no-warn-conflicts --constraint constraints.txt atheris
	@for reader in codec tcp zmq sender receiver; do \
		echo "== $$reader"; $(BIN)/python tools/fuzz.py $$reader --seconds $(FUZZ_SECONDS) || exit 1; done

coverage: $(READY)  ## branch coverage of the pure core of the transfer, which must be whole
	$(BIN)/coverage run $(BIN)/pytest -q tests/transceiver -m "not slow and not gpu" --hypothesis-profile=ci
	$(BIN)/coverage report

check: $(READY)  ## lint, formatting, types, import layers, size bounds, names, references, a router without torch
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/check_dependencies.py
	$(BIN)/python tools/check_house.py
	$(BIN)/python tools/check_router.py

prose: $(READY)  ## list sentences without a noun of the domain and commit subjects that are too long
	@$(BIN)/python tools/check_english.py

format: $(READY)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## run every benchmark on this machine
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python "$$benchmark" || exit 1; done

wheel: $(SERVES)  ## build the wheel into dist/
	@rm -rf build  # modules of an earlier tree that lie there would be taken along
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .
