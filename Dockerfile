# Two images from the same install script that `make` runs (compose.yaml builds and starts them on one machine):
#     docker build --target cpu -t fasttrain:cpu .
#     docker build --target gpu -t fasttrain:gpu --build-arg GPU_BASE=<image> .
# GPU_BASE: NVIDIA's PyTorch container image, of the release that fits your driver. Its PyTorch, apex and DALI are used.
ARG GPU_BASE=give-nvidias-pytorch-image-as-gpu-base

FROM ${GPU_BASE} AS gpu
WORKDIR /opt/fasttrain
COPY install.sh setup.py pyproject.toml constraints.txt README.md ./
COPY dataprep dataprep
COPY fasttrain fasttrain
COPY kernels kernels
COPY recipes recipes
RUN BASE_PACKAGES=1 EXTRAS=ffcv,parquet,tensorboard bash install.sh && rm -rf /root/.cache /var/lib/apt/lists/*
ENV PATH="/opt/fasttrain/.venv/bin:$PATH"
CMD ["bash", "recipes/torchrun.sh", "--help"]

FROM python:3.11-slim-bookworm AS cpu
WORKDIR /opt/fasttrain
COPY install.sh setup.py pyproject.toml constraints.txt README.md ./
COPY dataprep dataprep
COPY fasttrain fasttrain
COPY kernels kernels
COPY recipes recipes
RUN EXTRAS=ffcv,parquet,tensorboard bash install.sh && rm -rf /root/.cache /var/lib/apt/lists/*
ENV PATH="/opt/fasttrain/.venv/bin:$PATH"
CMD ["bash", "recipes/torchrun.sh", "--help"]
