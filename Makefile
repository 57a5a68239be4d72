# `make demo` and `make test` set everything up by themselves. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# one worker a core, four at most; one thread each, so that they do not fight
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
RUN    := @OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo test test-all bench lab export notebooks readme clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything in it (the other targets do this by themselves)

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "relkd needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1): install one, then 'make PYTHON=/path/to/python3 ...'" >&2; exit 1; }
	@if command -v uv >/dev/null 2>&1; then [ -x $(BIN)/python ] || uv venv -q --python $(PYTHON) $(VENV); \
	 else [ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { echo "could not make $(VENV): install the venv module (Debian: python3-venv) or uv" >&2; exit 1; }; \
	   $(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1 || true; fi
	@echo "installing what settings.ini names into $(VENV) (once; a minute or several)"
	@if command -v uv >/dev/null 2>&1; then uv pip install -q --python $(BIN)/python --compile-bytecode -e '.[dev]'; \
	 elif $(BIN)/python -m uv --version >/dev/null 2>&1; then $(BIN)/python -m uv pip install -q --python $(BIN)/python --compile-bytecode -e '.[dev]'; \
	 else $(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'; fi
	@if [ -d .git ]; then $(BIN)/nbdev_install_hooks >/dev/null && \
	   sed -i.old 's#^nbdev_trust#[ ! -x $(BIN)/nbdev_trust ] || $(BIN)/nbdev_trust#' .git/hooks/post-merge && sed -i.old 's#driver = nbdev_merge#driver = $(BIN)/nbdev_merge#' .gitconfig && \
	   rm -f .git/hooks/post-merge.old .gitconfig.old; fi
	@touch $@

demo: $(READY)  ## teach students on real digits, each row beside the committed one; writes to .demo/
	@$(BIN)/relkd demo

test: $(READY)  ## what CI runs: notebooks in step and clean, every notebook executes, tests/
	$(RUN) $(BIN)/python -m pytest -n $(JOBS)

test-all: $(READY)  ## the same with the cells flagged slow (add FLAGS="slow cuda" where there is a GPU)
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --flags "$(or $(FLAGS),slow)"

bench: $(READY)  ## time the losses against the usual code; records in figures/records/bench
	@$(BIN)/relkd bench

lab: $(READY)  ## JupyterLab on nbs/
	@$(BIN)/jupyter lab --notebook-dir=nbs

export: $(READY)  ## clean the notebooks and write relkd/ from them
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

notebooks: $(READY)  ## run notebooks in place, as a reader would (NB=nbs/00_relations.ipynb FLAGS=slow)
	@$(BIN)/python .ci/execute.py --flags "$(FLAGS)" $(NB) && $(BIN)/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

clean:  ## remove caches and unfinished runs, not .venv and no record
	@rm -rf figures/.runs .demo .pytest_cache .hypothesis build *.egg-info; find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
