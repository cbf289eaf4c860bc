# make demo         trains on handwritten digits, samples, measures, and draws a picture
# make test         tests on JAX, TensorFlow and PyTorch what each of them does itself, the rest once
# make test-all     runs every test on each of the three
# make test-lowest  runs the core tests with the lowest versions that pyproject.toml allows
# make test-newest  runs the core tests with the newest versions there are
# make test-wheel   installs the built wheel in a clean environment and draws with it elsewhere
# make test-browser opens the page of `keras-uvit app` in Chromium, and draws with it
# make notebooks    writes the notebooks of their sources, and runs them
# make test-notebooks runs them, small, without writing them
# make lint         ruff and mypy
# make docs         builds the documentation into site/, and fails for a broken link
# make gpu-bundle   collects what benchmarks/gpu.py needs on a GPU machine without a network
# Each installs what it needs into a virtual environment of its own. KERAS_BACKEND=tensorflow or
# torch chooses another backend for the demo; BACKENDS="jax torch" those of the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is enough for the tests. A plain `torch` would fetch gigabytes of CUDA on Linux; where
# no CPU wheel is at hand: make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0
KERAS_BACKEND ?= jax
BACKENDS ?= jax tensorflow torch
LOGS := $(VENV)/logs

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-all test-lowest test-newest test-wheel test-browser \
	notebooks test-notebooks lint docs gpu-bundle clean

demo: $(VENV)/installed-demo-$(KERAS_BACKEND)
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python examples/digits.py --out runs/digits

# PyTorch compiles nothing, so it is the cheapest: tests that are the same on each backend (marked
# `once`) run there alone, where it is among the BACKENDS.
CHEAPEST := $(firstword $(filter torch,$(BACKENDS)) $(BACKENDS))
SELECT = $(if $(ALL)$(filter $(CHEAPEST),$*),,-m "not once or each_backend")

# Two processes at a time, the longest first. A backend is two of them: TensorFlow keeps whatever it
# has traced, and one process with all tests grows to 9 GB.
PARTS := rest-torch rest-jax training-torch rest-tensorflow training-tensorflow training-jax

