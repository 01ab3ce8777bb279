# Every target sets up .venv by itself and does nothing twice. `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Nothing here reports home.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
# Threads that wait by spinning cost a busy machine tenfold.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-cluster soak lint format bench bench-gpu bench-data bench-train wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "raylarge needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (several GB the first time, torch with CUDA among them) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
		--editable ".[test,dev,text,geo,dicom,h5]" --constraint constraints.txt
	@touch $@

demo: $(STAMP)  ## slide to served image; SLIDES='a.svs,b.tif' MINUTES=20 ARGS='key=value'
	@$(BIN)/python jobs/demo.py $(if $(SLIDES),slides='$(SLIDES)') \
		$(if $(MINUTES),minutes=$(MINUTES)) $(ARGS)

# Two processes for what starts no Ray; one for what does, since that fills the machine alone.
FAST := $(BIN)/pytest -n 2 --dist loadfile -m "not ray and not slow and not cluster and not gpu"

test: $(STAMP)  ## every test that needs no GPU, no second node and no patience
	$(FAST)
	$(BIN)/pytest -m "ray and not slow and not cluster and not gpu"

test-fast: $(STAMP)  ## the tests that start no Ray; ARGS='-k name'
	$(FAST) $(ARGS)

# pytest ends with 5 where no test carries the mark: nothing to do is no failure.
test-cluster: $(STAMP)  ## the tests that start several Ray nodes on this machine
	$(BIN)/pytest -m "cluster and not slow" $(ARGS) || [ $$? -eq 5 ]

soak: $(STAMP)  ## the tests that take minutes
	$(BIN)/pytest -m slow $(ARGS) || [ $$? -eq 5 ]

lint: $(STAMP)  ## format, rules, types, layers, spelling, cluster files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python cluster/check.py

format: $(STAMP)  ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure sampling on this CPU (10 minutes); ARGS='quick=true'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sample $(ARGS)

bench-gpu: $(STAMP)  ## measure full-size networks on this GPU; ARGS='size=1024 steps=10 batch=32'
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-data: $(STAMP)  ## measure slides to examples on this CPU; ARGS='quick=true only=read'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data $(ARGS)

bench-train: $(STAMP)  ## measure what Ray and DeepSpeed add to a step; ARGS='quick=true'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.train $(ARGS)

wheel: $(STAMP)  ## dist/: the wheel and the versions that the nodes of cluster/*.yaml install
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	cp constraints.txt dist/

clean:  ## remove caches and build products; .venv and out/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
