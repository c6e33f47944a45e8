# make help lists the commands. PYTHON=python3.13 chooses the interpreter; each has its own environment.
PYTHON ?= python3
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(PYTHON_VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# torch's CUDA build needs them on a GPU only; without its other libraries it is not imported
GPU_ONLY := triton nvidia-cusolver nvidia-cuda-nvrtc
# print a package's lines of the lock
locked = sed -n '/^$(1)==/,/[^\]$$/p' requirements-dev.lock
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes
TEST_PROCESSES ?= 2
COMPILE = $(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make constraints"
BENCHMARKS := benchmarks/gpu benchmarks/data benchmarks/training benchmarks/adaptation benchmarks/context_share benchmarks/evaluation \
	scripts/benchmark_latency benchmarks/page benchmarks/variants

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench doctor constraints audit clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create the demo's environment, once: 2 GB to download, 5 GB on the disk, 6 with a GPU

$(READY): requirements-demo.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; name one: make PYTHON=python3.13 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python -m venv failed. On Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@$(call locked,uv) > $(VENV)/uv.txt
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	$(INSTALL) --no-deps -r requirements-demo.lock
	@if nvidia-smi >/dev/null 2>&1; then $(foreach name,$(GPU_ONLY),$(call locked,$(name));) fi > $(VENV)/gpu.txt
	@test ! -s $(VENV)/gpu.txt || $(INSTALL) --no-deps -r $(VENV)/gpu.txt
	@touch $@

$(READY_DEV): $(READY) requirements-dev.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $@

demo: $(READY) ## fine-tune, measure and stream tiny.en on bundled speech, offline
	$(BIN)/python scripts/run_demo.py

test: lint ## lint, types and every test, the notebook included
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(READY_DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctor: ## check this machine and say how to fix what is missing
	@for python in $(BIN)/python $(PYTHON) python3; do $$python -c "" 2>/dev/null && exec $$python scripts/doctor.py; done; \
		echo "error: no Python runs here (tried $(PYTHON) and python3)"; echo "fix: make doctor PYTHON=python3.13"; exit 1

constraints: $(READY_DEV) ## pin the tested set again: Colab's versions where Colab has the package
	$(COMPILE) --extra dev -c tests/data/colab_packages.txt -o constraints.txt
	$(COMPILE) --extra dev -c constraints.txt --generate-hashes -o requirements-dev.lock
	$(COMPILE) --extra demo -c constraints.txt --generate-hashes -o requirements-demo.lock \
		$(foreach name,$(GPU_ONLY),--no-emit-package $(name))

audit: $(READY_DEV) ## compare the pinned packages with the known vulnerabilities; needs the network
	$(BIN)/uv tool run --quiet pip-audit --require-hashes --disable-pip --requirement requirements-dev.lock

bench: $(READY_DEV) ## the benchmarks that need no tuned model, short: nothing is recorded
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script.py --quick || exit 1; done

clean: ## remove caches and runs; keeps environments and checkpoints
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
