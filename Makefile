# The developer's menu: `make help`. Every target does its own set-up, in a virtual environment of this checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OPTIONS ?=
BENCH_DATA ?= ../shared/data
BENCH_OPTIONS ?=
BENCH_SECTIONS ?=
FUZZ_S ?= 60
export OMP_NUM_THREADS ?= 1
export ORT_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-devices test-runners lint format bench bench-deq bench-wire bench-onnx bench-backends bench-har bench-flower bench-memory bench-simulate test-flower fuzz clean \
	mosquitto boards

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the virtual environment with everything pinned

# torch goes first and pinned: an unpinned one may pull gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]' --group dev
	@touch $@

demo: $(INSTALLED) ## Run a fleet of six emulated boards on this machine (DEMO_OPTIONS="--devices 3")
	$(BIN)/fedeq demo $(DEMO_OPTIONS)

# A file's tests stay in one process, in the order of the folders: they share brokers and boards.
test: $(INSTALLED) mosquitto ## Run all tests, a process per core
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The tests of a file share boards, which have names and networks of their own in each process.
test-devices: $(INSTALLED) mosquitto boards ## Boot boards here, flash and update them, cut their power: needs root
	$(BIN)/python -m pytest -m devices tests/devices -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=10

test-runners: $(INSTALLED) ## Run export/ in node, C++, a browser and the oldest onnxruntime: npm, g++, chromium; fetches 700 MB once
	$(BIN)/python -m pytest -m runners tests/export --durations=10

# Flower's pins are older than ours (protobuf, typer, rich), so it gets an environment of its own.
FLOWER := .venv-flower
$(FLOWER)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(FLOWER)/bin/python -m pip install --quiet -c constraints.txt torch
	$(FLOWER)/bin/python -m pip install --quiet -e '.[flower,ray,torch,onnx,demo]' pytest pytest-timeout
	@touch $@

test-flower: $(FLOWER)/.installed ## Run the Flower adapter on Flower's own engine, and a simulation on Ray; fetches 400 MB once
	$(FLOWER)/bin/python -m pytest tests/flower --durations=10
	$(FLOWER)/bin/python -m pytest tests/simulation/test_runs.py -k ray

bench-flower: $(FLOWER)/.installed ## The same federation by Flower's engine and by our machines: result, CPU, memory, bytes
	$(FLOWER)/bin/python -m tests.bench.flower 10 50

lint: $(INSTALLED) ## Check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pyright

format: $(INSTALLED) ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: bench-deq bench-wire bench-onnx bench-backends bench-har ## Measure the numbers that the README shows

bench-deq: $(INSTALLED) ## The equilibrium core against torchdeq and the bare cell, CPU time (BENCH_SECTIONS="floor")
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	$(BIN)/python tests/bench/deq.py $(BENCH_SECTIONS)

bench-wire: $(INSTALLED) mosquitto ## The wire against bare paho: CPU, bytes, memory, bad links (BENCH_SECTIONS="cpu load")
	BENCH_DATA=$(BENCH_DATA) $(BIN)/python tests/bench/wire.py $(BENCH_SECTIONS)

bench-onnx: $(INSTALLED) ## ONNX against torch: answers, int8, start, size, training step, memory (BENCH_SECTIONS="step")
	BENCH_DATA=$(BENCH_DATA) $(BIN)/python -m tests.bench.onnx_models $(BENCH_SECTIONS)

bench-backends: $(INSTALLED) ## A federation on HAR trained by ONNX graphs against one trained by torch, same seeds (needs BENCH_DATA)
	BENCH_DATA=$(BENCH_DATA) $(BIN)/python tests/bench/backends.py

bench-memory: $(INSTALLED) ## Memory and CPU of one training step: equilibrium models, torch and ONNX, against ResNet-34
	$(BIN)/python -m tests.bench.step_memory

bench-simulate: $(INSTALLED) ## What a simulated round costs beside training: 100, 1000 and 5000 clients
	$(BIN)/python -m tests.bench.simulate

fuzz: $(INSTALLED) ## Throw bytes at every decoder, led by coverage, for FUZZ_S seconds (60)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group fuzz
	$(BIN)/python tests/fuzz/decoders.py -max_total_time=$(FUZZ_S)

bench-har: $(INSTALLED) ## Accuracy of a federation of 30 people on HAR (needs BENCH_DATA)
	$(BIN)/fedeq demo --data $(BENCH_DATA)/har.npz --x X --client subject --test local_test --classes 0-5 $(BENCH_OPTIONS)

# The real broker comes from the system's packages where we may install them; without it some tests are skipped.
mosquitto:
	@PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
			&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mosquitto >/dev/null; } \
		|| echo "mosquitto is not installed and cannot be installed here: the tests marked 'broker' are skipped"

# What makes boards out of this machine, likewise; without it the tests that need it are skipped and say so.
BOARD_PROGRAMS := mmdebstrap systemd-nspawn qemu-aarch64-static update-binfmts ip ssh sfdisk mcopy mke2fs
BOARD_PACKAGES := mmdebstrap systemd-container qemu-user-static binfmt-support iproute2 openssh-client fdisk mtools e2fsprogs
boards:
	@export PATH="$$PATH:/usr/sbin:/sbin" missing=; for program in $(BOARD_PROGRAMS); do \
		command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -z "$$missing" ] \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(BOARD_PACKAGES) >/dev/null; } \
		|| echo "not installed and cannot be installed here:$$missing: the boards that need them are skipped"

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
