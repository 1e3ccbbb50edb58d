# `make` or `make help` lists the targets.
# PYTHON=python3.12   the Python of a new .venv
# HEADWAY_DEVICE=cpu  or gpu: what to install for, where the guess is wrong
# ARGS="--port 9000"  passed on

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install serve test check lock bench-overhead bench-decision bench-real bench-sim
.PHONY: bench-fidelity bench-spill bench-cache chaos chaos-fleet chaos-poison chaos-gateway chaos-real clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## make .venv with all pinned packages; nothing to do when up to date
	@$(PYTHON) deploy/install.py

.PHONY: compile
compile: install  ## the core with mypyc and a C compiler (minutes, once); without one it stays plain
	@$(BIN)/python deploy/compile.py

serve: compile  ## serve a model at http://127.0.0.1:8000/v1; ARGS="--help" lists the options
	@$(BIN)/headway serve $(ARGS)

.PHONY: serve-emulated
serve-emulated: compile  ## eight emulated H100s behind the real gateway, in real time
	@PYTHONPATH=. $(BIN)/headway serve deploy/emulated8.yaml $(ARGS)

test: install  ## all tests, the fast ones first, two files at a time; ARGS="tests/router -n 0" some of them
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup --no-loadscope-reorder --durations=20 $(ARGS)

.PHONY: check-install
check-install: install  ## does the wheel serve from a clean venv? ARGS=cpu (minutes, 3 GB), emulate or gpu (resolved only)
	$(BIN)/python -m tests.deploy.clean_install $(or $(ARGS),emulate)

.PHONY: pictures
pictures: compile  ## the pictures of the live page in docs/images, by its tests
	HEADWAY_PICTURES=docs/images $(BIN)/python -m pytest -q -n 0 tests/serving/gateway/seen/page/test_page.py

.PHONY: mutants
mutants: install  ## do tests notice wrong lines? what limits and resumes, mutated (an hour); ARGS="lease"
	nice $(BIN)/python -m tests.mutants.run $(ARGS)

check: install  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: docs
docs: install  ## the reference from the code, then the site in build/docs, its links checked; ARGS=serve shows it
	PYTHONPATH=. $(BIN)/python docs/site/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build) --config-file docs/site/mkdocs.yml

lock: install  ## pin the newest that fit pyproject.toml anew: ARGS=--upgrade
	$(BIN)/python deploy/locks/lock.py $(ARGS)

bench-overhead: compile  ## what our own path costs per token and request, engines left out
	$(BIN)/python -m benchmarks.overhead $(ARGS)

bench-decision: compile  ## what one routing decision costs at 8 to 2,048 engines
	$(BIN)/python -m benchmarks.overhead.decision $(ARGS)

bench-real: compile  ## policies compared on two real engines on CPU cores (half an hour and more)
	$(BIN)/python -m benchmarks.policies.real $(ARGS)

bench-sim: compile  ## policies compared in simulation on 8 and 64 H100s; HEADWAY_TRACES=DIR
	$(BIN)/python -m benchmarks.policies.simulated $(ARGS)

bench-fidelity: compile  ## the simulator against two real engines on CPU cores
	$(BIN)/python -m benchmarks.fidelity $(ARGS)

bench-cache: compile  ## what a reply from the response cache costs
	$(BIN)/python -m benchmarks.overhead.response_cache $(ARGS)

.PHONY: bench-scaling
bench-scaling: compile  ## autoscalers compared in simulation (an hour); HEADWAY_TRACES=DIR
	$(BIN)/python -m benchmarks.policies.scaling $(ARGS)

.PHONY: bench-gateways
bench-gateways: compile  ## what several gateways cost in time to first token, simulated
	$(BIN)/python -m benchmarks.policies.scaling.gateways $(ARGS)

.PHONY: bench-batch
bench-batch: compile  ## what a batch does to interactive p99, and how many tokens it adds, simulated
	$(BIN)/python -m benchmarks.policies.batch $(ARGS)

bench-spill: compile  ## goodput and cost of a provider in a spike, simulated
	$(BIN)/python -m benchmarks.policies.spillover $(ARGS)

.PHONY: bench-peers
bench-peers: compile  ## other routers and ours, before 8 emulated and 2 real engines (half an hour)
	$(BIN)/python -m benchmarks.peers $(ARGS)

.PHONY: bench-attach
bench-attach: compile  ## headway attach, nginx and vllm-router before the same two vLLM servers
	$(BIN)/python -m benchmarks.peers.attach $(ARGS)

.PHONY: bench-overload
bench-overload: compile  ## five times the capacity of emulated engines for ten minutes
	$(BIN)/python -m benchmarks.overload $(ARGS)

chaos: chaos-fleet chaos-poison chaos-gateway chaos-real  ## the next four

chaos-fleet: compile  ## eight emulated engines failing under 5,000 streams, every reply checked
	$(BIN)/python -m benchmarks.chaos.emulated $(ARGS)

chaos-poison: compile  ## requests that hurt engines, sent to six emulated ones beside a good load
	$(BIN)/python -m benchmarks.chaos.poisoned $(ARGS)

chaos-gateway: compile  ## two gateways, of which one hangs or dies, beside new clients all the time
	$(BIN)/python -m benchmarks.chaos.gateways $(ARGS)

chaos-real: compile  ## two vLLM engines on CPU cores killed and hung under load, every reply checked
	$(BIN)/python -m benchmarks.chaos.real $(ARGS)

.PHONY: train-predictor
train-predictor: install  ## what is known of answers' lengths from the start, trained anew; HEADWAY_TRACES=DIR
	$(BIN)/python -m benchmarks.policies.predictor.train $(ARGS)

.PHONY: eval-predictor
eval-predictor: compile  ## how well are answers' lengths predicted? HEADWAY_TRACES=DIR
	$(BIN)/python -m benchmarks.policies.predictor $(ARGS)

.PHONY: bench-length-value
bench-length-value: compile  ## what is it worth to know the length of answers? simulated
	$(BIN)/python -m benchmarks.policies.length_value $(ARGS)

clean:  ## remove .venv and caches, not the model
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
