# make demo  set up an environment and run the whole toolkit on rendered street scenes
# make test  set up an environment, check the code and run the tests
# make test-versions: the quick part of them on every supported torch; make test-gpu: on a GPU
# make bench measure against the published procedure and other toolkits; DEVICE=cuda: on a GPU
# make docs build the documentation and check its links: build/site/index.html
# make overfit train every registered model on one image, into docs/overfit
# make test-faults: break running trainings on purpose; make soak: for two hours
# VENV=path  use (or create) another environment than .venv
# PYTHON=... the interpreter a new environment is made with

VENV ?= .venv
PYTHON ?= python3
DEVICE ?= cpu
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu test-versions bench docs overfit test-faults soak lint \
	types format clean

demo: $(VENV)/.mit_semseg
	PYTHON=$(BIN)/python bash demo_test.sh

# In two processes: more are not quicker on two cores, and need more memory.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What takes longer than a minute apiece.
test-slow: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -m slow

# What needs a GPU; all other tests run on the CPU.
test-gpu: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -m gpu

# The quick part of the tests on every supported torch and Python (noxfile.py).
test-versions: $(VENV)/.mit_semseg-dev
	$(BIN)/nox

bench: $(VENV)/.mit_semseg-bench
	$(BIN)/mit-semseg bench --device $(DEVICE)

# Warnings, such as of a link to nothing, are errors.
docs: $(VENV)/.mit_semseg-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What has been learned in overfit/ is not run again.
overfit: $(VENV)/.mit_semseg-dev
	OVERFIT_OUT=overfit $(BIN)/python -m pytest -s -m slow tests/tools/test_overfit_models.py

# What kills, stops and starves running trainings, or fills their disk.
test-faults: $(VENV)/.mit_semseg-dev
	$(BIN)/python -m pytest -s -m faults tests/faults

# The demo's training, for hours of it.
soak: $(VENV)/.mit_semseg-dev
	SOAK_HOURS=$${SOAK_HOURS:-2} $(BIN)/python -m pytest -s -m faults tests/faults/test_soak.py

lint: $(VENV)/.mit_semseg-dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter read files, and know nothing of package-dir in pyproject.toml: they get
# the package as it is installed, with lib/ in it.
types: $(VENV)/.mit_semseg-dev
	rm -rf build/package
	$(BIN)/python setup.py --quiet build_py --build-lib build/package
	cp pyproject.toml build/package
	cd build/package && $(abspath $(BIN))/mypy --cache-dir $(CURDIR)/.mypy_cache
	cd build/package && $(abspath $(BIN))/lint-imports --cache-dir $(CURDIR)/.import_linter_cache

format: $(VENV)/.mit_semseg-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An interpreter too old would fail much later, and less clearly.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mit_semseg needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.mit_semseg: pyproject.toml | $(BIN)/python
	@echo 'Installing torch and the rest into $(VENV): several GB, some minutes'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.mit_semseg-dev: pyproject.toml | $(BIN)/python
	@echo 'Installing torch, the tests and the rest into $(VENV): several GB, some minutes'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.mit_semseg

$(VENV)/.mit_semseg-bench: $(VENV)/.mit_semseg
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf build dist demo bench overfit .nox *.egg-info .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
