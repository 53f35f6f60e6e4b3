"""The options of the step, and of the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fasttrain.system.errors import UserError
from fasttrain.system.options import Bounds, Fraction, Free, NotNegative, Options, Positive, With

BASE_BATCH = 256  # images, for which --lr is given
_USUAL = {"decay": "auto", "weight_decay_end": None, "vector_lr": 1.0, "trust": 1e-3, "trust_clip": False}
# Peak learning rate at BASE_BATCH and weight decay: MoCo's, MoCo v3's for its ResNet and its ViT, apex's own. What a
# method's paper sets for its own optimizer is not for another.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.03, "weight_decay": 1e-4, **_USUAL},
    "lars": {"lr": 0.6, "weight_decay": 1e-6, **_USUAL},
    "adamw": {"lr": 1.5e-4, "weight_decay": 0.1, **_USUAL},
    "lamb": {"lr": 1e-3, "weight_decay": 0.01, **_USUAL},
}


def warmup_that_fits(warmup_epochs: float, epochs: int) -> float:
    """A warm-up that is meant for longer schedules is a tenth of this one."""
    return epochs / 10 if epochs <= warmup_epochs else warmup_epochs


@dataclass(frozen=True)
class OptimisationOptions(Options):
    """The step: batch, optimizer, schedule, precision."""

    epochs: Positive[int] = 200
    """Length of the learning-rate schedule in passes over the data."""
    batch_size: Positive[int] = 256
    """Images a step, over all processes."""
    accumulate: Positive[int] = 1
    """Micro-batches a process's share of the batch is cut into, for memory. Batch norm and regularisers over the batch
    then see one micro-batch, a queue takes the keys of all after the step. Not for losses over the batch."""
    optimizer: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """lars and lamb for batches of thousands, adamw for vision transformers. Another one than the method's sets --lr
    and --weight-decay: sgd 0.03 and 1e-4, lars 0.6 and 1e-6, adamw 1.5e-4 and 0.1, lamb 1e-3 and 0.01. The method's
    --decay, --weight-decay-end, --vector-lr, --trust and --trust-clip are then not used."""
    lr: Positive[float] = 0.03
    """Peak learning rate per 256 images: it is scaled in proportion to --batch-size, and falls along a cosine."""
    weight_decay: NotNegative[float] = 1e-4
    """Weight decay; --decay says of what."""
    decay: Literal["auto", "all", "matrices"] = "auto"
    """What weight decay is for: all parameters, or matrices and kernels alone. auto: all with sgd, else matrices."""
    weight_decay_end: NotNegative[float | None] = None
    """Weight decay at the end, which it reaches along a cosine. None: the same throughout."""
    trust: Annotated[Positive[float], With("optimizer", ("lars",))] = 1e-3
    """Of lars: length of a step of learning rate 1, relative to the norm of the weights."""
    trust_clip: Annotated[bool, With("optimizer", ("lars",))] = False
    """Of lars: let --trust only lower the learning rate (LARC)."""
    vector_lr: Positive[float] = 1.0
    """Learning rate of biases and norms, as a multiple of --lr."""
    final_lr: Fraction[float] = 0.0
    """What the learning rate falls to, as a part of its peak."""
    warmup_epochs: NotNegative[float] = 0.0
    """Epochs of linear learning-rate warm-up."""
    clip_norm: NotNegative[float] = 0.0
    """Gradients of a larger norm are scaled down to this. 0: never."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16, fp16: autocast, weights and losses stay in fp32; fp16 scales the loss so that small gradients survive.
    auto: bf16 where the machine multiplies in it, else fp16 on a GPU and fp32 on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs} leaves nothing of --epochs {self.epochs}")

    @property
    def peak_lr(self) -> float:
        """The learning rate that warm-up ends with, at this batch size."""
        return self.lr * self.batch_size / BASE_BATCH


@dataclass(frozen=True)
class MachineOptions(Options):
    """What the machine decides: results do not depend on it."""

    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: a GPU when there is one."""
    workers: Free[Annotated[int | Literal["auto"], Bounds(1)]] = "auto"
    """Decoding threads of each process. auto: the cores this process may use, shared by the machine's processes."""
    compile: Free[Literal["auto", "on", "off"]] = "auto"
    """torch.compile the networks: a minute or more at the start, faster steps. auto: on a GPU; a CPU gains nothing."""
    cuda_graph: Free[bool] = False
    """Also replay the compiled networks as CUDA graphs, for steps that are bound by launches."""
    checkpoint_activations: Free[bool] = False
    """Keep only the inputs of the encoder's stages, compute the rest again in backward: less memory, a fifth slower."""
