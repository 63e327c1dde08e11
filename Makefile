# Everything a developer does here. `make help` lists it.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help venv setup setup-tests demo demo-down check test test-guest test-e2b test-firecracker \
  test-attacks chaos lint types docs proto proto-check bench

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 18

venv:  ## Make .venv from the pinned requirements; needs no root
	@temporal-dev/install venv

setup:  ## Install Debian packages and .venv
	@temporal-dev/install

setup-tests:  ## Install what only the tests need, too
	@temporal-dev/install tests

demo: setup  ## Set everything up and build two templates, end to end
	@$(PYTHON) temporal-dev/demo.py

demo-down:  ## Stop all that demo has started
	@$(PYTHON) temporal-dev/devstack down

check: lint types  ## What needs no root and no service: lint, types, docs, quick tests (minutes)
	@pytest -q tests/unit tests/replay tests/workflows

test: setup-tests  ## Lint, types, stubs and all tests, on real parts
	@temporal-dev/run-tests

test-guest: setup-tests  ## Guests: images, commands and steps beside what Docker and E2B mean
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  pytest --whole tests/guest tests/integration/test_step_meaning.py

test-e2b:  ## Build templates by E2B's SDK, with each version that is pinned (minutes)
	@temporal-dev/install e2b
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  pytest --whole tests/e2b

test-attacks: setup-tests  ## Attack hosts, API and guests in all ways known (minutes)
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  pytest --whole tests/attacks

test-firecracker: setup-tests  ## API, VMs and a build on each Firecracker of FIRECRACKER_BINARY
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  $(PYTHON) temporal-dev/firecracker_versions.py

chaos: setup-tests  ## Kill everything in every step of a build; prints a table (under an hour)
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  pytest --whole tests/attacks tests/chaos --chaos=full
	@$(PYTHON) temporal-dev/devstack run --only docker,kernel,firecracker -- \
	  pytest --whole tests/integration/test_fair_share.py tests/workflows/test_tenant_line.py \
	  tests/integration/test_side_by_side.py tests/integration/test_layered_templates.py \
	  tests/integration/test_layered_rootfs.py tests/integration/test_layers_ahead.py \
	  tests/workflows/test_warm_host.py

lint: venv  ## ruff, and the walls between rooms
	@ruff check . && ruff format --check . && lint-imports

types: venv  ## mypy --strict
	@mypy

docs: venv  ## Write the pages of docs/ that are made from the code
	@$(PYTHON) temporal-dev/reference.py

proto: venv  ## Generate the stubs in api/pb
	@$(PYTHON) -m grpc_tools.protoc -Iapi/pb=proto --python_out=. --pyi_out=. \
	  --grpc_python_out=. --mypy_grpc_out=. proto/template_manager.proto \
	  proto/info_service.proto

proto-check: proto  ## Fail when the committed stubs are not current
	@git diff --exit-code --stat -- api/pb

bench: setup  ## Where the time of a build goes, beside the disk's own speed
	@$(PYTHON) temporal-dev/bench.py
