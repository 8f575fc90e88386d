# The commands of this project; `make test` and `make demo` work on a fresh clone.

PYTHON ?= python3
PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The demonstration: its numbers stand here and nowhere else.
DEMO_MODEL := smollm2-135m
DEMO_FIT_SETTINGS := --clusters 5 --cluster-rounds 1 --learning-rate 5e-4 --expert-learning-rate 2e-4 \
	--expert-epochs 1 --batch-size 8 --system-prompt ""
DEMO_METHODS := backbone,base,elrea,uniform-weights,moe-routing,moe-merging,oracle
DEMO_EVAL_SETTINGS := --max-new-tokens 24 --batch-size 20
DEMO_RUN := runs/demo
DEMO_EVAL := runs/demo-eval

.DEFAULT_GOAL := help
.PHONY: help setup test test-ray lint format docs wheel demo demo-auto sample-report bench clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: $(READY) ## create .venv and install everything into it, once

# Old pip knows no dependency groups, so pip comes first; torch next and alone, for it is the large one.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Coterie needs Python 3.11 or newer; type: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "setup 1/3: Python environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check pip==$(PIP_VERSION)
	@echo "setup 2/3: torch (the largest download)"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt torch
	@echo "setup 3/3: Coterie and its tools (about two minutes)"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[data,llamacpp,quant,ray,serve]' --group dev --group docs
	@touch $@

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal

test-ray: $(READY) ## run the tests that start a Ray cluster on this machine
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -m ray

lint: $(READY) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

format: $(READY) ## put the code into the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## build the documentation site into build/site, without a network
	$(BIN)/python docs/build.py

wheel: $(READY) ## build wheel and source archive, and run the wheel in an empty environment
	rm -rf dist build/empty
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt dist/coterie-*.whl
	build/empty/bin/coterie --help
	build/empty/bin/coterie doctor

demo: $(READY) ## fit, evaluate and report on the sample data with a real small model
	$(BIN)/coterie fit elrea --model $(DEMO_MODEL) --data examples/data/train.jsonl --output $(DEMO_RUN) --overwrite $(DEMO_FIT_SETTINGS)
	$(BIN)/coterie eval $(DEMO_RUN) --data examples/data/test.jsonl --methods $(DEMO_METHODS) --output $(DEMO_EVAL) --overwrite $(DEMO_EVAL_SETTINGS)
	$(BIN)/coterie report $(DEMO_EVAL)

demo-auto: $(READY) ## the same data, with router and combiner, or no mixture, chosen by evidence
	$(BIN)/coterie fit auto --model $(DEMO_MODEL) --data examples/data/train.jsonl --output $(DEMO_RUN)-auto --overwrite --clusters 5 --cluster-rounds 1 --system-prompt ""
	$(BIN)/coterie eval $(DEMO_RUN)-auto --data examples/data/test.jsonl --methods base,auto,elrea,uniform-weights,oracle --no-generate --output $(DEMO_EVAL)-auto --overwrite
	$(BIN)/coterie report $(DEMO_EVAL)-auto

sample-report: $(READY) ## make docs/sample-report.html anew: all methods on sample data; typed again, it goes on
	test -d $(DEMO_RUN)-all || $(BIN)/coterie fit elrea --model $(DEMO_MODEL) --data examples/data/train.jsonl --limit 100 --output $(DEMO_RUN)-all $(DEMO_FIT_SETTINGS)
	$(BIN)/coterie train-extras $(DEMO_RUN)-all --methods all --ensemble-size 2 --gate-learning-rate 1e-3
	test -d $(DEMO_EVAL)-all || $(BIN)/coterie eval $(DEMO_RUN)-all --data examples/data/test.jsonl --limit 40 --methods all --output $(DEMO_EVAL)-all $(DEMO_EVAL_SETTINGS)
	$(BIN)/coterie report $(DEMO_EVAL)-all --overwrite
	cp $(DEMO_EVAL)-all/report.html docs/sample-report.html

bench: $(READY) ## run every benchmark in its quick form
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do echo "$$script --quick"; $(BIN)/python "$$script" --quick || exit 1; done

clean: ## remove caches, builds and the demonstration's runs; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis $(DEMO_RUN) $(DEMO_EVAL) $(DEMO_RUN)-auto $(DEMO_EVAL)-auto $(DEMO_RUN)-all $(DEMO_EVAL)-all
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
