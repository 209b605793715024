# Each target sets up what it needs: uv (into .tools/ if PATH has none), Python 3.12, .venv, the packages.
# A second run finds all of that in place and starts at once.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup compare tune generate train test parity lint clean

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

# The oracle of `make parity`. Python 3.11 and pip: on 3.12 torch brings gigabytes of CUDA libraries.
ORACLE := .tools/parity

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(DEV_ENV) ## make .venv with everything for development

compare: $(RUN_ENV) ## compare the kernel layouts; ARGS are flags of experiments.compare_layouts
	$(PYTHON) -m experiments.compare_layouts $(ARGS)

tune: $(RUN_ENV) ## measure which layout and config are the fastest on this GPU; ARGS are flags of experiments.tune
	$(PYTHON) -m experiments.tune $(ARGS)

generate: $(RUN_ENV) ## generate text; ARGS are flags of experiments.generate, else a tiny random model's
	$(PYTHON) -m experiments.generate $(or $(ARGS),--preset=tiny --random --prompt=hello --max_new_tokens=32)

train: $(RUN_ENV) ## train a small model on text, by default Python's own library; ARGS are flags of experiments.train
	$(PYTHON) -m experiments.train $(ARGS)

test: $(DEV_ENV) ## run the tests; ARGS go to pytest (-m "" for the slow ones too)
	JAX_PLATFORMS='$(JAX_PLATFORMS)' $(PYTHON) -m pytest -n $(WORKERS) --dist=worksteal $(ARGS)

parity: $(DEV_ENV) $(ORACLE)/.ready ## check the model on fresh goldens from transformers; SEED=N draws those of N
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && seed=$${SEED:-$$(date +%s)} && \
		echo "goldens of SEED=$$seed" && \
		$(ORACLE)/bin/python tests/moe_jax/goldens/make.py --out="$$out/goldens" --seed="$$seed" && \
		MOE_GOLDENS="$$out/goldens" MOE_SAVED="$$out/saved" JAX_PLATFORMS=cpu \
			PARITY_PYTHON="$(CURDIR)/$(ORACLE)/bin/python" \
			$(PYTHON) -m pytest -n 2 tests/moe_jax/parity tests/moe_jax/checkpoints/test_transformers.py && \
		$(ORACLE)/bin/python tests/moe_jax/goldens/check_saved.py \
			--goldens="$$out/goldens" --saved="$$out/saved"

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
$(DEV_ENV): EXTRAS = dev notebooks ascend $(CUDA)

$(RUN_ENV) $(DEV_ENV): pyproject.toml .venv/pyvenv.cfg
	@uv=$$(.ci/find_uv) && "$$uv" pip install --python $(PYTHON) --editable '.$(call extras,$(EXTRAS))'
	@touch $@

# A .venv whose Python has gone from the machine is made anew.
$(shell test ! -e .venv || $(PYTHON) -c '' 2>/dev/null || rm -rf .venv)

.venv/pyvenv.cfg: .python-version
	@uv=$$(.ci/find_uv) && python=$$(.ci/find_python "$$uv") && \
		"$$uv" venv --clear --no-project --python "$$python" .venv

$(ORACLE)/.ready: Makefile
	@uv=$$(.ci/find_uv) && python=$$(.ci/find_python "$$uv" 3.11) && \
		rm -rf $(ORACLE) && "$$python" -m venv $(ORACLE) && \
		$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check \
			torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
	@touch $@
