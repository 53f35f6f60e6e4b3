# The slim CPU image: the same install script as `make`.
#     docker build -t fasttrain . && docker run --rm -v "$PWD/data:/data" fasttrain python fasttrain/train.py --data /data/shards
FROM python:3.11-slim-bookworm
WORKDIR /opt/fasttrain
COPY install.sh setup.py pyproject.toml constraints.txt README.md ./
COPY dataprep dataprep
COPY fasttrain fasttrain
COPY kernels kernels
COPY runs runs
RUN EXTRAS=ffcv,tensorboard bash install.sh && rm -rf /root/.cache /var/lib/apt/lists/*
ENV PATH="/opt/fasttrain/.venv/bin:$PATH"
CMD ["python", "fasttrain/train.py", "--help"]
