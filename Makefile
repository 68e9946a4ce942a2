# make train: the main job. make test: every check. make check: the fast ones. make ui: look at what was trained.
# make drills: kills at random moments, seeds, the oldest and the newest libraries.
PYTHON ?= python3
BIN := .venv/bin
EXTENSIONS := .venv/torch_extensions
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: train test check ui drills lint clean

train: .venv/installed
	$(BIN)/llava train tiny

test: .venv/installed-test lint
	$(BIN)/python -m pytest -m "not drill" -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The fast lane, for every change: lint, types, import contracts, and the tests that start no service.
check: .venv/installed-test lint
	$(BIN)/python -m pytest -m "not drill and not services and not slow" -n 2 --dist worksteal --max-worker-restart 0

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

ui: .venv/installed
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port 5000

drills: .venv/installed-test
	$(BIN)/python -m pytest -m drill -s

# The torch range picks the CPU build where pip is shown one, and the CUDA build elsewhere.
.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet -e .
	$(BIN)/python -m components.training.operators
	touch $@

.venv/installed-test: pyproject.toml .venv/installed | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv runs
