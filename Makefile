# SPDX-License-Identifier: Apache-2.0
#
# Two commands do everything on a fresh Debian 12 or 13 with git, make and network: `make demo`, `make test`.
# Each sets up what it needs (system packages, a virtualenv in .venv) and is quick when that is done.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# What ran here; a run elsewhere has a directory of its own beside it. .ci/summary.py counts them all.
RESULTS := build/results/here

RUN_EXTRAS := cli,fast,glance,jobs,prometheus,signatures,zstd
DEV_EXTRAS := $(RUN_EXTRAS),lint,messaging,test

# The suites of `make test` are the testpaths of pyproject.toml, which share the machine, and those that want it
# for themselves: they race processes against each other.
SERIAL_SUITES := process
# The Pythons that run somewhere else than in .venv or on a bare Debian; setup.cfg claims all of them.
OTHER_PYTHONS := 3.12
BARE_SUITES := bookworm trixie

.DEFAULT_GOAL := help
.PRECIOUS: $(STAMPS)/system-%
.PHONY: output help demo bench test test-parallel test-serial functional faults campaigns pythons bare \
	cover house lint ruff mypy reno-lint docs drawings man releasenotes check-install setup set-up-servers serial-suites clean

help:
	@echo "make demo          show the cache at work"
	@echo "make test          the tests that need no server"
	@echo "make functional    tests against real servers: Glance, nginx, qemu, filesystems"
	@echo "make faults        tests that kill, cut and fail"
	@echo "make campaigns     the long form of those tests that search: hours"
	@echo "make pythons       the same with the other Pythons, by tox and stestr, with the lowest versions that the"
	@echo "                   requirements allow, and coverage"
	@echo "make bare          demo and test on a Debian 12 and 13 that have nothing else (as root)"
	@echo "make bench         measure"
	@echo "make lint          ruff, mypy --strict, release notes, the figures of the code's shape"
	@echo "make cover         how much of the library the tests run; fails below the floor"
	@echo "make house         the figures of the code's shape"
	@echo "make docs          HTML in doc/build/html"
	@echo "make man           the manual page in doc/build/man"
	@echo "make output        the page with what the commands print, after a change of that"
	@echo "make drawings      the drawings in the documentation, after a change of their text"
	@echo "make check-install the sdist, the wheel and a git archive install, with each extra, and work"
	@echo "make clean         remove what these made"

# -- set-up ------------------------------------------------------------------------------------------

$(STAMPS)/venv: tools/make-venv tools/find-python
	@tools/make-venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/system-%: bindep.txt tools/system-packages $(STAMPS)/venv
	@tools/system-packages $(BIN)/bindep $*
	@touch $@

$(STAMPS)/run: $(STAMPS)/venv requirements.txt setup.cfg pyproject.toml
	@tools/pip-install $(VENV) --editable '.[$(RUN_EXTRAS)]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv requirements.txt test-requirements.txt doc/requirements.txt setup.cfg pyproject.toml
	@tools/pip-install $(VENV) --editable '.[$(DEV_EXTRAS)]' --requirement doc/requirements.txt
	@touch $@ $(STAMPS)/run

$(STAMPS)/bench: $(STAMPS)/dev benchmarks/requirements.txt
	@tools/pip-install $(VENV) --requirement benchmarks/requirements.txt
	@touch $@

$(STAMPS)/tox: $(STAMPS)/dev
	@tools/pip-install $(VENV) 'tox>=4.6'
	@touch $@

setup: $(STAMPS)/dev $(STAMPS)/system-test

# What the tests with servers and privileges install beside that.
set-up-servers: $(STAMPS)/system-functional $(STAMPS)/system-faults $(STAMPS)/system-bare $(STAMPS)/tox

# -- what it does ------------------------------------------------------------------------------------

demo: $(STAMPS)/run $(STAMPS)/system-demo
	@$(BIN)/python examples/demo.py

# QUICK=1: little data, few runs, results in build/benchmarks.
bench: $(STAMPS)/bench $(STAMPS)/system-test $(STAMPS)/system-bench
	@$(BIN)/python -m benchmarks.run $(if $(QUICK),--quick)

# -- tests -------------------------------------------------------------------------------------------

