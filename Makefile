# `make help` lists the targets. All of them but clean and help set the environment up first.
SHELL := /bin/bash
VENV  := .venv
STAMP := $(VENV)/.setup-done
BIN   := $(VENV)/bin
SGLANG       := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.setup-done

# Two ranks on two cores: more threads, or threads that spin while they wait, only slow each other down.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup sglang demo demo-sglang test test-sglang test-slurm lint clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## Make .venv with every dependency (minutes the first time, nothing after that)

$(STAMP): pyproject.toml constraints.txt launch/setup.sh launch/python_environment.sh
	@bash launch/setup.sh $(VENV)
	@touch $@

sglang: $(SGLANG_STAMP)  ## Make .venv-sglang: a real SGLang server on the CPU (minutes the first time, 3 GB)

$(SGLANG_STAMP): constraints-sglang.txt launch/python_environment.sh $(wildcard launch/sglang*) $(wildcard launch/sglang_torch_cpu/src/*/*.py)
	@bash launch/sglang_setup.sh $(SGLANG)
	@touch $@

demo: $(STAMP)  ## SFT base -> three RL teachers -> one MOPD student -> table and plots, in runs/demo
	@$(BIN)/mopd demo

test: $(STAMP)  ## Run all tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm

test-slurm: $(STAMP)  ## Test launch/ on a real Slurm, which is installed (root, apt) and started for it
	@bash tests/slurm/install.sh || echo "Slurm could not be installed: its tests are skipped"
	@$(BIN)/python -m pytest -q -rs -o faulthandler_timeout=1800 tests/slurm

demo-sglang: $(STAMP) $(SGLANG_STAMP)  ## The demo, its student sampled by two SGLang servers (starts and stops them)
	@$(BIN)/mopd demo --config-dir configs/tiny --student mopd_sglang

test-sglang: $(STAMP) $(SGLANG_STAMP)  ## Tests against real SGLang servers
	@$(BIN)/python -m pytest -q tests/sglang

lint: $(STAMP)  ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy megatron_mopd kernels

docs: $(STAMP)  ## Write docs/configuration.md from the dataclasses
	@$(BIN)/python -m megatron_mopd.configuration

clean:  ## Remove .venv, .venv-sglang and caches (runs/ stays)
	rm -rf $(VENV) $(SGLANG) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
