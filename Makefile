# make help lists the commands. PYTHON=python3.13 chooses the interpreter; each has its own environment.
PYTHON ?= python3
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(PYTHON_VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_PROCESSES ?= 2
BENCHMARKS := benchmarks/data benchmarks/training benchmarks/adaptation benchmarks/context_share benchmarks/evaluation \
	scripts/benchmark_latency benchmarks/page benchmarks/variants

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench doctor constraints audit clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create the environment, once: 3 GB to download, 7 GB on the disk

$(READY): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; name one: make PYTHON=python3.13 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python -m venv failed. On Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@sed -n '/^uv==/,/[^\]$$/p' requirements-dev.lock > $(VENV)/uv.txt
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $@

demo: $(READY) ## fine-tune, measure and stream tiny.en on bundled speech, offline
	$(BIN)/python scripts/run_demo.py

test: lint ## lint, types and every test, the notebook included
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctor: ## check this machine and say how to fix what is missing
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) scripts/doctor.py

constraints: $(READY) ## pin the tested set again: Colab's versions where Colab has the package
	$(BIN)/uv pip compile --quiet requirements-dev.txt -c tests/data/colab_packages.txt --universal --python-version 3.11 \
		--no-annotate --custom-compile-command "make constraints" -o constraints.txt
	$(BIN)/uv pip compile --quiet requirements-dev.txt -c constraints.txt --universal --python-version 3.11 \
		--no-annotate --generate-hashes --custom-compile-command "make constraints" -o requirements-dev.lock

audit: $(READY) ## compare the pinned packages with the known vulnerabilities; needs the network
	$(BIN)/uv tool run --quiet pip-audit --require-hashes --disable-pip --requirement requirements-dev.lock

bench: $(READY) ## the benchmarks that need no tuned model, short: nothing is recorded
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script.py --quick || exit 1; done

clean: ## remove caches and runs; keeps environments and checkpoints
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
