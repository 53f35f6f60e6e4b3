"""Every option of training, its default, and the presets."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Literal

from fasttrain.system.cli import check_workers
from fasttrain.system.errors import UserError

# Options that do not change what is computed: a run may be continued with other values of these.
FREE_OPTIONS = [
    "data", "run", "preset", "loader", "workers", "max_failed_fraction", "device", "max_steps", "checkpoint_every",
    "keep_last", "log_every", "tensorboard", "fresh", "knn_every", "compile", "cuda_graph", "checkpoint_activations",
]  # fmt: skip
ABOVE_ZERO = [
    "epochs", "batch_size", "size", "dim", "queue_size", "checkpoint_every", "log_every", "lr", "temperature",
    "cross_temperature", "uniform_temperature", "accumulate",
]  # fmt: skip
NOT_NEGATIVE = [
    "max_steps", "weight_decay", "warmup_epochs", "cross_weight", "uniform_weight", "keep_last", "seed",
    "clip_norm", "knn_every",
]  # fmt: skip
# Peak learning rate at a batch of 256 and weight decay: MoCo's, MoCo v3's for its ResNet and its ViT, apex's own.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {}, "lars": {"lr": 0.6, "weight_decay": 1e-6}, "adamw": {"lr": 1.5e-4, "weight_decay": 0.1},
    "lamb": {"lr": 1e-3, "weight_decay": 0.01},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Pre-train an image encoder with MoCo or XMoCo.

    The same command on an existing run folder continues from its newest good checkpoint. Exit status: 0 done; stopped
    by a signal after writing a checkpoint: 143 SIGTERM, 138 SIGUSR1, 130 SIGINT; 2 bad input; 1 anything else.
    """

    data: str
    """Converted data set (a folder with manifest.json), or a folder of image files."""
    run: str = ""
    """Run folder for checkpoints, metrics and report; a job that may be started again needs it. Empty:
    runs/<method>-<time>."""
    preset: Literal["imagenet", "cifar10", "demo"] = "imagenet"
    """Defaults for all other options: MoCo v2 on ImageNet, MoCo's CIFAR-10 recipe, or a few minutes on a laptop."""
    method: str = "xmoco"
    """moco (v2) or xmoco (moco plus cross-similarity consistency and uniform-similarity regularisation)."""
    arch: str = "resnet50"
    """Encoder: 'small' (ours, trains well on two CPU cores) or any torchvision classification model's name."""
    cifar_stem: bool = False
    """For torchvision ResNets: 3x3 stride-1 first convolution and no max-pool, for images of about 32 px."""
    epochs: int = 200
    """Length of the learning-rate schedule in passes over the data."""
    max_steps: int = 0
    """Stop after this many steps, with a checkpoint; the schedule does not change. 0: no limit."""
    batch_size: int = 256
    """Images a step, over all processes."""
    seed: int = 0
    """Sets weights, order, views and everything else that is drawn."""

    loader: Literal["auto", "ffcv", "dali", "folder", "resident"] = "auto"
    """auto decodes shards or plain image files, whichever --data is; ffcv insists on shards, folder on plain files;
    dali decodes JPEG shards by NVIDIA DALI; resident decodes either once and keeps all of it in memory."""
    workers: int | Literal["auto"] = "auto"
    """Decoding threads of each process. auto: the cores this process may use, shared by the machine's processes."""
    max_failed_fraction: float = 0.01
    """Training stops when more than this part of the images (and more than 10) can't be decoded."""
    recipe: Literal["mocov1", "mocov2", "mocov3", "cifar"] = "mocov2"
    """Augmentation recipe of the two views."""
    size: int = 224
    """Side of a view in pixels, in training and evaluation."""
    resolution: str = ""
    """Views that grow, such as 128:224: their side at first, and the --size that they reach after three quarters of the
    epochs. Empty: --size throughout."""

    optimizer: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """lars for batches of thousands, adamw for vision transformers, lamb by NVIDIA's apex. Each sets defaults for --lr
    and --weight-decay: lars 0.6 and 1e-6, adamw 1.5e-4 and 0.1, lamb 1e-3 and 0.01."""
    lr: float = 0.03
    """Peak learning rate at this batch size (defaults are for 256; scale in proportion); falls to 0 along a cosine."""
    weight_decay: float = 1e-4
    """Weight decay; all optimizers but sgd leave biases and norms without."""
    accumulate: int = 1
    """Micro-batches a process's share of the batch is cut into, for memory. Batch norm and the loss's batch terms then
    see one micro-batch; the queue takes the keys of all after the step."""
    clip_norm: float = 0.0
    """Gradients of a larger norm are scaled down to this. 0: never."""
    warmup_epochs: float = 0.0
    """Epochs of linear learning-rate warm-up."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16, fp16: autocast, weights and losses stay in fp32; fp16 scales the loss so that small gradients survive."""
    batch_norm: Literal["split", "sync", "plain"] = "split"
    """split: statistics over groups of 32 images, keys shuffled between groups; sync: over all processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the networks: a minute or more at the start, faster steps. auto: on a GPU; a CPU gains nothing."""
    cuda_graph: bool = False
    """Also replay the compiled networks as CUDA graphs, for steps that are bound by launches."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the encoder's stages, compute the rest again in backward: less memory, a fifth slower."""

    dim: int = 128
    """Width of queries and keys."""
    head: Literal["mlp", "linear"] = "mlp"
    """Projection head: one hidden layer as wide as the features (MoCo v2), or linear (MoCo v1)."""
    queue_size: int = 65536
    """Keys kept as negatives."""
    ema: float = 0.999
    """Momentum of the key encoder."""
    temperature: float = 0.2
    """Temperature of InfoNCE."""

    decoupled: bool = False
    """Leave a query's own key out of InfoNCE's denominator: the decoupled contrastive loss (arXiv 2110.06848)."""

    cross: Literal["batch", "queue", "none"] = "batch"
    """xmoco: keep similarities between views over the batch's pairs, or each image's similarities to the queue."""
    cross_weight: float = 1.0
    """xmoco: weight of that consistency."""
    cross_temperature: float = 0.2
    """xmoco: temperature of the distributions compared by --cross queue."""
    uniform: Literal["batch", "queue", "none"] = "batch"
    """xmoco: which negatives' similarities should be uniform."""
    uniform_weight: float = 0.1
    """xmoco: weight of that uniformity."""
    uniform_temperature: float = 0.2
    """xmoco: temperature of the distribution that should be uniform."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end and on SIGTERM, SIGUSR1 or SIGINT."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted once a newer one is safely on disk. 0: keep all."""
    knn_every: int = 0
    """Epochs between evaluations by kNN on the val split; the best is kept as checkpoints/best.pt. 0: never."""
    log_every: int = 20
    """Steps between entries of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard."""
    fresh: bool = False
    """Start over: an existing run folder is moved aside first, once in a job: not when it is restarted."""

    @property
    def start_size(self) -> int:
        """Side of the first epoch's views."""
        return _sides(self.resolution)[0] if self.resolution else self.size


