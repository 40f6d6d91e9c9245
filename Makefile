# make help names the targets. Works with GNU make 3.81 (macOS) and later.
PYTHON  ?= python3
PROFILE ?= scenes
JOBS    ?= 2
SEED    ?= 0
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed

# The same answer everywhere: one thread a job, no hash order, no hub.
export PYTHONHASHSEED = 0
export PYTHONUTF8 = 1
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE
export TOKENIZERS_PARALLELISM = false
# glibc hands memory back after every step otherwise: a third of the time of a training step on a CPU
export MALLOC_MMAP_THRESHOLD_ = 33554432
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_TOP_PAD_ = 67108864

.PHONY: help install study test mutants lint check-book check-photographs model implants card book pdf run publish gpu-check clean

help:
	@echo "make study               the whole study, then the book: _build/html/index.html"
	@echo "make study DRY=1         what it would do, take and need (PROFILE=llava-1.5-7b: LLaVA-1.5 on one GPU); starts nothing"
	@echo "make test                the tests"
	@echo "make mutants             plant the faults of tests/mutants.yaml one by one: a test must notice each (long)"
	@echo "make lint                style, types, imports and spelling"
	@echo "make check-book          look at the built book in a headless Chromium, if there is one"
	@echo "make check-photographs   both profiles of LLaVA-1.5 to their end, with a tiny model and tiny files from localhost (minutes)"
	@echo "make run NB=05_edit      one notebook (VARIANT=alea-mixed, PARAMS=\"LR=0.001 STEPS=50\")"
	@echo "make book                the book again, from finished runs"
	@echo "make pdf                 the book as one PDF (needs Chromium or Chrome): _build/look-closer.pdf"
	@echo "make model SEED=0        train the small models (long)"
	@echo "make publish PROFILE=thorough   run a profile (hours) and copy its tables to data/results (ONLY=10_seeds: that stage)"
	@echo "make implants            train the implants of the small clean model: ground truth for locating (long)"
	@echo "make gpu-check OUT=DIR   what a GPU can do with it, in six minutes: memory, times, tests"
	@echo "make card                put the figures of the finished study on the model cards"
	@echo "make clean               remove runs and the built book; models and .venv stay"
	@echo "Everywhere: PROFILE=scenes|smoke|...  JOBS=2  PYTHON=python3.12"
	@echo "Linux without a GPU: TORCH_INDEX=URL of a wheel index with CPU builds of torch (at the first install only)"

$(STAMP): pyproject.toml requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" || \
	  { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one that is, e.g. make study PYTHON=python3.12" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PY) -m pip install -q --no-deps torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(PY) -m pip install -q -e ".[book,fourbit,dev]" -c constraints.txt
	touch $@

install: $(STAMP)

# ALEA_WATCH: if this make is killed, what it started ends too, so that the next make finds no one else at work.
study: $(STAMP)
	@ALEA_WATCH=$$PPID $(PY) -m alea_lib.pipeline $(if $(DRY),plan --profile $(PROFILE),study --profile $(PROFILE) --jobs $(JOBS))

book: $(STAMP)
	@$(PY) -m alea_lib.pipeline book --profile $(PROFILE)

pdf: $(STAMP)
	@$(PY) -m alea_lib.pipeline pdf --profile $(PROFILE)

run: $(STAMP)
	@test -n "$(NB)" || { echo "say which notebook: make run NB=05_edit" >&2; exit 2; }
	@ALEA_WATCH=$$PPID $(PY) -m alea_lib.pipeline execute $(NB) --profile $(PROFILE) $(if $(VARIANT),--variant $(VARIANT)) \
	  $(if $(PARAMS),--set $(PARAMS))

publish: $(STAMP)
	@ALEA_WATCH=$$PPID $(PY) -m alea_lib.pipeline study --profile $(PROFILE) --jobs $(JOBS) --target collect --only $(ONLY)
	@$(PY) -m alea_lib.pipeline publish --profile $(PROFILE) --only $(ONLY)

test: $(STAMP)
	@$(PY) -m pytest tests -n $(JOBS) --dist loadfile

mutants: $(STAMP)
	@$(PY) -m pytest -q -m mutants tests/test_mutants.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check alea_lib tests book
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

check-book: $(STAMP)
	@$(PY) -m pytest -q -m long tests/pipeline/test_browser.py

check-photographs: $(STAMP)
	@$(PY) -m pytest -q -m long tests/pipeline/test_photographs.py

model: $(STAMP)
	$(PY) -m alea_lib.zoo --seed $(SEED)

implants: $(STAMP)
	$(PY) -m alea_lib.zoo --part implants

gpu-check: $(STAMP)
	@test -n "$(OUT)" || { echo "say where the results go: make gpu-check OUT=gpu" >&2; exit 2; }
	@PYTHONPATH=tests $(PY) -m gpu --out $(OUT)

card: $(STAMP)
	$(PY) -m alea_lib.zoo --part card

clean:
	rm -rf _build .snakemake data/runs .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find book/notebooks book/generated -type f ! -name .gitignore -delete
