# Everything a person types. Each target sets up .venv by itself.
PY := .venv/bin/python

.PHONY: demo test test-multinode lint install clean

install: .venv/ready

.venv/ready: install.sh setup.py constraints.txt
	bash install.sh

# A small data set made here, converted, trained on, evaluated and reported; the last line is JSON.
demo: .venv/ready
	@PYTHON=$(PY) bash runs/demo.sh

test: .venv/ready
	$(PY) -m pytest

# Training on two machines, and the death and return of one: two network namespaces. Part of `make test` as well.
test-multinode: .venv/ready
	$(PY) -m pytest tests/test_multinode.py -rs

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/shellcheck install.sh .ci/run runs/*.sh runs/slurm.sbatch
	.venv/bin/yamllint --strict compose.yaml runs/kubernetes.yaml
	[ ! -x .venv/bin/hadolint ] || .venv/bin/hadolint Dockerfile

clean:
	rm -rf .venv data/demo data/demo-shards runs/demo
