# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= autofit-runs

.PHONY: demo test lint typecheck contracts pytest soak clean

demo: .venv/.installed
	@rm -rf $(DEMO)/demo $(DEMO)/demo-half
	$(BIN)/autofit run --gpu-mem 24GB --output-dir $(DEMO)/demo
	@echo; echo "Once more with half of that and without estimates, to watch it run out of memory and step down:"; echo
	@# Half of what the tensors took; on a GPU the CUDA context stays.
	$(BIN)/autofit run --gpu-mem $$($(BIN)/python -c "import json; m = json.load(open('$(DEMO)/demo/plan.json'))['measured']; \
	print(m['device_bytes'] - m['peak_allocated_bytes'] // 2)")B \
	--search measure --max-steps 10 --output-dir $(DEMO)/demo-half

test: lint typecheck contracts pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

typecheck: .venv/.dev
	$(BIN)/mypy

contracts: .venv/.dev
	$(BIN)/lint-imports

pytest: .venv/.dev
	$(BIN)/pytest -n 2

# Whole runs killed at random again and again; minutes, and other points each time.
soak: .venv/.dev
	$(BIN)/pytest -m soak

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "autofit needs Python 3.11 or newer; name one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: about 0.4 GB to download where pip finds a CPU build of torch, several GB where it"
	@echo "takes PyPI's build for NVIDIA GPUs."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv $(DEMO)
