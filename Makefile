# `make train` and `make test` set everything up by themselves, in .venv (Python 3.10 or newer is all they need).
PYTHON ?= python3
ARGS ?=
LONGEST = tests/test_walkthrough.py tests/test_processes.py tests/test_faults.py  # first, so that none is left over

.PHONY: train test lint clean

train: .venv/.installed
	.venv/bin/python main.py $(ARGS)

test: .venv/.installed-dev lint
	.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(LONGEST) tests test_soft_thinking.py

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

clean:
	rm -rf .venv
