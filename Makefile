# Needs nothing but make and a Python 3.11 to 3.13. The active environment is used (venv or conda, but never conda's
# base); where none is, .venv is made from requirements.lock. See tools/setup.sh.
SHELL := /bin/sh
PROFILE ?= embedded
VLLM ?= vllm
SERVE ?=
CHECKPOINT ?= model
METHODS ?= slimllm,flap,obs_ridge
SEEDS ?= 5
COMPARE ?=
SWEEP ?=
TUNE ?=
SITE ?= -b html
OPTIONS ?=
NOTEBOOKS ?= notebooks
# A profile's run folder: its name, that of its file, is one that make can work with.
RUN := $(or $(SLIMLLM_NB_RUNS),runs)/$(patsubst %.yaml,%,$(lastword $(subst /, ,$(PROFILE))))

ifneq ($(CONDA_DEFAULT_ENV),base)
CONDA := $(CONDA_PREFIX)
endif
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(CONDA),.venv)
PYTHON := "$(ENVIRONMENT)/bin/python"
# The notebooks' kernel is the environment's own, even where the user has installed another of the same name.
export JUPYTER_PREFER_ENV_PATH := 1
ifeq ($(origin DEVICE),command line)
export SLIMLLM_NB_DEVICE := $(DEVICE)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup reproduce quick test check tune compare ablations zeroshot gguf serve lab notebooks reference bench gpu results course sentencepiece site test-engines assignments grade lint lock clean

help: ## list these targets
	@echo "make TARGET, with the environment $(ENVIRONMENT):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make or complete the environment from the locks (hash-checked), model and texts too; a second time does nothing
	@sh tools/setup.sh "$(ENVIRONMENT)"

reproduce: setup ## run the notebooks and judge the claims [PROFILE=embedded DEVICE=cpu OPTIONS="-p samples=8"]; goes on where it stopped
	@exec $(PYTHON) -m slimllm_nb.reproduce.start --profile "$(PROFILE)" --notebooks "$(NOTEBOOKS)" $(OPTIONS)
	@[ ! -f "$(RUN)/inputs" ] || exec $(MAKE) --no-print-directory notebooks-and-verdicts

