# `make train` and `make test` set everything up by themselves, in .venv (Python 3.10 or newer is all they need), from any
# folder: `make -C path/to/this test`. `make train` trains the embedded model, with or without a GPU.
MAKEFLAGS += --no-print-directory  # so that the last line of `make -C ... test` is pytest's
PYTHON ?= python3
ARGS ?=
# One process a core, with one thread each. A file stays in one process, which makes its fixtures once; the longest
# start first, so that none is left over at the end.
WORKERS ?= logical
LONGEST = tests/test_distributed.py tests/test_faults.py tests/test_walkthrough.py tests/test_main.py \
	tests/test_distill.py tests/test_token_analysis.py

.PHONY: train test lint clean

train: .venv/.installed
	.venv/bin/python main.py --preset tiny $(ARGS)

test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -rs -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		$(LONGEST) tests test_soft_thinking.py

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
