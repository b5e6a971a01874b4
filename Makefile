# make train: pretrains the default model.   make test: ruff and pytest.
# Both make .venv first, on a machine that has Python 3.11 or 3.12, pip, venv and gcc.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin

.PHONY: train test clean

train: .venv/ready
	$(BIN)/python train.py $(ARGS)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

.venv/ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or say make PYTHON=/path/of/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(shell sed -n 's/^torch==//p' requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache build
