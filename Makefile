# Every target does all set-up by itself: no root, Python 3.11 or newer.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
JOBS ?= 2
# In the order of names: the storms of test_devices.py wait more than they work, so not last.
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY := PASSIVE
# Many images set it: then each of the processes that tests start compiles torch anew, for 20 s.
unexport PYTHONDONTWRITEBYTECODE
# One thread for each test process; the demo takes the number from its configuration.
test test-all check: export OMP_NUM_THREADS := 1

.PHONY: help setup demo demo-devices test test-all check lint assets lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY)  ## .venv with the locked dependencies

demo: $(READY)  ## SmolLM2 on Shakespeare's roles, then the privacy report
	@$(BIN)/privet simulate demo --resume
	$(BIN)/privet report demo

demo-devices: $(READY)  ## a server and six devices over TLS on this machine, two of which die
	@$(BIN)/privet demo-devices

test: assets  ## the fast tests, real models and data among them
	@$(PYTEST) -m "not heavy"

test-all: assets  ## every test
	@$(PYTEST)

check: lint test  ## what CI runs

lint: $(READY)  ## format, style, types, who imports whom
	@$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

assets: $(READY)  ## the catalogue's models and data, once, into the cache
	@$(BIN)/privet assets fetch --all >/dev/null

$(READY): pyproject.toml requirements.lock
	@for python in $(PYTHON) python3.11 python3; do
	  "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
	  python=
	done
	if [[ -z $$python ]]; then
	  echo "privet needs Python 3.11 or newer with its venv module, and found none;" \
	    "install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2
	  exit 1
	fi
	echo "1/3 making .venv with $$("$$python" --version)"
	"$$python" -m venv --clear .venv
	echo "2/3 installing the $$(grep -c == requirements.lock) locked packages (about a minute)"
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	$(BIN)/pip install -qq --no-deps --no-compile -r requirements.lock || {
	  echo "a locked package could not be installed: the line above names it. Is there a network?" \
	    "'make lock' writes requirements.lock anew from pyproject.toml" >&2
	  exit 1
	}
	echo "3/3 installing privet"
	$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	$(BIN)/pip check >/dev/null || { $(BIN)/pip check >&2; exit 1; }
	touch $@

lock:  ## requirements.lock anew, from a clean environment
	@folder=$$(mktemp -d)
	trap 'rm -rf "$$folder"' EXIT
	$(or $(PYTHON),python3.11) -m venv "$$folder/venv"
	cp -r pyproject.toml README.md LICENSE __init__.py commands.py py.typed common client server experiments "$$folder"
	"$$folder/venv/bin/pip" install -qq "$$folder[dev]"
	echo "# Written by 'make lock'. Everything '.[dev]' needs, exactly." >"$$folder/lock"
	"$$folder/venv/bin/pip" freeze --all --exclude pip --exclude privet \
	  | sed 's/+cpu$$//' >>"$$folder/lock"
	mv "$$folder/lock" requirements.lock

clean:  ## all that can be made again; runs/ and the cache of assets stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
