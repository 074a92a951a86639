# Each target makes its own .venv first; nothing else need be installed.
PYTHON ?= python3
BIN = .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint bench-quality coverage emission latent bench-decode wide schedule kernels bench-gpu bench-cpu scale clean

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable '.[dev]'
	touch .venv

# the matrices are small: two threads gain nothing, and wait for each other where the machine is busy
demo: .venv
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-quality: .venv
	$(BIN)/python -m bench.quality
	$(BIN)/python -m bench.mla
	$(BIN)/python -m bench.ablation
	$(BIN)/python -m bench.tuned
	$(BIN)/python -m bench.sparse --windows 96

coverage: .venv
	$(BIN)/python -m bench.coverage

emission: .venv
	$(BIN)/python -m bench.emission --write

latent: .venv
	$(BIN)/python -m bench.latent --write

bench-decode: .venv
	$(BIN)/python -m bench.decode --write

bench-cpu: .venv
	$(BIN)/python -m bench.cpu --write
	$(BIN)/python -m bench.onnx --write

wide: .venv
	$(BIN)/python -m bench.wide --write

schedule: .venv
	$(BIN)/python -m bench.schedule --write

kernels: .venv
	$(BIN)/python -W ignore -m bench.kernels --write

bench-gpu: .venv
	$(BIN)/python -m bench.gpu

scale: .venv
	$(BIN)/python -m bench.scale --write

clean:
	rm -rf .venv demo
