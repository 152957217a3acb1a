# Each target sets up what it needs. `make demo` shows the main job, `make test` proves it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := bash
.SHELLFLAGS := -eo pipefail -c
READY  := $(VENV)/.ready

.PHONY: help setup demo test lab up nbs readme check bench lock clean
help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 16

setup: $(READY) ## create .venv with the locked versions of everything
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python must be 3.11 or newer, was {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	@if command -v uv >/dev/null; then \
	  test -x $(BIN)/python || uv venv --quiet --seed --python "$$(command -v $(PYTHON))" $(VENV); \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirements requirements.lock && \
	  uv pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	else \
	  test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	fi
	@touch $@

demo: $(READY) ## the main job, end to end, on a made market
	@$(BIN)/hftlab demo

test: $(READY) ## everything: lint, types, every notebook's lessons, every test
	$(BIN)/ruff check nbs hftlab tests
	$(BIN)/mypy
	$(BIN)/nbdev-test --timing | awk 'NR <= 11'
	$(BIN)/pytest

lab: $(READY) ## JupyterLab on the notebooks
	@cd nbs && ../$(BIN)/jupyter lab

up: $(READY) ## keep everything running until Ctrl-C
	@$(BIN)/hftlab up

nbs: $(READY) ## export, run every notebook, save its outputs, write README.md
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --save
	$(BIN)/nbdev-clean
	@$(MAKE) --no-print-directory readme

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir . --output README nbs/index.ipynb \
	  --NbConvertApp.output_files_dir=nbs/images --RegexRemovePreprocessor.patterns='^#\| hide'
	@sed -E 's#\]\(([0-9]{2}_|tutorials/|research/|images/)#](nbs/\1#g; s/[[:space:]]+$$//' README.md | cat -s \
	  | awk '/^```/ {if (!inside && $$0 == "```") $$0 = "```python"; inside = !inside} 1' > README.tmp && mv README.tmp README.md

check: $(READY) ## the quick part of test: lint, types, and a house in order
	$(BIN)/ruff check nbs hftlab tests
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_house.py

bench: $(READY) ## measure every bar of every part
	@$(BIN)/hftlab bench grade

lock: ## versions that work together, into requirements.lock (needs uv; remove the file first for the newest)
	uv pip compile --universal --python-version 3.11 --all-extras --generate-hashes -q --custom-compile-command 'make lock' pyproject.toml -o requirements.lock

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
