# Each target makes or refreshes the environment it needs; nothing is installed again while
# pyproject.toml and the constraints are unchanged. Another interpreter: make test PYTHON=python3.13
# Each process of the tests has servers and a Ray cluster of its own, about 2 GB; one after the other: PROCESSES=0.

PYTHON ?= python3
PROCESSES ?= 2
VENV := .venv
PEER_VENV := .venv-mergekit

# The environments are complete in themselves; nothing from outside may leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

PIP := bin/python -m pip --disable-pip-version-check install -qq --progress-bar off
TYPED := .pkg/raymerge tests $(wildcard docs/demo/*.py) $(wildcard benchmarks/*.py)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-spectrum test test-slow test-mergekit check format bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train three small models, merge them in four ways, check and print the losses"
	@echo "make demo-spectrum  train a model that answers and one that thinks, sweep, evaluate and draw the models between"
	@echo "make test    run the tests"
	@echo "make test-slow  run the slow ones: kills, whole merges under faults, other servers and clients"
	@echo "make test-mergekit  compare every method with mergekit's numbers, in an environment of its own"
	@echo "make check   lint, format, types, and which package may import which"
	@echo "make format  rewrite the sources as 'make check' wants them"
	@echo "make bench   compare with mergekit, and with copying the same bytes"
	@echo "make wheel   build dist/raymerge-VERSION-py3-none-any.whl, for pip and for raymerge manifest --wheel"
	@echo "make install only make or refresh the environment, $(VENV)"
	@echo "make clean   remove the environments, caches and build outputs"

install: $(VENV)/stamp
	@echo "raymerge is installed: $(VENV)/bin/raymerge --help"

demo: $(VENV)/stamp
	$(VENV)/bin/python docs/demo/demo.py build/demo

demo-spectrum: $(VENV)/stamp
	$(VENV)/bin/python docs/demo/spectrum.py build/demo-spectrum

test: $(VENV)/stamp
	$(VENV)/bin/python -m pytest -n $(PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/stamp
	$(VENV)/bin/python -m pytest -m slow -n $(PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-mergekit: $(VENV)/stamp $(PEER_VENV)/stamp
	$(VENV)/bin/python -m pytest -m slow tests/test_mergekit.py tests/test_mergekit_moe.py tests/test_mergekit_tokenizers.py tests/test_mergekit_modules.py $(PYTEST_ARGS)

check: $(VENV)/stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(TYPED)
	$(VENV)/bin/lint-imports

format: $(VENV)/stamp
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

bench: $(VENV)/stamp $(PEER_VENV)/stamp
	$(VENV)/bin/python benchmarks/run.py $(BENCH_ARGS)

wheel: $(VENV)/stamp
	$(VENV)/bin/python -m build --no-isolation --wheel .

clean:
	rm -rf $(VENV) $(PEER_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# hatchling first: the package itself is then built with the pinned one, not with the newest there is.
$(VENV)/stamp: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/$(PIP) --constraint constraints.txt hatchling editables
	$(VENV)/$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(PEER_VENV)/stamp: benchmarks/mergekit-constraints.txt
	$(call make_venv,$(PEER_VENV))
	$(PEER_VENV)/$(PIP) --constraint $< mergekit torch
	@touch $@

define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "raymerge needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)." >&2; \
  echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
@echo "Preparing $(1) (a few minutes the first time)"
@$(PYTHON) -m venv $(1)
endef
