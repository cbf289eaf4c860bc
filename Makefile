# make demo   installs into .venv, trains on handwritten digits, samples, measures, draws a picture
# make test   installs into .venv, runs every test on JAX, TensorFlow and PyTorch
# make lint   ruff
# make gpu-bundle   what benchmarks/gpu.py needs on a GPU machine without a network, in .gpu-bundle
# KERAS_BACKEND=tensorflow or torch chooses another backend for the demo.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is enough for the tests. A plain `torch` would fetch gigabytes of CUDA on Linux; where
# no CPU wheel is at hand: make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0
KERAS_BACKEND ?= jax
BACKENDS ?= jax tensorflow torch

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test lint gpu-bundle clean

demo: $(VENV)/installed-demo-$(KERAS_BACKEND)
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python examples/digits.py --out runs/digits

# Two processes at a time, the longest first; each prints when it is done. A backend is two of them:
# TensorFlow keeps whatever it has traced, and one process with all tests grows to 9 GB.
test: $(VENV)/installed-test
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target \
		$(foreach part,rest training,$(foreach backend,$(BACKENDS),test-$(part)-$(backend)))
	@echo "All tests passed on: $(BACKENDS)"

test-rest-%: $(VENV)/installed-test
	@echo "=== $*: all but tests/training ==="
	@KERAS_BACKEND=$* $(BIN)/python -m pytest tests --ignore=tests/training

test-training-%: $(VENV)/installed-test
	@echo "=== $*: tests/training ==="
	@KERAS_BACKEND=$* $(BIN)/python -m pytest tests/training

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	@echo "Installing $* and the demo's packages into $(VENV) ..."
	$(BIN)/python -m pip install --quiet $(DEMO_$*)
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	@echo "Installing JAX, TensorFlow, PyTorch and the test tools into $(VENV) (4.4 GB) ..."
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs
