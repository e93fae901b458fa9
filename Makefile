# `make` alone lists the targets. Each environment has a stamp, so that it is installed once.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SERVE := .venv/.serve
DEV := .venv/.dev
COMPAT := $(CURDIR)/.venv-compat
SECOND_PYTHON ?= $(shell for python in python3.14 python3.13 python3.12; do \
	$$python -c "" 2>/dev/null && { echo $$python; break; }; done)
SBOM_TOOL := cyclonedx-bom==7.5.0
HASHES_TOOL := pip-tools==7.6.2
CLIENTS := $(patsubst tests/clients/%.txt,.venv-clients/%/.installed,$(wildcard tests/clients/*.txt))
ifneq ($(shell which npm 2>/dev/null),)
CLIENTS += .venv-clients/node/.installed
endif

# Tests run servers beside themselves, so that threads outnumber cores. By default OpenMP's threads spin while they
# wait, and a forward pass of 5 ms takes up to 650 ms. With a short spin, as in our commands, it still takes 5 ms.
test quick: export OMP_WAIT_POLICY := passive
test quick: export GOMP_SPINCOUNT := 20000
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help serve test quick compat check fix docs screenshot clients sbom hashes clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

serve: $(SERVE) ## install what serving needs, then serve the built-in model (ARGS="--port 9000 ..." passes options)
	$(BIN)/local-rerank serve $(ARGS)

test: $(DEV) ## run every test (ARGS="-k name" passes options); ISA=avx2: the numeric tests with that instruction set
ifdef ISA
	$(BIN)/python -m tests.isa $(ISA) $(ARGS)
else
	@$(MAKE) --silent --jobs=2 clients
	$(PYTEST) $(ARGS)
endif

quick: $(DEV) ## run the library's fast tests, in less than a minute: no servers, no SDKs, none that is marked slow
	$(PYTEST) -m "not slow" --ignore=tests/server --ignore=tests/clients --ignore=tests/playground $(ARGS)

compat: $(COMPAT)/lowest/.installed $(if $(SECOND_PYTHON),$(COMPAT)/second/.installed) ## `make quick` with the lowest versions that pyproject.toml allows, and with a second Python if there is one
	@$(foreach stamp,$^,echo "With $(notdir $(patsubst %/,%,$(dir $(stamp)))) ..."; \
		$(MAKE) --silent quick DEV= BIN=$(dir $(stamp))bin || exit;)
	$(if $(SECOND_PYTHON),,@echo "There is no second Python: make compat SECOND_PYTHON=/path/to/python3.12")

check: $(DEV) ## lint, formatting and types, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(DEV) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV) ## update the generated parts of the documents: docs/options.md, docs/api.md, the answer in the README
	$(BIN)/python docs/options.py > docs/options.md
	$(BIN)/python docs/api.py > docs/api.md
	$(BIN)/python docs/answer.py

screenshot: $(DEV) ## retake the README's screenshot (needs Chromium and the fonts of fonts-inter and fonts-noto-cjk)
	SCREENSHOT=docs/playground.png $(BIN)/pytest -q tests/playground/test_screenshot.py

clients: $(CLIENTS) ## install the SDKs that tests/clients calls, each set in its own environment

sbom: $(SERVE) .venv-sbom/.installed ## list what is installed in .venv, with versions and licences: dist/sbom.json (CycloneDX)
	@mkdir -p dist
	.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.json .venv

# Hashes hold for the Python and the system that this runs on: for the image, run it in its base image (docs/containers.md).
hashes: .venv-hashes/.installed ## write hashes.txt: each package that serving needs, with the hashes of its files
	.venv-hashes/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --all-build-deps \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --constraint constraints.txt \
		--output-file hashes.txt pyproject.toml

clean: ## remove the environments, caches and built packages
	rm -rf .venv .venv-clients .venv-sbom .venv-hashes .venv-compat dist .pytest_cache .mypy_cache .ruff_cache

$(SERVE): pyproject.toml constraints.txt
	@echo "Installing what serving needs into .venv: once, a few minutes, most of them for torch ..."
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(SERVE)
	@echo "Adding what tests and checks need ..."
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# torch and triton stay as pinned, because any other torch is a CUDA build of gigabytes.
$(COMPAT)/lowest.txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	@{ grep -oE '"[a-z][^">]*>=[^";]+' pyproject.toml | sed -E 's/"//; s/\[.*\]//; s/>=/==/' | grep -vE '^(torch|triton)='; \
		grep -E '^(torch|triton)=' constraints.txt; } | sort -u > $@

$(COMPAT)/lowest/.installed: PYTHON_HERE = $(PYTHON)
$(COMPAT)/second/.installed: PYTHON_HERE = $(SECOND_PYTHON)
$(COMPAT)/lowest/.installed: VERSIONS = $(COMPAT)/lowest.txt
$(COMPAT)/second/.installed: VERSIONS = constraints.txt
$(COMPAT)/lowest/.installed $(COMPAT)/second/.installed: $(COMPAT)/lowest.txt
	@echo "Installing the versions of $(VERSIONS) with $(PYTHON_HERE) ..."
	@$(PYTHON_HERE) -m venv $(@D)
	@$(@D)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@$(@D)/bin/pip install --quiet --constraint $(VERSIONS) --editable ".[dev]"
	@touch $@

.venv-sbom/.installed .venv-hashes/.installed: Makefile
	@echo "Installing the tool of $@ ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet $(if $(findstring sbom,$@),$(SBOM_TOOL),$(HASHES_TOOL))
	@touch $@

.venv-clients/%/.installed: tests/clients/%.txt
	@echo "Installing the clients of $< into .venv-clients/$* ..."
	@$(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/pip install --quiet --no-deps --requirement $<
	@touch $@

.venv-clients/node/.installed: tests/clients/node/package.json tests/clients/node/package-lock.json
	@echo "Installing the clients for Node into .venv-clients/node ..."
	@mkdir -p .venv-clients/node
	@cp $^ .venv-clients/node
	@npm ci --silent --no-fund --no-audit --prefix .venv-clients/node
	@touch $@
