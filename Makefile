# Every target makes its own virtual environment when needed; once installed, none of them needs a network.
#   PYTHON=python3.12 make test          another interpreter (3.11 or newer)
#   TORCH_OPTIONS="--index-url URL"      where pip finds torch, for instance a CPU-only build

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TORCH_OPTIONS ?=
PYTEST_OPTIONS ?=
COVERAGE ?= -m slipcover
WORKERS ?= 2
# A test that hangs says where every thread was and fails, and the others go on; one that hangs outside
# Python, where no signal is handled, ends the run.
HANGS := --timeout 120 -o faulthandler_timeout=180 -o faulthandler_exit_on_timeout=true --max-worker-restart 0
# The test files of the first release's parts, one a line; as a whole within 150 s on two cores.
FIRST_RELEASE := tests/first_release.txt

# What an installation depends on: the [project] part of pyproject.toml and the pins, by content, not by date.
KEY := $(shell { sed '/^\[tool\./,$$d' pyproject.toml; cat constraints.txt; } | cksum | tr -d ' ')
STAMP := $(VENV)/.installed-$(KEY)

# One thread a process: the tests already run one process a core, and small matrices gain nothing from more.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
# The tests start many processes: let each find its modules compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-network test test-first check soak bench bench-dp bench-federation bench-serve kserve-client bench-log results clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP)  ## the virtual environment, from pyproject.toml and constraints.txt

$(STAMP):
	@set -e; \
	ok='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if [ ! -x $(BIN)/python ]; then \
	    for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	        if $$python -c "$$ok" 2>/dev/null; then break; fi; python=; \
	        if [ -n "$(PYTHON)" ]; then break; fi; \
	    done; \
	    if [ -z "$$python" ]; then echo "Affidavit needs Python 3.11 or newer; name one: PYTHON=/path/to/python make" >&2; exit 2; fi; \
	    echo "making $(VENV) with $$python"; $$python -m venv $(VENV); \
	fi; \
	$(BIN)/python -c "$$ok" || { echo "$(VENV) holds a Python older than 3.11; remove it and run make again" >&2; exit 2; }; \
	echo "installing (a few minutes the first time)"; \
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_OPTIONS) torch; \
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling; \
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[all,dev]'; \
	rm -f $(VENV)/.installed-*; touch $@

demo: $(STAMP)  ## four hospitals train with privacy, the log proves it, a stranger verifies
	@$(BIN)/affidavit demo

demo-network: $(STAMP)  ## the same over TLS and authentication, each hospital in a network namespace of its own
	@$(BIN)/affidavit demo --network --folder affidavit-demo-network

test: $(STAMP)  ## every test but the soak, with a coverage report
	$(BIN)/python $(COVERAGE) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    $(HANGS) $(PYTEST_OPTIONS)

test-first: $(STAMP)  ## the same for the parts of the first release alone, and how long they took
	@begun=$$(date +%s); status=0; $(MAKE) --no-print-directory test PYTEST_OPTIONS="@$(FIRST_RELEASE) $(PYTEST_OPTIONS)" || status=$$?; \
	    echo "the tests of $(FIRST_RELEASE) took $$(( $$(date +%s) - begun )) s"; exit $$status

check: $(STAMP)  ## style, types, import contracts, the examples in docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet -p no:cacheprovider --doctest-modules \
	    $$(grep -rl --include='*.py' '>>> ' affidavit.py audit federation clients server)

soak: $(STAMP)  ## minutes of load and faults; figures go to docs/results/log.md
	$(BIN)/python -m tests.soak_report docs/results/log.md -n $(WORKERS) --dist worksteal $(PYTEST_OPTIONS)

bench: $(STAMP)  ## every benchmark
	@status=0; for file in benchmarks/bench_*.py; do \
	    echo "== $$file"; $(BIN)/python $$file || status=1; \
	done; exit $$status

kserve-client:  ## KServe's own client, in an environment of its own, for the protocol's conformance test
	@$(BIN)/python -m venv build/kserve-client && build/kserve-client/bin/python -m pip install --quiet 'kserve==0.21.0'

bench-serve: $(STAMP)  ## answers a CPU-second beside MLServer, KServe, BentoML and plain FastAPI
	@$(BIN)/python benchmarks/bench_serve.py

bench-dp: $(STAMP)  ## the cost of a private training step beside other implementations
	@$(BIN)/python benchmarks/bench_dp.py

bench-federation: $(STAMP)  ## a federation's round beside plain Flower with Opacus, and beside Ray
	@$(BIN)/python benchmarks/bench_federation.py --write

bench-log: $(STAMP)  ## the log beside a commit an entry, pymerkle and Go's judge
	@$(BIN)/python benchmarks/bench_log.py

results: $(STAMP)  ## utility, robustness, gains by site, the log's speed, written to docs/results (long)
	@$(BIN)/python benchmarks/results_utility.py
	@$(BIN)/python benchmarks/results_secure.py
	@$(BIN)/python benchmarks/results_site_unit.py
	@$(BIN)/python benchmarks/results_robustness.py
	@$(BIN)/python benchmarks/results_personal.py
	@$(BIN)/python benchmarks/bench_log.py --write

clean:  ## remove the virtual environment, caches, builds and the demo's folder
	rm -rf $(VENV) build dist *.egg-info affidavit-demo affidavit-demo-network htmlcov .coverage .coverage.* \
	    .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
