# Every target sets up what it needs; `make install` alone makes the environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
FUZZER := $(VENV)/.fuzzer
SERVERS := $(VENV)/servers/.installed

STATES := 12000
STORE_SEEDS := 500
CHAOS_SEEDS := 100

.PHONY: install servers lint test prove bench demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	rm -rf holdfast.egg-info  # an old one would hide new entry points
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

servers: $(SERVERS)

$(SERVERS): $(STAMP) tests/install_servers.sh
	bash tests/install_servers.sh $(VENV)/servers
	touch $(SERVERS)

test: install servers
	$(BIN)/python -m pytest -q

# STATES: images after power cuts; STORE_SEEDS: runs through a faulty object store; CHAOS_SEEDS: of random faults.
prove: install servers $(FUZZER)
	HOLDFAST_CRASH_IMAGES=$(STATES) HOLDFAST_STORE_SEEDS=$(STORE_SEEDS) HOLDFAST_CHAOS_SEEDS=$(CHAOS_SEEDS) $(BIN)/python -m pytest -q -m prove --override-ini addopts='-ra --strict-markers --timeout=3600'

$(FUZZER): $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[prove]'
	touch $(FUZZER)

bench: $(PEERS) servers
	$(BIN)/python benchmarks/save_load.py
	$(BIN)/python benchmarks/async_save.py
	$(BIN)/python benchmarks/async_save.py --layout ddp --rounds 1
	$(BIN)/python benchmarks/async_save.py --model 41m --rounds 1
	$(BIN)/python benchmarks/plan_scale.py
	$(BIN)/python benchmarks/object_store.py
	$(BIN)/python benchmarks/lora.py
	$(BIN)/python benchmarks/step_call.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/chaos_stock.py

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[bench]'
	touch $(PEERS)

demo: install
	$(BIN)/python examples/demo.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
