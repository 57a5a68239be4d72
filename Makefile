# `make demo` and `make test` set everything up by themselves. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# one worker a core, four at most; one thread each, so that they do not fight
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
RUN    := @OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# JupyterLab's own options: make lab LAB="--port 9999"; a container's root is told to Jupyter
LAB    ?=
ROOT   := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

.PHONY: help setup demo test test-all bench lab export notebooks readme site clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## *' '/^[a-z-]+:.*##/ {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with everything in it (the other targets do this by themselves); UV_TORCH_BACKEND=cpu: without GPU libraries
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh .ci/setup

demo: setup  ## teach students on real digits, each row beside the committed one; writes to .demo/
	$(RUN) $(BIN)/relkd demo

test: setup  ## what CI runs: notebooks in step and clean, every notebook executes, tests/
	$(RUN) $(BIN)/python -m pytest -n $(JOBS)

test-all: setup  ## the same with the cells flagged slow (add FLAGS="slow cuda" where there is a GPU)
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --flags "$(or $(FLAGS),slow)"

bench: setup  ## time the losses against the usual code; records in figures/records/bench
	@$(BIN)/relkd bench

lab: setup  ## JupyterLab, at the front page; it prints its address
	@$(BIN)/jupyter lab $(ROOT) --log-level WARN $(LAB) nbs/index.ipynb

export: setup  ## clean the notebooks and write relkd/ from them
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

notebooks: setup  ## run notebooks in place, as a reader would (NB=nbs/00_relations.ipynb FLAGS=slow)
	@$(BIN)/python .ci/execute.py --flags "$(FLAGS)" $(NB) && $(BIN)/nbdev_clean

readme: setup  ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

site: setup  ## the site in _docs/site: both languages, searchable, offline; nothing is executed
	@PYTHON=$(BIN)/python sh .ci/site/build

clean:  ## remove caches and unfinished runs, not .venv and no record
	@rm -rf figures/.runs .demo .pytest_cache .hypothesis build *.egg-info; find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
