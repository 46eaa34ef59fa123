# make demo           create an environment and run the demo on rendered street scenes
# make test           create an environment, check the code and run the tests
# make test-slow      run tests of more than a minute each
# make test-gpu       run tests that need a GPU
# make test-versions  run the quick tests with every supported torch and Python
# make test-faults    run fault injection tests of trainings; make soak: for two hours
# make notebooks      execute the notebooks, on small data and without a network
# make bench          measure speed against the published procedure; DEVICE=cuda: on a GPU
# make overfit        overfit every registered model on one image, into docs/overfit
# make docs           build the documentation and check its links: build/site/index.html
# VENV=path           use (or create) another environment than .venv
# PYTHON=python3.12   the interpreter of a new environment

VENV ?= .venv
PYTHON ?= python3
DEVICE ?= cpu
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu test-versions bench docs overfit notebooks test-faults soak \
	lint types format clean

demo: $(VENV)/.mit_semseg
	PYTHON=$(BIN)/python bash demo_test.sh

# Two processes: more are not faster on two cores and need more memory.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -m gpu

# See noxfile.py.
test-versions: $(VENV)/.mit_semseg-dev
	$(BIN)/nox

bench: $(VENV)/.mit_semseg-bench
	$(BIN)/mit-semseg bench --device $(DEVICE)

# --strict: warnings, for example of broken links, are errors.
docs: $(VENV)/.mit_semseg-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Results that exist in overfit/ are not computed again.
overfit: $(VENV)/.mit_semseg-dev
	OVERFIT_OUT=overfit $(BIN)/python -m pytest -s -m slow tests/tools/test_overfit_models.py

notebooks: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -s -m notebooks tests/test_notebooks.py

test-faults: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -s -m faults tests/faults

# A stress test: the demo's training under faults.
soak: $(VENV)/.mit_semseg-dev
	SOAK_HOURS=$${SOAK_HOURS:-2} $(BIN)/python -m pytest -s -m faults tests/faults/test_soak.py

lint: $(VENV)/.mit_semseg-dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter do not support package-dir of pyproject.toml: they check the package as
# installed, with lib/ in it.
types: $(VENV)/.mit_semseg-dev
	rm -rf build/package
	$(BIN)/python setup.py --quiet build_py --build-lib build/package
	cp pyproject.toml build/package
	cd build/package && $(abspath $(BIN))/mypy --cache-dir $(CURDIR)/.mypy_cache
	cd build/package && $(abspath $(BIN))/lint-imports --cache-dir $(CURDIR)/.import_linter_cache

format: $(VENV)/.mit_semseg-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Check the version first: an older interpreter would fail later with a less clear error.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mit_semseg needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.mit_semseg: pyproject.toml | $(BIN)/python
	@echo 'Installing torch and other dependencies into $(VENV): several GB, some minutes'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.mit_semseg-dev: pyproject.toml | $(BIN)/python
	@echo 'Installing torch and development dependencies into $(VENV): several GB, some minutes'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.mit_semseg

$(VENV)/.mit_semseg-bench: $(VENV)/.mit_semseg
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf build dist demo bench overfit .nox *.egg-info .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
