# make serve [PORT=8000]   install what serving needs into .venv and serve model_repo
# make test                install everything into .venv-test; lint, type-check, test
# make help                the rest
#
# No active virtual environment is needed. PIP_ARGS is handed to every pip install, for example
# PIP_ARGS="--extra-index-url <an index with CPU builds of torch>".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL_REPO ?= model_repo
VENV ?= .venv
TEST_VENV ?= .venv-test
TRAIN_VENV ?= .venv-training
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests of `make test`; 0 runs them one after the other in one.
PYTEST_WORKERS ?= 2
BENCH_ARGS ?=
# ONNX Runtime of late collects usage data unless it is told not to.
export ORT_DISABLE_TELEMETRY ?= 1

# The first Python >= 3.11 that really starts.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14 python,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))

PIP = -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $(PIP_ARGS)
LINTED := $(wildcard pipeline service solo_client training export tests integrations benchmarks)

.PHONY: help serve install install-training install-test test test-all test-deploy lint format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

serve: install ## serve model_repo on HOST:PORT (127.0.0.1:8000)
	exec $(VENV)/bin/solo-serve --model-repo "$(MODEL_REPO)" --host "$(HOST)" --port "$(PORT)"

install: $(VENV)/.installed ## install the serving extra alone into .venv (no torch)

install-training: $(TRAIN_VENV)/.installed ## install what training, export and serving need into .venv-training

install-test: $(TEST_VENV)/.installed ## install every extra into .venv-test

# The stamp is the last thing written: an install that was cut short is done again from the start.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make-venv,$(VENV),service)

$(TRAIN_VENV)/.installed: pyproject.toml constraints.txt
	$(call make-venv,$(TRAIN_VENV),service$(comma)training$(comma)export)

$(TEST_VENV)/.installed: pyproject.toml constraints.txt
	$(call make-venv,$(TEST_VENV),service$(comma)training$(comma)export$(comma)test$(comma)dev)

comma := ,

define make-venv
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing [$(2)] into $(1) with $$($(PYTHON) --version)"
	rm -rf "$(1)"
	$(PYTHON) -m venv "$(1)"
	"$(1)/bin/python" $(PIP) --editable ".[$(2)]"
	touch "$@"
endef

lint: install-test ## ruff (rules and format) and mypy --strict
	$(TEST_VENV)/bin/ruff check $(LINTED)
	$(TEST_VENV)/bin/ruff format --check $(LINTED)
	$(TEST_VENV)/bin/mypy

format: install-test ## let ruff fix and format the sources
	$(TEST_VENV)/bin/ruff check --fix $(LINTED)
	$(TEST_VENV)/bin/ruff format $(LINTED)

test: lint ## lint, type-check, and run every test that is not slow
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest -m "not slow" \
		-n $(PYTEST_WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

test-all: lint ## the slow tests too
	$(TEST_VENV)/bin/python -m pytest -m "not docker" $(PYTEST_ARGS)

test-deploy: install-test ## the image and the compose file on a real Docker engine (15 minutes)
	$(TEST_VENV)/bin/python -m pytest -n 0 -m docker $(PYTEST_ARGS)

bench: install-test ## measure the running code: python -m benchmarks
	$(TEST_VENV)/bin/python -m benchmarks $(BENCH_ARGS)

clean: ## remove environments, caches and build products (never models or runs)
	rm -rf $(VENV) $(TRAIN_VENV) $(TEST_VENV) .venv-service-test build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +
