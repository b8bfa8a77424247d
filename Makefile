# make demo   the whole way on the embedded pipeline: quantize, evaluate, compare, look
# make test   the tests
# make lint   ruff and mypy, in the versions of constraints.txt
# make experiments LIST=binarydm   a list of benchmarks/experiments: hours; interrupted, it continues
# PYTHON picks the interpreter of a new .venv. Without a GPU, the smaller CPU build of torch:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO ?= runs/demo
DEMO_IMAGES ?= 500
LIST ?= binarydm

.PHONY: demo test lint experiments install clean

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

demo: $(STAMP)
	DMQUANT=$(BIN)/dmquant OUT=$(DEMO) NUM_IMAGES=$(DEMO_IMAGES) bash benchmarks/demo.sh

experiments: $(STAMP)
	$(BIN)/python benchmarks/run.py benchmarks/experiments/$(LIST).json -o runs/$(LIST)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info
