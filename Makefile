# `make lab` to learn, `make test` to check. Everything lives in .venv; a second call installs nothing.
PYTHON ?= python3
TORCH_INDEX ?=
MATRIX_TORCH ?=
L ?=
Y ?=
LAB_ARGS ?=
BIN := .venv/bin
READY := .venv/.installed
# Threads that wait should sleep: else a busy core makes small networks ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# The checks run offline, small, and one thread a worker; sitecustomize.py closes every socket but loopback.
OFFLINE := env -u EXP_DATA -u EXP_MIRROR -u EXP_RECORD EXP_OFFLINE=1 EXP_SCALE=tiny OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	JUPYTER_PLATFORM_DIRS=1 PYTHONPATH=tests/offline:$(CURDIR)/tests/offline

.PHONY: help doctor lab copy lesson progress milestone docs test matrix wheel bench record export clean install
help:                ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(READY)    ## make .venv with the exact tested set (lab and test do this themselves)
$(READY): constraints.txt settings.ini setup.py tools/install.py
	@GOAL="$(or $(MAKECMDGOALS),lab)" TORCH_INDEX="$(TORCH_INDEX)" $(PYTHON) tools/install.py
	@touch $@

doctor:              ## is this machine ready, and what to do about each trouble; before and after the installation
	@if [ -x $(BIN)/python ]; then $(BIN)/python tools/doctor.py; else $(PYTHON) tools/doctor.py; fi

lab: $(READY)        ## open the lessons in JupyterLab; your own copies are there under my/
	@mkdir -p my
	@echo "To change a lesson, copy it first (make copy L=05): the copy is in my/, and yours."
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" nbs/index.ipynb $(LAB_ARGS)

copy: $(READY)       ## a clean copy of a lesson and its exercises into my/: make copy L=05
	@$(BIN)/python tools/copy_lesson.py "$(L)"

lesson: $(READY)     ## run one lesson in a fresh kernel: make lesson L=05 (or L=my/05)
	@$(BIN)/python tools/run_lesson.py "$(L)"

progress: $(READY)   ## which lessons ran, and which of your exercises pass: make progress, or make progress L=05
	@$(BIN)/python tools/progress.py "$(L)"

milestone: $(READY)  ## run a step of the field's history again: make milestone lists them, Y=1989 runs one
	@$(BIN)/python tools/milestones.py $(Y)

docs: $(READY)       ## the site, into _docs/: every lesson and exercise as a page, and a reference of exp
	@$(BIN)/python tools/docs.py

test: $(READY)       ## everything CI checks, offline, on small data
	$(BIN)/ruff check --quiet .
	$(OFFLINE) $(BIN)/nbdev_test --n_workers 2
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

matrix: $(READY)     ## the tests on other instructions, threads and (MATRIX_TORCH=its environment) PyTorch
	$(BIN)/python tools/matrix.py "$(MATRIX_TORCH)"

wheel: $(READY)      ## the package as a stranger gets it, in an empty environment: every module, the README's example
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tools/wheel.py

bench: $(READY)      ## speed and memory, as ratios within one run
	$(BIN)/python tests/benchmarks/run.py

record: $(READY)     ## maintainers: a real run of one lesson, kept in it and in results/: make record L=05
	@$(BIN)/python tools/run_lesson.py --record "$(L)"
	@$(BIN)/nbdev_clean

export: $(READY)     ## maintainers: notebooks -> exp/, links and map refreshed, metadata cleaned
	$(BIN)/python tools/house.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(BIN)/python tools/signs.py

clean:               ## remove what runs leave behind (keeps .venv, data/cache, my/)
	rm -rf _out _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find nbs my -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true
