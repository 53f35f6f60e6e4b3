# Everything a person types. Each target sets up .venv by itself.
PY := .venv/bin/python

# On a machine with a GPU the checks run on whatever Python holds PyTorch there, if nothing was installed; besides PyTorch
# they need numba, psutil, rich, tyro, pytest-timeout, and libturbojpeg.so.0 where the linker finds it.
GPU_PY := $(if $(wildcard .venv/ready),.venv/bin/python,python3)
KERNEL_TESTS := tests/kernels tests/losses

.PHONY: demo image test test-all test-gpu test-multinode gpu-day gpu-kit lint install clean

install: .venv/ready

.venv/ready: install.sh setup.py constraints.txt
	bash install.sh

# A small data set made here, converted, trained on, evaluated and reported; the last line is JSON.
demo: .venv/ready
	@PYTHON=$(PY) bash recipes/demo.sh

# The CPU image, built and tried, where there is an engine: docker, podman or buildah.
image:
	bash recipes/image.sh

# Tests that together take minutes, on two cores; with those that take more than 20 seconds each, it is test-all.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal
test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST) -rs --durations=25

# The kernels' tests in every dtype, then all other tests that need a GPU.
test-gpu:
	$(GPU_PY) -m pytest $(KERNEL_TESTS)
	$(GPU_PY) -m pytest -m gpu $(KERNEL_TESTS:%=--ignore=%)

# All that a GPU is asked, in less than ten minutes, into OUT: is it right, how fast, and the tests that then fit. A machine
# without network has what it lacks from gpu-kit/, which is made elsewhere: make gpu-kit [PHOTOS=folder] [CIFAR=folder].
OUT ?= runs/gpu-day
gpu-day:
	PYTHONPATH=$(CURDIR)/gpu-kit/site$${PYTHONPATH:+:$$PYTHONPATH} \
	LD_LIBRARY_PATH=$(CURDIR)/gpu-kit/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
	$(GPU_PY) benchmarks/gpu_day.py --out $(OUT)

gpu-kit: .venv/ready
	PYTHON=$(PY) bash recipes/gpu-kit.sh "$(PHOTOS)" "$(CIFAR)"

# Training on two machines, and the death and return of one: two network namespaces. Part of `make test-all`.
test-multinode: .venv/ready
	$(PY) -m pytest tests/run/test_multinode.py -rs

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/shellcheck install.sh .ci/run recipes/*.sh recipes/slurm.sbatch
	.venv/bin/yamllint --strict compose.yaml recipes/kubernetes.yaml
	[ ! -x .venv/bin/hadolint ] || .venv/bin/hadolint Dockerfile

clean:
	rm -rf .venv data/demo data/demo-shards runs/demo
