# Two commands: `make demo` runs the main job, `make test` the tests; both set up what they need in .venv first.

PYTHON ?= python3
VENV ?= .venv
# torch first and pinned, so that nothing drags another build in. On a machine without a GPU the CPU build is enough:
#   make demo TORCH="torch==2.13.0 --index-url <the PyTorch index of CPU wheels>"
TORCH ?= torch==2.13.0
EXTRAS ?= dev
BIN := $(VENV)/bin

export DS_BUILD_OPS := 0
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo test test-all lint docs format clean

help:
	@echo "make demo      the main job on generated data: pre-train, re-learn, recommend"
	@echo "make test      the tests (make test-all: the slow ones too)"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the documentation, built strictly into site/"
	@echo "make setup     only the virtual environment"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel packaging ninja py-cpuinfo psutil pydantic numpy
	# DeepSpeed's source package looks for torch while it is built; nothing is compiled
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/python -m antdist.cli.demo

# Ray allows one cluster a machine, so its tests run one after the other
test: setup
	$(BIN)/python -m pytest -m "not slow and not ray" -n 2 --dist loadfile -rs
	$(BIN)/python -m pytest -m "ray and not slow" -rs

test-all: test
	$(BIN)/python -m pytest -m slow -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy antdist launch benchmarks
	$(BIN)/lint-imports --no-cache

# strict: a dead link, a page that the navigation lacks or a reference that cannot be generated is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo-out build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