test: $(VENV)/installed-test
	@mkdir -p $(LOGS) && rm -f $(LOGS)/*
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target \
		$(addprefix test-,$(filter $(foreach backend,$(BACKENDS),%-$(backend)),$(PARTS))); \
	status=$$?; echo; for log in $(LOGS)/*; do echo "$$(basename $$log): $$(tail -n 1 $$log)"; done; \
	exit $$status

test-all:
	@$(MAKE) --no-print-directory test ALL=1

test-rest-%: $(VENV)/installed-test
	@KERAS_BACKEND=$* $(BIN)/python -m pytest tests --ignore=tests/training --ignore=tests/browser \
		$(SELECT) \
		> $(LOGS)/$*-rest 2>&1; status=$$?; cat $(LOGS)/$*-rest; exit $$status

test-training-%: $(VENV)/installed-test
	@KERAS_BACKEND=$* $(BIN)/python -m pytest tests/training $(SELECT) \
		> $(LOGS)/$*-training 2>&1; status=$$?; cat $(LOGS)/$*-training; exit $$status

# The core tests: what each backend does itself, without the packages that results are compared with.
CORE := tests/networks tests/diffusion tests/training tests/test_distribution.py \
	tests/test_distribution_layouts.py

# PINS="keras==3.12.4 jax==0.7.2" are installed on top, to try a set of versions in between.
test-lowest: $(VENV)-lowest/installed
	$(if $(PINS),$(VENV)-lowest/bin/python -m pip install --quiet $(PINS))
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target \
		$(foreach backend,$(BACKENDS),test-core-lowest-$(backend))

# PyTorch and TensorFlow take part where there are wheels for the newest Python:
# make test-newest NEWEST_PYTHON=python3.13 NEWEST_BACKENDS="jax tensorflow torch".
NEWEST_PYTHON ?= python3
NEWEST_BACKENDS ?= jax

test-newest: $(VENV)-newest/installed
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target \
		$(foreach backend,$(NEWEST_BACKENDS),test-core-newest-$(backend))

test-core-lowest-% test-core-newest-%:
	@echo "=== $@ ==="
	@KERAS_BACKEND=$* $(VENV)-$(word 3,$(subst -, ,$@))/bin/python -m pytest $(CORE) \
		-m "not once or each_backend"

test-wheel:
	rm -rf dist $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet build
	$(VENV)-wheel/bin/python -m build --quiet --outdir dist .
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(ls $(CURDIR)/dist/*.whl)[jax]"
	cd "$$(mktemp -d)" && KERAS_BACKEND=jax $(abspath $(VENV))-wheel/bin/python $(CURDIR)/tests/wheel.py

# Chromium and its driver are the system's: apt-get install chromium chromium-driver. Without them the
# tests are skipped, and say so.
test-browser: $(VENV)/installed-browser
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python -m pytest tests/browser -rs

notebooks: $(VENV)/installed-notebooks
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python notebooks/make.py

test-notebooks: $(VENV)/installed-notebooks
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python notebooks/make.py --small \
		--out $(abspath $(VENV))/notebooks

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

# For a machine with GPU builds of JAX and PyTorch, and so with NumPy, h5py, absl-py, rich, ml-dtypes
# and packaging: of what Keras needs, these are the rest. The package itself is the checkout there.
# pip takes a wheel only for the exact platforms named.
BUNDLE ?= keras==3.15.1 namex==0.1.0 optree==0.20.0
BUNDLE_PYTHON ?= 3.12
BUNDLE_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux2014_x86_64

gpu-bundle:
	rm -rf .gpu-bundle
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
		--python-version $(BUNDLE_PYTHON) $(BUNDLE_PLATFORMS:%=--platform %) \
		--dest .gpu-bundle $(BUNDLE)
	git describe --always --dirty > .gpu-bundle/commit
	@du -ch .gpu-bundle/*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What a backend's demo installs beside the demo extra.
DEMO_jax := jax
DEMO_tensorflow := tensorflow-cpu
DEMO_torch := $(TORCH)

$(VENV)/installed-demo-%: $(BIN)/python pyproject.toml
	@echo "Installing $* and the demo's packages into $(VENV) (about a minute) ..."
	$(BIN)/python -m pip install --quiet $(DEMO_$*)
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	@echo "Installing JAX, TensorFlow, PyTorch and the test tools into $(VENV) (4.4 GB) ..."
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

$(VENV)/installed-browser: $(VENV)/installed-test
	@echo "Installing gradio and Selenium into $(VENV) (0.3 GB) ..."
	$(BIN)/python -m pip install --quiet -e ".[browser-test]"
	touch $@

$(VENV)/installed-notebooks: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -e ".[notebooks]"
	touch $@

$(VENV)-lowest/installed: pyproject.toml tests/lowest.py
	@echo "Installing the lowest versions into $(VENV)-lowest ..."
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python tests/lowest.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint $(VENV)-lowest/constraints.txt \
		-e ".[core-test,jax]" tensorflow-cpu
	touch $@

NEWEST_jax := jax
NEWEST_tensorflow := tensorflow-cpu
NEWEST_torch := $(TORCH)

$(VENV)-newest/installed: pyproject.toml
	@echo "Installing the newest versions into $(VENV)-newest ..."
	$(NEWEST_PYTHON) -m venv --clear $(VENV)-newest
	$(foreach backend,$(NEWEST_BACKENDS),$(VENV)-newest/bin/python -m pip install --quiet \
		$(NEWEST_$(backend)) &&) true
	$(VENV)-newest/bin/python -m pip install --quiet -e ".[core-test,jax]"
	touch $@

$(VENV)-docs/installed: pyproject.toml
	@echo "Installing MkDocs into $(VENV)-docs ..."
	$(PYTHON) -m venv --clear $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-wheel $(VENV)-docs .gpu-bundle dist runs \
		site
