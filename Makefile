# SPDX-License-Identifier: Apache-2.0
#
# Two commands do everything on a fresh Debian 12 with git, make and network: `make demo`, `make test`.
# Each sets up what it needs (system packages, a virtualenv in .venv) and is quick when that is done.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
RESULTS := build/results

RUN_EXTRAS := cli,fast,glance,prometheus,signatures,zstd
DEV_EXTRAS := $(RUN_EXTRAS),lint,messaging,test

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-stestr test-pytest test-process functional faults \
	cover house lint ruff mypy reno-lint docs drawings releasenotes check-install setup clean

help:
	@echo "make demo          show the cache at work"
	@echo "make test          unit, contract, property and process tests, with stestr and with pytest"
	@echo "make functional    tests against real servers: Glance, nginx, qemu, filesystems"
	@echo "make faults        tests that kill, cut and fail"
	@echo "make bench         measure"
	@echo "make lint          ruff, mypy --strict, release notes"
	@echo "make cover         how much of the library the tests run; fails below the floor"
	@echo "make house         the figures of the code's shape"
	@echo "make docs          HTML in doc/build/html"
	@echo "make drawings      the drawings in the documentation, after a change of their text"
	@echo "make check-install the sdist and a git archive install and import"
	@echo "make clean         remove what these made"

# -- set-up ------------------------------------------------------------------------------------------

$(STAMPS)/venv: tools/make-venv
	tools/make-venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/system-%: bindep.txt tools/system-packages $(STAMPS)/venv
	tools/system-packages $(BIN)/bindep $*
	@touch $@

$(STAMPS)/run: $(STAMPS)/venv requirements.txt setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable '.[$(RUN_EXTRAS)]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv requirements.txt test-requirements.txt doc/requirements.txt setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable '.[$(DEV_EXTRAS)]' --requirement doc/requirements.txt
	@touch $@ $(STAMPS)/run

# -- the commands ------------------------------------------------------------------------------------

setup: $(STAMPS)/dev $(STAMPS)/system-test

demo: $(STAMPS)/run $(STAMPS)/system-demo
	@$(BIN)/python examples/demo.py

$(STAMPS)/bench: $(STAMPS)/dev benchmarks/requirements.txt
	$(BIN)/pip install --quiet --requirement benchmarks/requirements.txt
	@touch $@

# QUICK=1: little data, few runs, results in build/benchmarks.
bench: $(STAMPS)/bench $(STAMPS)/system-test $(STAMPS)/system-bench
	@$(BIN)/python -m benchmarks.run $(if $(QUICK),--quick)

test: test-stestr test-pytest test-process

test-stestr: setup
	@mkdir -p $(RESULTS)
	rc=0; $(BIN)/stestr run || rc=$$?; $(BIN)/stestr last --subunit > $(RESULTS)/stestr.subunit; \
		$(BIN)/stestr list > $(RESULTS)/stestr.listed; exit $$rc

test-pytest: setup
	$(BIN)/pytest -q -n auto --junitxml=$(RESULTS)/pytest.xml tests/unit tests/flows tests/contract tests/property

# One at a time: these race processes against each other and want the machine for themselves.
test-process: setup
	$(BIN)/pytest -q --junitxml=$(RESULTS)/process.xml tests/process

cover: setup
	$(BIN)/coverage run -m pytest -q tests/unit tests/flows tests/contract tests/property
	$(BIN)/coverage report --skip-covered

functional: setup $(STAMPS)/system-functional
	$(BIN)/pytest -q --junitxml=$(RESULTS)/functional.xml tests/functional

faults: setup $(STAMPS)/system-faults
	$(BIN)/pytest -q --junitxml=$(RESULTS)/faults.xml tests/faults

lint: ruff mypy reno-lint

ruff: $(STAMPS)/dev
	$(BIN)/ruff check .

mypy: $(STAMPS)/dev
	$(BIN)/mypy

reno-lint: $(STAMPS)/dev
	$(BIN)/reno --quiet lint

docs: $(STAMPS)/dev
	$(BIN)/sphinx-build -q -W --keep-going -b html doc/source doc/build/html

# The drawings are kept beside their text, so that building the documentation takes no Graphviz.
drawings: $(STAMPS)/system-drawings
	tools/draw doc/source/images/*.dot

house: $(STAMPS)/dev
	$(BIN)/python tools/house.py

releasenotes: $(STAMPS)/dev
	$(BIN)/sphinx-build -q -W --keep-going -b html releasenotes/source releasenotes/build/html

check-install: $(STAMPS)/dev
	$(BIN)/python tools/check_install.py

clean:
	rm -rf $(VENV) build dist doc/build releasenotes/build .stestr .hypothesis .mypy_cache .ruff_cache \
		.pytest_cache .coverage cover *.egg-info
