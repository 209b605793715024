# Each target sets up what it needs: uv (into .tools/ if PATH has none), Python 3.12, .venv, the packages.
# A second run finds all of that in place and starts at once.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup compare generate test lint clean

# What a target is given beyond its defaults: make test ARGS="tests/test_frame.py -k pins"
ARGS ?=

# "cuda" on a machine with an NVIDIA GPU and its driver, empty elsewhere
CUDA := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),cuda)

# pytest processes. One on a GPU: each JAX process would take most of its memory.
WORKERS ?= $(if $(CUDA),0,2)

# The platforms that tests run on; empty leaves the choice to JAX.
JAX_PLATFORMS ?= $(if $(CUDA),,cpu)

PYTHON := .venv/bin/python
RUN_ENV := .venv/.ready-run$(CUDA:%=-%)
DEV_ENV := .venv/.ready-dev$(CUDA:%=-%)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(DEV_ENV) ## make .venv with everything for development

compare: $(RUN_ENV) ## compare the kernel layouts; ARGS are flags of experiments.compare_layouts
	$(PYTHON) -m experiments.compare_layouts $(ARGS)

generate: $(RUN_ENV) ## generate text; ARGS are flags of experiments.generate, else a tiny random model's
	$(PYTHON) -m experiments.generate $(or $(ARGS),--preset=tiny --random --prompt=hello --max_new_tokens=32)

test: $(DEV_ENV) ## run the tests; ARGS go to pytest (-m "" for the slow ones too)
	JAX_PLATFORMS='$(JAX_PLATFORMS)' $(PYTHON) -m pytest -n $(WORKERS) $(ARGS)

lint: $(DEV_ENV) ## check style, formatting, import arrows, pins
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) .ci/check_tree.py

clean: ## remove .venv, .tools, caches and build outputs
	rm -rf .venv .tools build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. pyproject.toml's constraint-dependencies fix the versions; there is no lock file.

comma := ,
empty :=
extras = $(if $(strip $(1)),[$(subst $(empty) $(empty),$(comma),$(strip $(1)))])

$(RUN_ENV): EXTRAS = $(CUDA)
$(DEV_ENV): EXTRAS = dev notebooks $(CUDA)

$(RUN_ENV) $(DEV_ENV): pyproject.toml .venv/pyvenv.cfg
	@uv=$$(.ci/find_uv) && "$$uv" pip install --python $(PYTHON) --editable '.$(call extras,$(EXTRAS))'
	@touch $@

# A .venv whose Python has gone from the machine is made anew.
$(shell test ! -e .venv || $(PYTHON) -c '' 2>/dev/null || rm -rf .venv)

.venv/pyvenv.cfg: .python-version
	@uv=$$(.ci/find_uv) && python=$$(.ci/find_python "$$uv") && \
		"$$uv" venv --clear --no-project --python "$$python" .venv
