# Everything is installed into .venv at the versions of constraints.txt; `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The isolated environment in which pip builds this package obeys the same pins (the second name is that of newer pips).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev demo test test-all soak lint typecheck check pretrain bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# Stamps: an environment is remade only when what it was made from has changed.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.install: $(VENV)/.created $(INPUTS)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.created $(INPUTS)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.install

install: $(VENV)/.install ## install tiltflow and what it needs to run

dev: $(VENV)/.dev ## install the development tools too

demo: install ## post-train the packaged tiny model and write a report to outputs/demo
	$(BIN)/python -m tiltflow.demo.run --output_dir outputs/demo $(ARGS)

test: dev ## run the tests, without the slow ones
	$(BIN)/python -m pytest -m 'not slow and not soak' -q $(ARGS)

test-all: dev ## run every test but the soak; those of Ray after: .venv/bin/pip install -c constraints.txt '.[ray]'
	$(BIN)/python -m pytest -m 'not soak' -q $(ARGS)

soak: dev ## run a reward server under random faults for SOAK_SECONDS (600)
	$(BIN)/python -m pytest -m soak -q -s $(ARGS)

lint: dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: dev ## check types
	$(BIN)/pyright

check: lint typecheck test ## lint, typecheck and test

pretrain: install ## rebuild the tiny checkpoint from nothing, in its two phases (hours)
	$(BIN)/tiltflow pretrain tiny_sd3
	$(BIN)/tiltflow pretrain tiny_sd3_phase2

bench: dev ## run the benchmarks
	$(BIN)/python -m benchmarks.epoch $(ARGS)

clean: ## remove the environment, the caches and the outputs
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
