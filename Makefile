# One command renders (make demo), one passes the tests (make test); both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
# On a GPU machine: make install EXTRAS=gpu,wan,dev (flashinfer, faiss-gpu, flash-attn; text encoder and VAE of Wan).
EXTRAS ?= cpu,dev
# Without a GPU the CPU build of torch is enough; a pip that is already told where to find one is left alone.
CPU_INDEX := $(shell command -v nvidia-smi >/dev/null 2>&1 || [ -n "$$PIP_FIND_LINKS" ] || echo --extra-index-url https://download.pytorch.org/whl/cpu)

comma := ,

.PHONY: install demo test test-slow lint types clean

install: $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

$(VENV)/.installed-%: pyproject.toml constraints/ci.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Longtake needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make install PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints/ci.txt $(CPU_INDEX) -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	@$(BIN)/longtake render jobs/samples/prompts.jsonl --out $(OUT) --job-id demo

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy

# One file, one worker: what its tests share is made once. Types are checked meanwhile; either may fail.
test: lint
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"; tests=$$?; \
	wait $$types && exit $$tests

# Those that stand alone come first, each with the whole machine; then the others as in `test`. Either may fail.
test-slow: install
	@$(BIN)/python -m pytest -m "slow and alone and not gpu"; alone=$$?; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not alone and not gpu" \
	&& exit $$alone

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
