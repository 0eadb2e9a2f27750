# Every target sets up what it needs first; `make help` lists them.
BIN := .venv/bin
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Each worker has servers of its own; more than a few would only wait for the disk.
TEST_JOBS ?= -n auto --maxprocesses=4 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: ## back up, change, back up again and restore an embedded PostgreSQL 18
	@scripts/bootstrap demo
	@$(BIN)/dbmodule demo $(DEMO_ARGS)

test: ## run all tests on PostgreSQL 15, 17 and 18 (PYTEST_ARGS="--pg 18 -k name")
	@scripts/bootstrap test
	@$(BIN)/python -m pytest $(TEST_JOBS) $(PYTEST_ARGS)

test-all: ## run all tests in every configuration of the servers
	@scripts/bootstrap test
	@$(BIN)/python -m pytest $(TEST_JOBS) --matrix full $(PYTEST_ARGS)

soak: ## backups under load, each restored and judged (MINUTES=20 SEED=1 PG=18)
	@scripts/bootstrap test
	@SOAK_MINUTES=$(or $(MINUTES),20) SOAK_SEED=$(or $(SEED),0) SOAK_PG=$(or $(PG),18) \
		$(BIN)/python -m pytest -p no:cacheprovider \
		-o faulthandler_timeout=0 tests/soak.py

check: ## lint, formatting, types and layers
	@scripts/bootstrap test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean: ## remove what was built and installed here
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o \( -name __pycache__ -o -name '_kernel*.so' \) -prune -exec rm -rf {} +
