# One virtual environment, made once and again when the dependencies change.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo test test-models test-export test-kernels-compile test-gpu check bench docs clean

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[mm,onnx,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m vitrail.tools.train digits/biformer_n

# A process a core; a file's tests stay together, as some share what is slow to make, and slow files come first.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not gpu"

test-models: $(STAMP)
	$(BIN)/python tests/contract/run.py

test-export: $(STAMP)
	$(BIN)/python -m pytest -q -n auto tests/tools/every_export.py

test-kernels-compile: $(STAMP)
	$(BIN)/python -m pytest -q tests/kernels/every_kernel.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p vitrail.kernels -p vitrail.layers

bench: $(STAMP)
	$(BIN)/python -m vitrail.tools.benchmark davit_t --compare timm/davit_tiny

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV)
