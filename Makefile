# `make lab` to learn, `make test` to check. Everything lives in .venv; a second call installs nothing.
PYTHON ?= python3
TORCH_INDEX ?=
L ?=
LAB_ARGS ?=
BIN := .venv/bin
READY := .venv/.installed
# The checks run offline, small, and one thread a worker; sitecustomize.py closes every socket but loopback.
OFFLINE := env -u EXP_DATA -u EXP_MIRROR EXP_OFFLINE=1 EXP_SCALE=tiny OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	JUPYTER_PLATFORM_DIRS=1 PYTHONPATH=tests/offline:$(CURDIR)/tests/offline

.PHONY: help lab test lesson export clean install bench
help:                ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(READY)    ## make .venv with the exact tested set (lab and test do this themselves)
$(READY): constraints.txt settings.ini setup.py tools/install.py
	GOAL="$(or $(MAKECMDGOALS),lab)" TORCH_INDEX="$(TORCH_INDEX)" $(PYTHON) tools/install.py
	@touch $@

lab: $(READY)        ## open the lessons in JupyterLab
	@mkdir -p my
	@echo "Copy a lesson into my/ before you change it: that folder is yours, git ignores it."
	$(BIN)/jupyter lab nbs/index.ipynb $(LAB_ARGS)

test: $(READY)       ## everything CI checks, offline, on small data
	$(BIN)/ruff check --quiet .
	$(OFFLINE) $(BIN)/nbdev_test --n_workers 2
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 tests

lesson: $(READY)     ## run one lesson in a fresh kernel: make lesson L=04_training_loop
	@$(BIN)/python tools/run_lesson.py "$(L)"

export: $(READY)     ## notebooks -> exp/, links and map refreshed, metadata cleaned
	$(BIN)/python tools/house.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

bench: $(READY)      ## speed and memory, as ratios within one run
	$(BIN)/python tests/benchmarks/run.py

clean:               ## remove what runs leave behind (keeps .venv, data/cache, my/)
	rm -rf _out _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find nbs my -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true
