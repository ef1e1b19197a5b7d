# Everything a user or a contributor runs. The two that matter: `make up` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
export GOTOOLCHAIN := local
export PATH := $(CURDIR)/.venv/bin:$(CURDIR)/.tools/bin:/usr/local/sbin:/usr/sbin:/sbin:$(PATH)

EMBERD := agent/build/emberd
AGENT_SOURCES := $(shell find agent -name '*.go' -not -path 'agent/build/*' 2>/dev/null) agent/go.mod agent/go.sum
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/emberbox/__init__.py)

# Processes that run tests at once, and further pytest arguments: make test ARGS="-k up"
JOBS ?= 2
ARGS ?=

.PHONY: help
help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \2/p' $(MAKEFILE_LIST) | awk '{ name = $$2; $$1 = $$2 = ""; printf "  make %-12s%s\n", name, $$0 }'

# ---- running

.PHONY: up
up: install ## Install what is missing, start Emberbox, print the three variables
	@$(PYTHON) -m emberbox up --detach

.PHONY: down
down: ## Stop Emberbox and its sandboxes
	@$(PYTHON) -m emberbox down

# ---- installing

.PHONY: install
install: install-system install-venv $(EMBERD) ## Install what running needs

.PHONY: install-dev
install-dev: install-system-test install-venv-dev install-node $(EMBERD) ## Install what testing needs, too

.PHONY: install-system install-system-test install-venv install-venv-dev install-go install-node install-staticcheck
install-system:
	@tools/install.sh system
install-system-test:
	@tools/install.sh system test
install-venv: | install-system
	@tools/install.sh venv
install-venv-dev: | install-system-test
	@tools/install.sh venv dev
install-go: | venv
	@tools/install.sh go
install-node: | venv
	@tools/install.sh node
install-staticcheck: | install-go
	@tools/install.sh staticcheck

# The virtual environment, whichever of the two installs it.
.PHONY: venv
venv:
	@[ -x $(PYTHON) ] || tools/install.sh venv

.PHONY: agent
agent: $(EMBERD) ## Build emberd

$(EMBERD): $(AGENT_SOURCES) src/emberbox/__init__.py | install-go
	@mkdir -p $(@D)
	agent/build.sh $@ $(VERSION)

# ---- checking

.PHONY: check
check: install-venv-dev install-staticcheck ## Lint, format, types, import contracts; no test is run
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	@unformatted=$$(find agent -name '*.go' -not -path 'agent/build/*' -exec gofmt -l {} +); \
	  if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:" $$unformatted; exit 1; fi
	cd agent && go vet ./...
	cd agent && staticcheck ./...

.PHONY: test
test: install-dev ## Install what is missing and run every test that this machine can run; LAB=0: without the lab
	@lab=0; if [ "$(LAB)" != 0 ]; then $(MAKE) --no-print-directory test-lab-fast || lab=$$?; fi; \
	  $(PYTHON) -m pytest -n $(JOBS) --dist loadgroup tests/unit tests/integration tests/clients $(ARGS); status=$$?; \
	  if [ $$lab != 0 ]; then echo "the tests in the lab failed: see above"; fi; exit $$((status ? status : lab))

.PHONY: test-all
test-all: ## The tests, the version matrix and everything in the lab
	$(MAKE) test LAB=0
	$(MAKE) compat
	$(MAKE) test-lab

.PHONY: test-lab
test-lab: install-dev ## Boot the lab, run its tests and the client suites in it, end it; takes hours
	tools/install.sh system lab
	$(PYTHON) tests/lab/suite.py --all $(ARGS)

.PHONY: test-lab-fast
test-lab-fast: install-dev ## Likewise, the part that `make test` runs: at most 25 minutes
	@if tools/install.sh system lab; then $(PYTHON) tests/lab/suite.py; \
	  else echo "lab: no test runs in it: what it needs cannot be installed"; fi

.PHONY: compat
compat: install-dev ## Run the client suites against several releases of the SDKs; writes docs/compatibility.md
	$(PYTHON) -m tests.clients.compat.matrix

.PHONY: bench
bench: install-dev ## Run every benchmark, each against a fresh Emberbox; ARGS=--write writes docs/benchmarks.md
	$(PYTHON) bench/run.py $(ARGS)

# ---- the lab: a KVM host under QEMU

.PHONY: lab lab-shell lab-down install-lab
install-lab: install
	@tools/install.sh system lab
lab: install-lab ## Boot the lab with Emberbox in it, print the three variables
	$(PYTHON) tests/lab/lab.py up $(ARGS)
lab-shell: ## Run a command in the lab: make lab-shell COMMAND="uname -a"
	$(PYTHON) tests/lab/lab.py shell $(COMMAND)
lab-down: ## End the lab
	$(PYTHON) tests/lab/lab.py down

# ---- maintaining

.PHONY: proto
proto: install-venv-dev ## Generate the wire modules from proto/
	tools/proto.sh

.PHONY: lock
lock: install-venv-dev ## Resolve pyproject.toml into the hashed requirements files
	tools/lock.sh $(ARGS)

.PHONY: dist
dist: install-venv-dev install-go ## Build the wheel, with emberd inside
	$(PYTHON) -m build --wheel --no-isolation

.PHONY: clean
clean: ## Remove what was built; keeps .venv and .tools
	rm -rf dist build agent/build src/emberbox/bin .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
