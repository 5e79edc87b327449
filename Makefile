# `make quickstart` and `make test` need Python 3.11 or later, and install the rest into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

# Where there is no GPU and no CPU build of torch is at hand, pip takes the CUDA build. To take the
# CPU build instead: make quickstart TORCH_INDEX=<the CPU index that pytorch.org's selector shows>
TORCH_INDEX ?=

.PHONY: quickstart test check format bench wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/llmmix run quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: it decides between the CPU and the CUDA build, and the rest follows it
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

# Build the wheel, install it in a fresh environment, and run it from another folder
wheel: $(VENV)/.installed
	rm -rf dist .wheel-venv
	$(BIN)/python -m build --wheel -q
	$(PYTHON) -m venv --system-site-packages .wheel-venv
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(.wheel-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/deps.pth"
	.wheel-venv/bin/python -m pip install -q --no-deps --force-reinstall dist/*.whl

clean:
	rm -rf $(VENV) .wheel-venv dist build *.egg-info
