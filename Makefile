# Everything a person types. Each target sets up .venv by itself.
PY := .venv/bin/python

.PHONY: demo test lint install clean

install: .venv/ready

.venv/ready: install.sh setup.py constraints.txt
	bash install.sh

# A small data set made here, converted, trained on, evaluated and reported; the last line is JSON.
demo: .venv/ready
	@PYTHON=$(PY) bash runs/demo.sh

test: .venv/ready
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv data/demo data/demo-shards runs/demo
