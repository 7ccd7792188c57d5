# make demo    train on the digits, with TensorBoard logs and a picture (the main job)
# make test    tests and doctests, but for those that take more than a few seconds each
# make check   what must pass before a commit: format, lint, types, import contracts, all tests with coverage
# make guards  take every guard that a test declares out, one at a time, and see the test fail (half an hour)
# make bench   cost of measuring beside others, as ratios in one run; write docs/benchmarks.md (a third of an hour)
# make docs    run the code blocks of the documentation, and build the site into site/ (some minutes)
# make dist    build the wheel and the sdist into dist/, check them, and try the wheel by itself (a minute)
# make gallery     draw the figures of docs/gallery.md again (some minutes)
# make tutorials   run the notebooks again, and store what they print and draw (five minutes)
# make study   train and measure 216 networks, and write docs/study.md (ten minutes on two cores);
#              study-cifar and study-accurate for CIFAR-10 (some 75 minutes each on two cores with JOBS=2, and 10,000 training
#              images; ARRAYS=folder of .npy files, or torchvision downloads it); all go on after an interrupt
# make coverage  measure and check many classifiers, write docs/coverage.md (most of an hour)
#
# Each sets up what it needs in .venv the first time; with PyTorch that is some gigabytes and a few minutes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8

.PHONY: demo test check format guards bench docs gallery tutorials dist study study-cifar study-accurate coverage clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV): PyTorch and the tools, a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/digits.py

test: $(READY)
	$(PYTEST) -m "not slow"

check: $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[dev,loggers]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --cov --cov-report=term

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

guards: $(READY)
	$(BIN)/python -m tests.guarding

bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks

docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(PYTEST) --quiet tests/test_docs.py tests/test_prose.py
	$(BIN)/mkdocs build --strict

gallery: $(READY)
	$(BIN)/python docs/gallery.py

tutorials: $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[tutorials]'
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=180 tutorials/*.ipynb

dist: $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[dist]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	DISTRIBUTIONS=$(CURDIR)/dist $(BIN)/python -m pytest --quiet tests/test_package.py

coverage: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[coverage]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage

# Data of CIFAR-10: a folder of arrays, or torchvision's download.
CIFAR = $(if $(ARRAYS),--arrays $(ARRAYS),--download)

# What is in the tables is not measured again. To train and measure all anew: make study RESULTS=folder
TABLES = $(if $(RESULTS),--results $(RESULTS) --work $(RESULTS)/work)

study: $(READY)
	$(BIN)/python -m studies digits --jobs 2 --keep-weights $(TABLES)
	$(BIN)/python -m studies shift curves --jobs 2 $(TABLES)
	$(BIN)/python -m studies speed page $(TABLES)

study-cifar: $(READY)
	$(BIN)/python -m studies cifar $(CIFAR) $(if $(JOBS),--jobs $(JOBS)) --keep-weights $(TABLES)
	$(BIN)/python -m studies shift-cifar $(CIFAR) $(if $(JOBS),--jobs $(JOBS)) $(TABLES)
	$(BIN)/python -m studies page $(TABLES)

# Networks of real accuracy. On a GPU of which eight minutes can be had: make study-accurate MINUTES=8 ARRAYS=folder
study-accurate: $(READY)
	$(BIN)/python -m studies accurate $(CIFAR) $(if $(JOBS),--jobs $(JOBS)) $(if $(MINUTES),--minutes $(MINUTES)) $(TABLES)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