test: test-parallel test-serial

# What failed of these and of those with servers runs once more in CI, where others keep the machine busy.
test-parallel: setup
	$(BIN)/pytest -q -n auto --junitxml=$(RESULTS)/parallel.xml || \
		$(BIN)/python .ci/again.py $$? $(RESULTS)/parallel.xml

test-serial: setup
	$(BIN)/pytest -q --junitxml=$(RESULTS)/serial.xml $(SERIAL_SUITES:%=tests/%)

cover: setup
	$(BIN)/pytest -q -n auto --cov --cov-report=term:skip-covered

functional: setup $(STAMPS)/system-functional
	$(BIN)/pytest -q --junitxml=$(RESULTS)/functional.xml tests/functional || \
		$(BIN)/python .ci/again.py $$? $(RESULTS)/functional.xml

faults: setup $(STAMPS)/system-faults
	$(BIN)/pytest -q --junitxml=$(RESULTS)/faults.xml tests/faults

serial-suites:
	@echo $(SERIAL_SUITES) | tr ' ' ,

# What tests/support/campaign.py makes long. `make campaigns PYTEST_ADDOPTS='-k interleavings'` is one of them.
campaigns: setup $(STAMPS)/system-functional $(STAMPS)/system-faults
	IMAGECACHE_CAMPAIGN=1 $(BIN)/pytest -v -s -m campaign -o faulthandler_timeout=0 --junitxml=$(RESULTS)/campaigns.xml tests

pythons: $(OTHER_PYTHONS:%=python-%)

# With the lowest versions that are allowed, and the floor of coverage, which one run of all the tests has to show.
python-%: PYTHON_ENV = py$(subst .,,$*)-lowest-cover
python-%: $(STAMPS)/tox $(STAMPS)/system-test
	@mkdir -p build/results/$(PYTHON_ENV)
	$(BIN)/python tools/lowest_versions.py > build/lowest.txt
	@python=$$(tools/find-python $*) || { echo "there is no Python $* here" >&2; exit 1; }; \
		$(BIN)/tox run --discover "$$python" -e $(PYTHON_ENV); rc=$$?; \
		$(BIN)/stestr last --subunit > build/results/$(PYTHON_ENV)/stestr.subunit; \
		$(BIN)/stestr list > build/results/$(PYTHON_ENV)/stestr.listed; exit $$rc

bare: $(BARE_SUITES:%=bare-%)

# There is no compiler there: the place to see that none is needed. The newest Python is the last to get wheels.
bare-trixie: BARE_TARGETS := test check-install
bare-%: BARE_TARGETS := test
bare-%: $(STAMPS)/dev $(STAMPS)/system-bare
	$(BIN)/python tools/bare.py $* $(BARE_TARGETS) --results build/results/$*

lint: ruff mypy reno-lint house

ruff: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --quiet --check .

mypy: $(STAMPS)/dev
	$(BIN)/mypy

reno-lint: $(STAMPS)/dev
	$(BIN)/reno --quiet lint

output: setup
	$(BIN)/python -W ignore -m tests.support.printed

docs: $(STAMPS)/dev
	$(BIN)/sphinx-build -q -n -W --keep-going -b html doc/source doc/build/html

# The drawings are kept beside their text, so that building the documentation takes no Graphviz.
drawings: $(STAMPS)/bench $(STAMPS)/system-drawings
	tools/draw doc/source/images/*.dot
	$(BIN)/python tools/plot_monitoring.py doc/source/images/monitoring.svg

man: $(STAMPS)/dev
	$(BIN)/sphinx-build -q -W --keep-going -b man doc/source doc/build/man

house: $(STAMPS)/dev
	$(BIN)/python tools/house.py

releasenotes: $(STAMPS)/dev
	$(BIN)/sphinx-build -q -W --keep-going -b html releasenotes/source releasenotes/build/html

check-install: $(STAMPS)/dev $(STAMPS)/system-test
	$(BIN)/python tools/check_install.py

clean:
	rm -rf $(VENV) build dist doc/build releasenotes/build .stestr .tox .hypothesis .mypy_cache .ruff_cache \
		.pytest_cache .coverage cover *.egg-info
