# Everything a person types. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By its interpreter: a program of an environment that was copied with its folder calls the one it was copied from.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# On all cores, which pip does not use. Files of another Python version are never imported: their errors do not count.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# `moved` where the environment was made in another folder: this one was moved or copied since.
MOVED := $(shell test -e $(VENV)/.installed && ! grep -qsF "$$(pwd -P)/$(VENV)/bin/" $(BIN)/kalshi-platform && echo moved)

.PHONY: moved help install install-dev run test test-quick explore chaos soak nights bench bench-quick check client-tests docs fuzz audit engines format lock clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

moved:
	@echo "This folder was moved or copied: its environment is made to fit"
	@$(BIN)/python -c '' 2>/dev/null || rm -rf $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml $(MOVED)
	@echo "Installing into $(VENV) (about a minute, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " + "run")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python infra/moved_environment.py $(VENV)
	@$(PIP) install --no-compile --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock requirements-clients.lock
	@$(PIP) install --no-compile --no-deps --require-hashes -r requirements-dev.lock
	@$(PIP) install --no-compile --no-deps --ignore-requires-python --require-hashes -r requirements-clients.lock
	@$(COMPILE)
	@touch $@

install: $(VENV)/.installed ## The environment alone, from the lock

install-dev: $(VENV)/.installed-dev ## The environment with what the tests and checks need

run: install ## Everything: ClickHouse, Dagster UI on http://127.0.0.1:3000, the streamer
	@exec $(BIN)/kalshi-platform up

test: install-dev ## The whole test suite
	@$(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# Rooms whose tests are functions and small parts; those marked slow, and whole platforms, are left to `make test`.
QUICK := $(addprefix kalshi_platform_tests/,journal exchange health test_pages.py test_public_face.py test_reference.py test_schema.py test_settings.py)

test-quick: install-dev ## The inner loop: tests of pure functions and small parts, at most 90 s; `make test` has all
	@$(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(PYTEST_ARGS) $(QUICK)

explore: install-dev ## The tests' properties with new examples, up to four times as many: for a release, and after a change to what they test (CI does not run it)
	@$(BIN)/pytest -n 2 --dist worksteal -m hypothesis --hypothesis-profile explore $(PYTEST_ARGS)

chaos: install-dev ## 200 faults at random, and docs/reliability.md (CHAOS_ARGS="--faults 40 --shards 2")
	@$(BIN)/python -m kalshi_platform_tests.chaos.campaign $(CHAOS_ARGS)

soak: install-dev ## 30 minutes of load, each part restarted once, and docs/soak.md (SOAK_ARGS="--minutes 4")
	@$(BIN)/python -m kalshi_platform_tests.soak.campaign $(SOAK_ARGS)

nights: install-dev ## Two faults at a time, each reported once, in time, and closed; 15 minutes a pair (NIGHTS_ARGS="--pairs 2")
	@$(BIN)/python -m kalshi_platform_tests.soak.nights $(NIGHTS_ARGS)

# A recorded order flow, for the bytes that an event takes; without it that row is left out.
RECORDED ?= ../shared/frames/ws_legacy_cents_2025-11-30
FLOW = $(if $(wildcard $(RECORDED).jsonl.gz),--recorded $(RECORDED).jsonl.gz $(RECORDED).recv.txt.gz)

bench: install ## Every figure that is promised, and docs/performance.md; 45 minutes (BENCH_ARGS="--section latency")
	@$(BIN)/python -m kalshi_platform_tests.benchmarks $(FLOW) $(BENCH_ARGS)

bench-quick: install ## A fraction of it, for a look (5 minutes); writes nothing
	@$(BIN)/python -m kalshi_platform_tests.benchmarks --quick $(FLOW) $(BENCH_ARGS)

check: install-dev ## Formatting, lint, imports that run downward, words, strict types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python infra/check_words.py
	@$(BIN)/mypy

$(VENV)/.installed-security: $(VENV)/.installed-dev requirements-security.lock
	@$(PIP) install --no-deps --require-hashes -r requirements-security.lock
	@touch $@

client-tests: install-dev ## clickhouse-connect's own integration tests against the embedded ClickHouse, cloned for it; 12 minutes
	@$(BIN)/python -m kalshi_platform_tests.embedded_clickhouse.client_suite $(CLIENT_TESTS_ARGS)

fuzz: $(VENV)/.installed-security ## Fuzz what reads bytes from elsewhere, a minute each (FUZZ_ARGS="--seconds 600 frames")
	@$(BIN)/python -m kalshi_platform_tests.fuzz.campaign $(FUZZ_ARGS)

audit: $(VENV)/.installed-security ## Known vulnerabilities of the locked dependencies; writes sbom.json (CycloneDX)
	@$(BIN)/pip-audit --disable-pip --require-hashes --strict --format cyclonedx-json --output sbom.json -r requirements.lock
	@$(BIN)/pip-audit --disable-pip --require-hashes --strict -r requirements-dev.lock

$(VENV)/.installed-docs: $(VENV)/.installed requirements-docs.lock
	@$(PIP) install --no-deps --require-hashes -r requirements-docs.lock
	@touch $@

docs: $(VENV)/.installed-docs ## The documentation as a site, with the API reference, in site/
	@$(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

# Both backtesting engines: NautilusTrader wants an older pandas than the platform's own environment has.
ENGINES := .venv-engines

$(ENGINES)/.installed: requirements-engines.lock
	@$(PYTHON) -m venv --clear $(ENGINES)
	@$(ENGINES)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --no-deps --require-hashes -r requirements-engines.lock
	@touch $@

engines: install-dev $(ENGINES)/.installed ## hftbacktest and NautilusTrader read what the exporters write, and have the same book after every event
	@$(BIN)/pytest -q $(PYTEST_ARGS) kalshi_platform_tests/reading/test_engines.py

format: install-dev ## Put the code in the one format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ## Resolve the dependencies again (needs uv)
	uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.11 --group build --extra postgres pyproject.toml -o requirements.lock
	uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.11 --group build --extra postgres --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.11 --group security -c requirements-dev.lock -o requirements-security.lock
	uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.11 --group docs -c requirements-dev.lock -o requirements-docs.lock
	uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.13 --group clients -o requirements-clients.lock
	uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-strip-extras --python-version 3.11 --group engines -o requirements-engines.lock

clean: ## Remove the environment; recorded data stays
	rm -rf $(VENV) $(ENGINES) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
