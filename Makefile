# Every target works from a bare clone with python3 (3.11 or newer, with venv) and make; the first one installs.
PYTHON ?= python3
BIN := .venv/bin
# Programs that tests start, and the next run, read compiled modules, also where the environment says to write none.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip

# One worker per core with one thread each: threads of several workers would wait for each other.
WORKERS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal --durations=10

.PHONY: demo test soak soak-serve soak-bulk bounds check format wheel wheel-check clean

# Draws four pictures in five ways and says what was saved and what it cost: demo/
demo: .venv/.installed
	$(BIN)/python benchmarks/demo.py --output demo

test: .venv/.installed-dev
	$(WORKERS) -m "not soak"

# What takes minutes: whole matrices, captured graphs, Triton kernels, dry runs of all recipes; REPORT has the durations
REPORT ?= out/soak.md
soak: .venv/.installed-dev
	$(WORKERS) -m soak --report $(REPORT)
	$(MAKE) soak-serve
	$(MAKE) soak-bulk

# A server for half an hour: random cancels for 20 minutes, then 1.5 times its capacity for five. Each exits with 1 if
# memory, threads, files or answers are not as they must be, and writes what it saw.
SERVE_REPORT ?= out/serve
soak-serve: .venv/.installed-dev
	$(BIN)/python benchmarks/serve_soak.py --seconds 1200 --output $(SERVE_REPORT)/soak.json
	$(BIN)/python benchmarks/serve_overload.py --seconds 300 --output $(SERVE_REPORT)/overload.json

# A run of 2,000 rows that is killed ten times, its speed beside `bench throughput`, and memory over 10,000 rows.
BULK_REPORT ?= out/bulk.json
soak-bulk: .venv/.installed-dev
	mkdir -p $(dir $(BULK_REPORT))
	$(BIN)/python benchmarks/bulk_soak.py --output $(BULK_REPORT)

# A slice of the tests with the lowest versions that pyproject.toml allows; PYTHON=python3.13 takes another interpreter.
LOWEST = .venv-lowest/bin/python
bounds:
	rm -rf .venv-lowest && $(PYTHON) -m venv .venv-lowest
	$(LOWEST) -m pip install "$$(grep '^torch==' constraints-lowest.txt)"
	$(LOWEST) -m pip install -e packages/foveate-emoji
	$(LOWEST) -m pip install -c constraints-lowest.txt -e ".[demo,eval]"
	$(LOWEST) -m pip install $$(grep -E '^(beartype|hypothesis|pytest)==' constraints.txt)
	OMP_NUM_THREADS=1 $(LOWEST) -m pytest -o addopts= --import-mode=importlib -m "not soak" \
		tests/core tests/tokenizers tests/engine/test_engine.py tests/models/test_checkpoint.py \
		tests/parity/test_parity.py tests/cli/test_generate.py

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist packages/foveate-emoji
	$(BIN)/python -m build --outdir dist .

# Installs both wheels in an empty environment and generates the same image there, bit for bit, outside the repository.
wheel-check: wheel
	rm -rf .venv-wheel dist/check && $(PYTHON) -m venv .venv-wheel && mkdir -p dist/check
	.venv-wheel/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	.venv-wheel/bin/python -m pip install -c constraints.txt dist/*.whl
	$(BIN)/foveate generate hamburger --seed 7 -o dist/check/source.png
	cd dist/check && ../../.venv-wheel/bin/foveate generate --from source.png

clean:
	rm -rf .venv .venv-wheel .venv-lowest dist build demo out site foveate-out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# torch comes first and alone: it is by far the largest, and everything else must fit the pinned one.
.venv/.installed: pyproject.toml constraints.txt packages/foveate-emoji/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foveate needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -e packages/foveate-emoji
	$(PIP) install -c constraints.txt -e ".[demo,eval,serve]"
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install -c constraints.txt -e ".[demo,eval,serve,dev]"
	touch $@
