# `make quickstart` and `make test` each need nothing but this checkout: they set up .venv when it
# is not there yet, and do not touch it when it is.

PYTHON ?= python3
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OPERATOR := $(VENV)/.operator-built
SHELL := /bin/sh

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup preflight quickstart test lint format clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Variables: PYTHON=python3.12 (interpreter for .venv), PYTEST_ARGS='-k order', QUICKSTART_ARGS=--help"

quickstart: $(INSTALLED) $(OPERATOR)  ## set up, train SR4IR on a small drawn dataset, show the result
	$(PY) jobs/quickstart.py $(QUICKSTART_ARGS)

# Two processes, and a file's tests in one of them: what is costly to start is shared by a file.
test: $(INSTALLED) $(OPERATOR)  ## set up, run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)  ## style, formatting, types, spelling
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --warnings
	$(VENV)/bin/codespell

format: $(INSTALLED)  ## rewrite the code in the house's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

setup: $(INSTALLED) $(OPERATOR)  ## set up .venv and build DeepSpeed's CPU operator

clean:  ## remove .venv and caches (datasets and runs stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache build sr4ir_dist.egg-info

# Names everything that is missing at once, with the packages that hold it.
preflight:
	@debian=""; fedora=""; py="$(PYTHON)"; \
	missing() { echo "missing: $$1" >&2; debian="$$debian $$2"; fedora="$$fedora $$3"; }; \
	if ! "$$py" -c '' >/dev/null 2>&1; then \
	  missing "Python 3.11 or later ($$py is not there)" "python3 python3-venv python3-dev" "python3 python3-devel"; \
	elif ! "$$py" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'; then \
	  missing "Python 3.11 to 3.14 ($$py is $$("$$py" -V 2>&1)); then run make PYTHON=python3.11" \
	    "python3.11 python3.11-venv python3.11-dev" "python3.11 python3.11-devel"; \
	else \
	  v=python$$("$$py" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  "$$py" -c 'import ensurepip, venv' 2>/dev/null || \
	    missing "Python's venv module (for $$py)" "$$v-venv" "python3-libs"; \
	  "$$py" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || \
	    missing "Python's headers (Python.h, for $$py)" "$$v-dev" "python3-devel"; \
	fi; \
	command -v "$${CXX:-c++}" >/dev/null 2>&1 || missing "a C++ compiler ($${CXX:-c++})" "g++" "gcc-c++"; \
	command -v git >/dev/null 2>&1 || missing "git" "git" "git"; \
	if [ -n "$$debian" ]; then \
	  echo "Install what is missing and run make again:" >&2; \
	  echo "  Debian, Ubuntu:  sudo apt install$$debian" >&2; \
	  echo "  Fedora:          sudo dnf install$$fedora" >&2; \
	  exit 1; \
	fi

# A .venv without a working pip was interrupted while it was made, or its Python is gone.
$(INSTALLED): pyproject.toml
	@$(MAKE) --no-print-directory preflight
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): several minutes and gigabytes the first time."
	$(PY) -m pip install --disable-pip-version-check --editable '.[test]'
	@touch $@

$(OPERATOR): $(INSTALLED)
	@echo "Building DeepSpeed's CPU operator, once: about a minute."
	@$(PY) -c 'from sr4ir_dist.training.engines import build_cpu_operator; build_cpu_operator()' \
	  >$(VENV)/operator.log 2>&1 || { cat $(VENV)/operator.log >&2; exit 1; }
	@touch $@
