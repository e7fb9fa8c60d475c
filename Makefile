# Every target builds what it needs: on a bare machine `make demo` and `make test` install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process beside the engine: two OpenMP teams on two cores are five times slower.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test check layouts test-targets loaders drafts faults soak bench proof schemas lock audit-deps clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: ## Build .venv with the CPU engine, the demo's data and the developer's tools
	rm -f $(STAMP)
	$(MAKE) $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python jobs/install.py
	touch $(STAMP)

demo: $(STAMP) ## Run the main job end to end on a real 135M model (4 minutes on 2 cores, installation apart)
	$(BIN)/python jobs/demo.py

test: $(STAMP) ## Run the tests, real engine included
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadscope -m "not layouts and not loaders and not faults and not soak and not bench and not drafts and not targets"

layouts: $(STAMP) ## Engines of several devices: tensor parallel, three pipeline stages, Ray as the executor (6 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -m layouts

test-targets: $(STAMP) ## A tiny twin of every preset: generate, verify, a step of training (12 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -m targets

loaders: $(STAMP) ## Exports read by other trainers' own loaders, the dashboard by Grafana's models, out of their wheels (1 minute, 9 MB)
	$(ONE_THREAD) $(BIN)/python -m pytest -m loaders

check: $(STAMP) ## Lint, types, and generated files that are out of date
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python schemas/generate.py --check

schemas: $(STAMP) ## Write the JSON Schemas anew from the code
	$(BIN)/python schemas/generate.py

bench: $(STAMP) ## Measure the format, `plan`, and capture, each against what it replaces (about 35 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -m bench -s tests/benchmarks

faults: $(STAMP) ## Kill, stop, drain, starve and poison whatever takes part in a run; prints a table (an hour and a half)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadscope -vv -m "faults or matrix" --fault-table build/faults.md

drafts: $(STAMP) ## Speculative decoding by vLLM itself with a draft of each kind, against our own sampler (5 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -m drafts

soak: $(STAMP) ## Half an hour of kills, lost nodes, pauses and a store that throttles
	$(ONE_THREAD) $(BIN)/python -m pytest -m soak -s --fault-table build/soak.md

proof: $(STAMP) ## LK losses against KL, and compact shards against exact ones: 84 trainings, hours; goes on where it stopped
	$(BIN)/python -m jobs.proof

lock: $(STAMP) ## Write requirements.lock anew: what a reader and a trainer need, with hashes
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra train --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --custom-compile-command "make lock" --upgrade --quiet --output-file requirements.lock

audit-deps: $(STAMP) ## Look up the pins of requirements.lock in the database of known vulnerabilities; fails if any is missing there
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict

clean: ## Remove the environment and what the demo made
	rm -rf $(VENV) demo-out
