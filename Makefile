# Everything below works on a fresh machine with Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin
# two at a time: most tests use one core, and those of Slurm wait
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
# threads that wait for work sleep: where they spin, two trainings on two cores run at 8 images/s each instead of 29
test test-fast: export OMP_WAIT_POLICY := passive

.PHONY: demo test test-fast check soak format clean

# real pictures in, a trained and evaluated classifier out, in a few minutes
demo: .venv/.demo
	$(BIN)/python benchmarks/datasets.py demo demo/pictures
	$(BIN)/tlearn prepare demo/pictures demo/data --val 0.3
	$(BIN)/tlearn train configs/demo.yaml --run demo/run
	$(BIN)/tlearn evaluate demo/run
	@echo "five validation pictures:"
	@$(BIN)/python -c "import json; print(*json.load(open('demo/data/audit.json'))['accepted']['val'][::21][:5], sep='\n')" \
		| sed 's|^|demo/pictures/|' | tr '\n' '\0' | xargs -0 $(BIN)/tlearn predict demo/run --topk 3
	@echo "the run folder is demo/run"

test: .venv/.dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# without the tests that train something real or start processes
test-fast: .venv/.dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# what CI runs
check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# long hunts: what a test shows in small, at full size
soak: .venv/.dev
	$(BIN)/python benchmarks/order_scale.py
	$(BIN)/python benchmarks/kill_and_resume.py 30

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf demo .venv

.venv/.%: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

.venv/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'tlearn needs Python 3.11 or newer; make PYTHON=python3.12, say')"
	@$(PYTHON) -c "import ensurepip, venv" || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