PRESETS: dict[str, dict] = {
    "imagenet": {},
    # MoCo's own CIFAR-10 notebook
    "cifar10": {
        "arch": "resnet18", "cifar_stem": True, "batch_size": 512, "lr": 0.06, "weight_decay": 5e-4,
        "queue_size": 4096, "ema": 0.99, "temperature": 0.1, "recipe": "cifar", "size": 32, "head": "linear",
    },
    "demo": {
        "arch": "small", "batch_size": 128, "epochs": 24, "lr": 0.06, "weight_decay": 5e-4, "queue_size": 2048,
        "ema": 0.99, "temperature": 0.1, "size": 32, "checkpoint_every": 200, "log_every": 10,
    },
}  # fmt: skip


def parse_config(argv: list[str]) -> TrainConfig:
    """Read the command line; --preset, then --optimizer, replace defaults first. Raises SystemExit and UserError."""
    import tyro

    from fasttrain.system.cli import parse

    words = [word for argument in argv for word in argument.split("=", 1)]
    preset, optimizer = (
        words[words.index(name) + 1] if name in words[:-1] else "" for name in ("--preset", "--optimizer")
    )
    defaults = TrainConfig(data=tyro.MISSING, **{**PRESETS.get(preset, {}), **OPTIMIZERS.get(optimizer, {})})
    config = parse(TrainConfig, argv, defaults)
    if config.resolution:
        final = _sides(config.resolution)[1]
        if config.size not in (defaults.size, final):
            raise UserError(
                f"--resolution {config.resolution} ends with views of {final} px, --size {config.size} is another"
            )
        config = dataclasses.replace(config, size=final)
    check(config)
    return config


def _sides(resolution: str) -> tuple[int, int]:
    """First and final side of a --resolution."""
    found = re.fullmatch(r"(\d+):(\d+)", resolution)
    if not found or not 0 < int(found[1]) <= int(found[2]):
        raise UserError(f"--resolution {resolution!r} is not two sides of views such as 128:224, the smaller first")
    return int(found[1]), int(found[2])


def check(config: TrainConfig) -> None:
    """Raise UserError, one line, for values that no run could use."""
    for name in ABOVE_ZERO:
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, not {getattr(config, name)}")
    check_workers(config.workers)
    if not 0 <= config.ema < 1:
        raise UserError(f"--ema must be at least 0 and below 1, not {config.ema}")
    if not 0 <= config.max_failed_fraction <= 1:
        raise UserError(f"--max-failed-fraction must lie between 0 and 1, not {config.max_failed_fraction}")
    if config.warmup_epochs >= config.epochs:
        raise UserError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}")


def as_dict(config: TrainConfig) -> dict:
    return dataclasses.asdict(config)


def load_config(run: pathlib.Path) -> TrainConfig:
    """The configuration a run folder was made with. Raises UserError when it is none."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder (no config.json)")
    try:
        return TrainConfig(**json.loads(path.read_text())["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} can't be read as a run's configuration: {error}") from None


def differences(saved: dict, config: TrainConfig) -> list[str]:
    """'--name was X, now Y' for every option that changes what is computed."""
    now = as_dict(config)
    return [
        f"--{name.replace('_', '-')} was {saved.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name not in FREE_OPTIONS and saved.get(name) != value
    ]
