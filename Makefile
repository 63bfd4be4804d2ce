# Targets: setup (the environment), demo (setup, then a few minutes' pretraining), test (what to run before every commit),
# sweep-smoke OUT=DIR (a tiny sweep whose whole state lies under DIR), browser (MLflow's pages of one, in Chromium),
# jobs (submits jobs to a cluster on this machine; JOBS='jobs and short' is CI's form), chaos (kills, cuts off and fills up what a
# run needs; CHAOS='chaos and short' is CI's form).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test sweep-smoke browser jobs chaos
setup: .venv/.installed

# The stamp makes reruns instant; it is older than what it depends on when a pin or a dependency changed.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[orchestrator,test]'
	touch $@

demo: setup
	$(BIN)/orchestrator demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

OUT ?= sweep-output
sweep-smoke: setup
	$(BIN)/orchestrator demo --sweep --output "$(OUT)"

# SHOTS=DIR keeps the screenshots.
browser: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[orchestrator,test,browser]'
	$(BIN)/python -m pytest tests/browser -m browser

JOBS ?= jobs
jobs: setup
	$(BIN)/python -m pytest tests/cluster -m "$(JOBS)"

CHAOS ?= chaos
chaos: setup
	$(BIN)/python -m pytest tests/chaos tests/orchestrator -m "$(CHAOS)"
