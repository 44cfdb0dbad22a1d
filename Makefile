# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
C_FILES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/cuda/*.cu tests/cuda/shim/*.* tests/cuda/shim/*/*/*)
SOURCES := $(wildcard csrc/*/* setup.py pyproject.toml constraints.txt tests/interop/no-deps.txt)

.PHONY: demo test soak bench gpu-check lint format clean
.DELETE_ON_ERROR:

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,bench,test,interop,onnx]'
	$(BIN)/pip install --quiet --no-deps --requirement tests/interop/no-deps.txt
	touch $@

# Train on photographs for some two minutes, then write a report to runs/demo/report.html.
demo: $(VENV)/installed
	$(BIN)/fastvq demo --out runs/demo

# A process a core, up to four; a thread that waits must not keep another process from its core.
test: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# The long checks: ten million rows against the reference.
soak: $(VENV)/installed
	$(BIN)/python -m pytest --soak -m soak --timeout 0

# Each contender by itself, then all in turn: some twenty minutes on two quiet cores.
bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-group-by=group --timeout 0
	$(BIN)/fastvq bench --csv benchmarks/results/cpu.csv
	$(BIN)/python -m benchmarks.bench_modules
	$(BIN)/python -m benchmarks.bench_clients
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.plot

# Where there is a GPU: right, captured, in sync and how fast, in ten minutes, offline, with the Python that is there
# (make gpu-check PYTHON=...). DRY=1 does the same on the CPU.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(DRY),--dry)

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf $(VENV) build *.egg-info fastvq/*.so
