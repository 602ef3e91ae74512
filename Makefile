# `make demo` and `make test` are all a newcomer needs. Every target works from the
# project's own files: the virtual environment below is made once and brought up to
# date whenever the list of dependencies changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_VENV := build/site-venv
WHEEL_VENV := build/wheel-venv

export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Which of Keras' backends the tests run on.
BACKENDS := tensorflow jax torch

.PHONY: help demo test test-all test-accelerator lint api pictures site bench wheel

help:
	@echo "make demo   train a small model with the monitor, print what happened"
	@echo "make test   run the tests on TensorFlow, JAX and PyTorch"
	@echo "make test-all   run all rows of their tables, and what takes longest"
	@echo "make test-accelerator   run what needs a GPU or TPU, where there is one"
	@echo "make lint   check style and types"
	@echo "make api    write docs/api.md from the docstrings"
	@echo "make pictures   draw the pictures of the docs that are out of date"
	@echo "make site   build the documentation site in build/site/html"
	@echo "make bench  measure the costs, in gradients"
	@echo "make wheel  build the wheel, try it in a fresh environment"

# An environment that is there already is kept and installed into.
$(STAMP): setup.cfg pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt \
		--editable '.[test,lint,plot,examples]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# One process a core; the tests' own threads would only be in each other's way. What
# `make test` leaves out is in tests/thorough.py.
test: SELECTION := --brief
test test-all: $(STAMP)
	set -e; for backend in $(BACKENDS); do \
		echo "KERAS_BACKEND=$$backend"; \
		KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
			$(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(SELECTION); \
	done

test-accelerator: $(STAMP)
	set -e; for backend in $(BACKENDS); do \
		echo "KERAS_BACKEND=$$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/python -m pytest -s tests/accelerator; \
	done

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

api: $(STAMP)
	$(BIN)/python docs/api.py

# Those that are older than what they show; the page's takes a browser.
pictures: $(STAMP)
	$(BIN)/python docs/pictures.py

# MkDocs needs nothing of the package, so it has a small environment of its own.
site:
	test -x $(SITE_VENV)/bin/python || $(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/python -m pip install --quiet \
		$$($(PYTHON) docs/make_site.py --requirements)
	$(PYTHON) docs/make_site.py
	NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/python -m mkdocs build --strict

# The other packages that are measured are large, so they come with this target alone.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[benchmark]'
	$(BIN)/python benchmarks/run.py

# setuptools would put files left in build/lib from an earlier build into the wheel. The
# check runs the README's first example, with nothing installed but what the wheel asks for.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet dist/*.whl
	$(WHEEL_VENV)/bin/python .ci/check_wheel.py
