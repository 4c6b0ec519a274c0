# `make demo` and `make test` are all that a newcomer needs; both make the virtual environment when it is missing or outdated.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
FOR_RUNS := $(VENV)/.installed_for_runs

SWEEP ?= embedded_lots
HEADS ?= panoptic_fcn ciae mask2former
ARGS ?=
WORKERS ?= 2

.PHONY: demo reproduce test lint format docs docs-serve benchmark release clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# pip prints its own progress; the stamps are written only when everything is installed.
define made_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --upgrade pip
endef

$(INSTALLED): pyproject.toml
	$(made_venv)
	$(PY) -m pip install --progress-bar on --editable '.[dev]'
	@touch $@ $(FOR_RUNS)

$(FOR_RUNS): pyproject.toml
	$(made_venv)
	$(PY) -m pip install --progress-bar on --editable '.[report,sweeps]'
	@touch $@

# Car parks and CIAE: of all data sets and heads here, those with which two minutes of training give something to look at.
# Channels last takes a tenth of the step's time off; the rate suits so few steps.
demo: $(FOR_RUNS)  ## train CIAE + IBS on the embedded car parks and write a report (2 to 4 minutes on 2 cores)
	@echo "Pictures are drawn, a network is trained on them, a report is written: 2 to 4 minutes on two cores."
	@$(PY) -m panoptic_ibs.train experiment=lots head=ciae trainer.max_steps=800 trainer.val_check_interval=400 evaluation.baselines=true optim.lr=0.004 trainer.channels_last=true

reproduce: $(FOR_RUNS)  ## the benchmark on car parks: hours on 2 cores; after Ctrl-C the same command goes on (HEADS=ciae, SWEEP=embedded_benchmark)
	for head in $(HEADS); do $(PY) -m panoptic_ibs.train sweep=$(SWEEP) head=$$head $(ARGS) || exit; done
	$(PY) -m panoptic_ibs.report runs=runs/$(SWEEP)

test: $(INSTALLED)  ## run the tests, two files at a time (WORKERS=N)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(INSTALLED)  ## ruff, mypy and the import direction
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(INSTALLED)  ## format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(INSTALLED)  ## build the documentation site into site/, strictly: every link and anchor is checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: $(INSTALLED)  ## show the site while it is written
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

benchmark: $(INSTALLED)  ## all benchmarks: ratios against peers in one run
	$(PY) scripts/benchmark.py all

release: $(INSTALLED)  ## check the tree, the version, the changelog, lint and tests; then build dist/
	$(PY) scripts/release.py check
	$(MAKE) lint test
	$(PY) scripts/release.py check
	$(PY) scripts/release.py build

clean:  ## remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
