# `make` alone lists what there is. Everything is installed into .venv, with the versions of constraints.txt.

PYTHON := $(shell command -v python3.11 || command -v python3)
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint docs clean _style _types _tests

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/train ## install, then distil the default teacher into runs/quickstart (run again to resume)
	.venv/bin/limbeck run recipes/quickstart.yaml --out runs/quickstart

# Types are checked beside the tests: alone they would leave a core idle.
test: _style ## install, then check style and types and run all tests
	@$(MAKE) --no-print-directory -j 2 _types _tests

lint: _style _types ## check style and types

_style: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

_types: .venv/dev
	.venv/bin/basedpyright --pythonpath .venv/bin/python

# Two processes of one thread each: most tests are too small for torch to share their work among threads. The order of
# the files is that of tests/conftest.py; xdist's own begins the long ones, which have few tests, last. Compiled modules
# are kept, whatever the environment says: the processes that tests start would compile them anew.
_tests: .venv/dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/dev ## write the generated pages of docs/ anew
	.venv/bin/python -m limbeck.cli.reference > docs/.half && mv docs/.half docs/cli.md
	.venv/bin/python -m limbeck.recipe_file > docs/.half && mv docs/.half docs/recipe.schema.json
	.venv/bin/python tools/recipe_docs.py > docs/recipe.md.half && mv docs/recipe.md.half docs/recipe.md

clean: ## remove what was installed and cached; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# .venv/train and .venv/dev are made last, so they stand for an installation that is whole. `.venv/unfinished` is there
# while pip works: an installation that was cut off is thrown away and done again.
.venv/train: pyproject.toml constraints.txt
	$(call install,.[train])

.venv/dev: pyproject.toml constraints.txt
	$(call install,.[train$(comma)collect$(comma)dev])
	@touch .venv/train

comma := ,

define install
@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer, as python3.11 or python3" >&2; exit 2; }
@if [ -e .venv/unfinished ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	echo "making .venv with $(PYTHON)"; \
	"$(PYTHON)" -m venv --clear .venv >/dev/null 2>&1 || { \
		"$(PYTHON)" -m venv --clear --without-pip .venv && "$(PYTHON)" -m pip --python .venv/bin/python install --quiet pip; }; \
fi
@touch .venv/unfinished
@echo "installing $(1); the first time takes minutes"
$(PIP_INSTALL) --no-compile -e '$(1)'
@.venv/bin/python -m compileall -qq -j 0 .venv/lib || true # by all cores; some packages ship files that do not compile
@rm .venv/unfinished
@touch $@
endef