# What is older than its notebook or than what all of them depend on runs again, in this order. exec: make tells those
# whom it started itself when it is told to end.
.PHONY: notebooks-and-verdicts
notebooks-and-verdicts: $(patsubst $(NOTEBOOKS)/%,$(RUN)/%,$(sort $(wildcard $(NOTEBOOKS)/*.ipynb)))
	@$(PYTHON) -m slimllm_nb.reproduce --profile "$(PROFILE)" $^

$(RUN)/%.ipynb: $(NOTEBOOKS)/%.ipynb $(RUN)/inputs
	@exec $(PYTHON) -m slimllm_nb.reproduce.notebook $< $@

quick: lint ## lint, then every test that is quick and executes no notebook
	$(PYTHON) -m pytest -n auto -m "not slow and not notebook"

test: lint ## lint, then all tests, the notebooks' outputs among them
	$(PYTHON) -m pytest -n auto --maxprocesses 4

check: setup ## run a profile's executed notebooks again on a copy and compare the checked cells [PROFILE=embedded]
	$(PYTHON) -m slimllm_nb.reproduce.check --profile "$(PROFILE)"

tune: setup ## train the pruned models of a run by LoRA, merge, save beside them; goes on where it stopped [PROFILE=embedded TUNE="--settings 20"]
	$(PYTHON) -m slimllm_nb.reproduce.tune --profile "$(PROFILE)" $(TUNE)

compare: setup ## compare methods at equal numbers of parameters [METHODS=slimllm,flap PROFILE=embedded SEEDS=5 COMPARE=--help]
	$(PYTHON) -m slimllm_nb.comparison --profile "$(PROFILE)" --methods "$(METHODS)" --seeds $(SEEDS) $(COMPARE)

ablations: setup ## the sweep of data/ablations/plan.yaml; goes on where it stopped [PROFILE=embedded SWEEP="--again GROUP" or SWEEP="--minutes 20"]
	$(PYTHON) -m slimllm_nb.comparison.ablations --profile "$(PROFILE)" $(SWEEP)

zeroshot: setup ## zero-shot accuracy on the full sets of questions [PROFILE=embedded]
	$(PYTHON) tools/zeroshot.py --profile "$(PROFILE)"

gguf: setup ## write CHECKPOINT.gguf of a run for llama.cpp [PROFILE=embedded CHECKPOINT=model QUANTIZE=q8_0 PRE_TOKENIZER=llama-bpe or none]
	$(PYTHON) tools/export.py gguf --profile "$(PROFILE)" $(if $(PRE_TOKENIZER),--pre-tokenizer "$(PRE_TOKENIZER)") $(if $(QUANTIZE),--quantize "$(QUANTIZE)") "$(CHECKPOINT)"

serve: setup ## serve CHECKPOINT of a run with vLLM [CHECKPOINT=model VLLM=vllm, or the Python that has it SERVE="--port 8000"]
	@exec $(PYTHON) tools/export.py serve --profile "$(PROFILE)" --vllm "$(VLLM)" "$(CHECKPOINT)" $(SERVE)

lab: setup ## open JupyterLab on the notebooks
	$(PYTHON) -m jupyterlab notebooks

notebooks: setup ## run the committed notebooks again, top to bottom, and save their outputs in place
	@for notebook in $(NOTEBOOKS)/*.ipynb; do \
		$(PYTHON) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False "$$notebook" || exit 1; \
	done

reference: setup ## keep the numbers of a run as those that tests and notebooks compare with [PROFILE=embedded]
	$(PYTHON) tools/reference.py --profile "$(PROFILE)"

bench: setup ## time and memory of pruning, beside what they cannot be below [PARTS=prune,layer,literal,growth]
	$(PYTHON) tools/bench.py $(if $(PARTS),--parts $(PARTS))

gpu: setup ## prove this machine's GPU, without the internet [PARTS=equal,embedded,notebooks,large,disk,speed,training]
	$(PYTHON) -m slimllm_nb.gpu $(if $(PARTS),--parts $(PARTS))

results: setup ## write the tables of docs/results.md from what data/ keeps
	$(PYTHON) tools/results.py

course: setup ## add what the assignments need to the environment
	@$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --require-hashes -r requirements-course.lock

sentencepiece: setup ## add what converting a SentencePiece tokenizer (Vicuna's) needs to the environment
	@$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --require-hashes -r requirements-sentencepiece.lock

site: setup ## build the book of notebooks, guides and docstrings in runs/site; executes nothing [SITE="-b linkcheck" checks its links]
	@$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --require-hashes -r requirements-site.lock
	$(PYTHON) -m sphinx $(SITE) -W --keep-going -q -c docs . runs/site
	@echo "Written: runs/site (index.html)"

# vLLM asks for another torch and transformers than the lock has: an environment of its own.
test-engines: setup ## test pruned models in vLLM and llama.cpp, in places of their own below runs (Linux, 3 GB; llama.cpp is compiled)
	@[ -d runs/vllm ] || $(PYTHON) -m uv venv --quiet --python $(PYTHON) runs/vllm
	@$(PYTHON) -m uv pip install --quiet --python runs/vllm/bin/python --no-deps --require-hashes -r requirements-vllm.lock
	@$(PYTHON) -m uv pip install --quiet --target runs/llama-cpp --require-hashes -r requirements-llama-cpp.lock
	SLIMLLM_NB_VLLM="$(CURDIR)/runs/vllm/bin/python" PYTHONPATH="$(CURDIR)/runs/llama-cpp" $(PYTHON) -m pytest tests/test_gguf_file.py tests/test_engines.py

assignments: course ## write the assignments' releases, solutions and autograder files to runs/course
	$(PYTHON) tools/course.py release

grade: course ## points for a folder of submitted notebooks [SUBMISSIONS=folder of notebooks, folders or zip files]
	$(PYTHON) tools/course.py grade $(if $(SUBMISSIONS),"$(SUBMISSIONS)")

lint: setup ## check style and formatting of code and notebooks
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

lock: setup ## write requirements.lock and environment.yml anew from pyproject.toml
	$(PYTHON) tools/lock.py

clean: ## remove runs/ and caches in this folder
	rm -rf runs build .pytest_cache .ruff_cache .hypothesis notebooks/.ipynb_checkpoints
	find slimllm_nb tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Kept: the environment (rm -rf .venv removes one made here) and the converted model, in the folder"
	@echo "SLIMLLM_NB_CACHE, or slimllm-nb in your user cache folder; it may be deleted at any time."
