# `make quickstart`, `make test` and `make test-all` need Python 3.11 or later, and install the rest into .venv.
# `make test-lowest` takes .lowest-venv, `make wheel` .wheel-venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

# Where there is no GPU and no CPU build of torch is at hand, pip takes the CUDA build. To take the
# CPU build instead: make quickstart TORCH_INDEX=<the CPU index that pytorch.org's selector shows>
TORCH_INDEX ?=

.PHONY: quickstart test test-all test-lowest check format bench wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/llmmix run quickstart

# As many workers as there are cores; a file of tests, with what its tests share, stays on one
PYTEST := $(BIN)/python -m pytest -n logical --dist loadfile

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed
	$(PYTEST) --durations 10

# The lowest versions that pyproject.toml declares, together, in a fresh environment; uv can resolve to
# them. torch stays at the tested version: make test-lowest TORCH=torch==2.8.0 TESTS=tests/fused
LOWEST := .lowest-venv
TORCH  ?= $(shell grep '^torch==' constraints.txt)
TESTS  ?= tests

test-lowest:
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q uv
	$(LOWEST)/bin/python -m pip install -q --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	$(LOWEST)/bin/uv pip list -q --python $(LOWEST)/bin/python
	$(LOWEST)/bin/python -m pytest -n logical --dist loadfile -m "not slow" $(TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and peak memory beside TRL's, on a machine that does nothing else:
# make bench MODELS="builtin:tiny HuggingFaceTB/SmolLM2-135M-Instruct"
MODELS ?= builtin:tiny

bench: $(VENV)/.installed
	$(BIN)/llmmix eval speed --model_name_or_path $(MODELS)

# torch first and alone: it decides between the CPU and the CUDA build, and the rest follows it
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

# Build the wheel, install it in a fresh environment, and run it from another folder
wheel: $(VENV)/.installed
	rm -rf dist .wheel-venv
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv .wheel-venv
	.wheel-venv/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		$$(grep '^torch==' constraints.txt)
	.wheel-venv/bin/python -m pip install -q -c constraints.txt dist/*.whl
	bin=$$PWD/.wheel-venv/bin && cd $$(mktemp -d) && $$bin/llmmix ls && \
		$$bin/llmmix run dco --model_name_or_path builtin:tiny --dataset_name builtin:math --max_steps 3
	rm -rf .wheel-venv build

clean:
	rm -rf $(VENV) $(LOWEST) .wheel-venv dist build *.egg-info
