"""The options of a run as such, and of what it writes about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fasttrain.system.options import Free, Growing, NotNegative, Options, Positive, With


@dataclass(frozen=True)
class RunOptions(Options):
    """Which run, how it begins and what it keeps."""

    run: Free[str] = ""
    """Run folder for checkpoints, metrics and report, also given by place; a job that may be started again needs it.
    Empty: runs/<method>-<time>."""
    method: str = "xmoco"
    """What is trained; --help with it explains it and lists its options. package.module:Class is one of your own."""
    preset: Free[Literal["imagenet", "imagenet100", "stl10", "cifar10", "demo"]] = "imagenet"
    """Defaults for all other options: the method's paper's on ImageNet, recipes for smaller sets of images, or a few
    minutes on a laptop."""
    config: Free[str] = ""
    """Start from the settings of a RUN/config.json; what is typed counts more."""
    seed: NotNegative[int] = 0
    """Sets weights, order, views and everything else that is drawn."""
    extend: Growing[Positive[tuple[int, ...]]] = ()
    """Epochs by which a finished run is extended: a new schedule (warm-up, cosine) of that many, from its last weights,
    queue and optimizer. Several: one after the other."""
    max_steps: Free[NotNegative[int]] = 0
    """Stop after this many steps, with a checkpoint; the schedule does not change. 0: no limit."""
    fresh: Free[bool] = False
    """Start over: an existing run folder is moved aside first, once in a job: not when it is restarted."""
    checkpoint_every: Free[Positive[int]] = 1000
    """Steps between checkpoints; one is always written at the end and on SIGTERM, SIGUSR1, SIGHUP or SIGINT."""
    keep_last: Free[NotNegative[int]] = 3
    """Checkpoints kept; older ones are deleted once a newer one is safely on disk. 0: keep all."""


@dataclass(frozen=True)
class LoggingOptions(Options):
    """What is told about the run while it lasts."""

    log_every: Free[Positive[int]] = 20
    """Steps between entries of metrics.jsonl."""
    tensorboard: Free[bool] = False
    """Also write TensorBoard events to RUN/tensorboard."""
    wandb: Free[bool] = False
    """Also tell Weights & Biases, by its own variables: WANDB_PROJECT, WANDB_MODE (offline: to RUN/wandb), …"""
    mlflow: Free[bool] = False
    """Also tell MLflow, by its own variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, …"""
    knn_every: Free[NotNegative[int]] = 0
    """Epochs between evaluations by kNN on the val split; the best is kept as checkpoints/best.pt. 0: never."""
    knn_k: Annotated[Free[NotNegative[int]], With("knn_every")] = 0
    """Neighbours in these. 0: a sixth of the mean number of a class's images, 5 to 200."""
    health_every: Free[NotNegative[int | Literal["auto"]]] = "auto"
    """Steps between looks at the representation, of a fixed subset: ranks, spread, alignment, uniformity, similarities,
    kNN. auto: as often as takes about 1 % of the time, not at all in the shortest runs. 0: never."""
    lidar: Annotated[Free[bool], With("health_every")] = False
    """LiDAR and compactness, too, which need more views of each image."""
    online_probe: Annotated[Free[bool], With("health_every")] = False
    """Train a linear classifier on the encoder's detached features at every step; its accuracy is measured at
    --health-every. Needs labels, and leaves training as it is."""
    stop_on_collapse: Annotated[Free[bool], With("health_every")] = False
    """End the run, after a checkpoint and with status 1, once --health-every finds that the representation has
    collapsed; else a line says so."""
