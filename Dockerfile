# Two images from the same install script that `make` runs (compose.yaml builds and starts them on one machine):
#     docker build --target cpu -t fasttrain:cpu .
#     docker build --target gpu -t fasttrain:gpu --build-arg GPU_BASE=<image> .
# GPU_BASE: NVIDIA's PyTorch container image, of the release that fits your driver. Its PyTorch, apex and DALI are used.
# Both run as a user of their own, 10001, and as any other that --user or runAsUser names.
ARG GPU_BASE=give-nvidias-pytorch-image-as-gpu-base

FROM ${GPU_BASE} AS gpu
WORKDIR /opt/fasttrain
COPY install.sh setup.py pyproject.toml constraints.txt README.md ./
COPY dataprep dataprep
COPY fasttrain fasttrain
COPY kernels kernels
COPY recipes recipes
RUN BASE_PACKAGES=1 EXTRAS=ffcv,parquet,remote,tensorboard,timm,export bash install.sh && rm -rf /root/.cache /var/lib/apt/lists/* \
    && chmod -R a+rX . && useradd --no-log-init --create-home --uid 10001 fasttrain && mkdir -m 1777 /work
ENV PATH="/opt/fasttrain/.venv/bin:$PATH"
USER 10001
WORKDIR /work
CMD ["bash", "/opt/fasttrain/recipes/torchrun.sh", "--help"]

# On x86-64 PyPI's torch does not start without most of the CUDA libraries that it brings: 2 GB of 5. What it starts
# without is removed. An index of PyTorch's wheels for the CPU leaves out all of it: --build-arg
# PIP_EXTRA_INDEX_URL=<address>. On aarch64 it is not there anyway. FFCV's own loader is left out: nothing here needs it.
FROM python:3.11-slim-bookworm AS cpu
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/fasttrain
COPY install.sh setup.py pyproject.toml constraints.txt README.md ./
COPY dataprep dataprep
COPY fasttrain fasttrain
COPY kernels kernels
COPY recipes recipes
RUN EXTRAS=parquet,remote,tensorboard,timm bash install.sh && .venv/bin/pip uninstall -q -y triton \
    && rm -rf .venv/lib/python3*/site-packages/nvidia/cudnn/lib/libcudnn_* /root/.cache /var/lib/apt/lists/* \
    && chmod -R a+rX . && useradd --no-log-init --create-home --uid 10001 fasttrain && mkdir -m 1777 /work
ENV PATH="/opt/fasttrain/.venv/bin:$PATH"
USER 10001
WORKDIR /work
CMD ["bash", "/opt/fasttrain/recipes/torchrun.sh", "--help"]
