"""The options of the commands that work on a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fasttrain.evaluation.options import FewShotOptions, KnnOptions, LinearOptions, OverImagesOptions
from fasttrain.input.options import CacheOptions
from fasttrain.system.options import Bounds, Options, Positive


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Evaluate the newest checkpoint of a run, or of several, by the protocols of the papers.

    Features of the data set's train split are learned from; its val split is classified. Without a protocol, kNN and a
    linear classifier are done. Of several runs, means and standard deviations are printed. The same command goes on
    after an interruption. The last line of the output is JSON. Exit status: 0 done, 2 bad input, 1 anything else.
    """

    run: tuple[str, ...]
    """Run folders; by place, or by --run."""
    knn: KnnOptions = field(default_factory=KnnOptions)
    """Weighted k-nearest-neighbour classification"""
    linear: LinearOptions = field(default_factory=LinearOptions)
    """A linear classifier on frozen features"""
    few_shot: FewShotOptions = field(default_factory=FewShotOptions)
    """A classifier from a few images of each class"""
    over_images: OverImagesOptions = field(default_factory=OverImagesOptions)
    """Classifiers that are trained on images"""
    data: str = ""
    """Labelled data set with train and val splits, or its URL. Empty: the one each run was trained on, where it lay
    then."""
    transfer: tuple[str, ...] = ()
    """Further data sets, on each of which the same is done."""
    method: str = ""
    """Only of a run whose method is from outside: that, package.module:Class, once more. What a run folder says is not
    enough to run code."""
    arch: str = ""
    """Likewise, of a run whose encoder is from outside: package.module:function."""
    features: Literal["encoder", "projection"] = "encoder"
    """What is compared: the encoder's output, or the projection head's (as MoCo's CIFAR-10 notebook does)."""
    best: bool = False
    """Evaluate checkpoints/best.pt, the best by training's --knn-every, instead of the newest checkpoint."""
    untrained: bool = False
    """Also evaluate the same network with the weights it started from; those figures end in _untrained."""
    batch_size: Positive[int] = 256
    """Images a step."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Decoding threads. auto: every core this process may use."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""
    elsewhere: CacheOptions = field(default_factory=CacheOptions)
    """Data sets behind a URL"""


@dataclass(frozen=True)
class EmbedConfig(Options):
    """Write the features that a run's encoder gives of images, in the images' order.

    OUT.npy is fp32, a row an image, with OUT.tsv (name, split, label, class) and OUT.json (where all of it comes from)
    beside it; OUT.parquet holds all three. Images that can't be read are left out, named and counted. The same command
    continues after an interruption. The last line of the output is JSON. Exit status: 0 done, 3 done without some
    images, 2 bad input, 1 anything else.
    """

    run: str
    """Run folder; by place, or by --run."""
    images: str
    """Folder of images, converted data set or its URL, or FFCV's .beton file or a folder of them."""
    out: str
    """File to write, ending in .npy or .parquet."""
    split: Literal["all", "train", "val"] = "all"
    """all: every split that is there, train first."""
    layer: str = ""
    """Empty: the encoder's output. projection: the projection head's. Or the name of a module in the encoder, such as
    layer3: maps are averaged over positions, of tokens the class token is taken."""
    normalize: bool = False
    """Scale every row to length 1."""
    best: bool = False
    """By checkpoints/best.pt, the best by training's --knn-every, instead of the newest checkpoint."""
    checkpoint: str = ""
    """By this checkpoint of the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: faster where the machine multiplies in it; three digits of each number remain."""
    method: str = ""
    """Only of a run whose method is from outside: that, package.module:Class, once more."""
    arch: str = ""
    """Likewise, of a run whose encoder is from outside: package.module:function."""
    batch_size: Positive[int] = 256
    """Images a step."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Decoding threads. auto: every core this process may use."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""
    elsewhere: CacheOptions = field(default_factory=CacheOptions)
    """Data sets behind a URL"""


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html: figures, curves, samples and settings on one self-contained page. Of several runs, write
    one page that compares them instead.

    The last line of the output is JSON: the run's figures, or those of each run, and the page's path.
    """

    run: tuple[str, ...]
    """Run folder, or several; by place, or by --run."""
    out: str = ""
    """Of several runs: the page to write. Empty: comparison.html in the folder that the first run lies in. Only an
    earlier comparison is replaced."""


@dataclass(frozen=True)
class RunsConfig(Options):
    """List the runs under a folder: what was trained on what, how far each is, what it reached, how it ended.

    Damaged runs are listed with what is wrong. What is not known is "–" in the table, and null in JSON.
    """

    folder: str = "runs"
    """Where runs are looked for, at any depth; by place, or by --folder. Links are not followed."""
    sort: Literal[
        "when", "run", "method", "arch", "data", "step", "epochs", "knn", "linear", "loss", "images_per_sec", "state"
    ] = "when"
    """Column to sort by: names from a to z, loss from the lowest, other figures from the highest, when from the
    newest."""
    json: bool = False
    """Instead of a table, one line of JSON that tells more: {"runs": [{"run": …, "state": …, "knn_top1": …}, …]}."""


@dataclass(frozen=True)
class ExportConfig(Options):
    """Write a run's encoder for another library, read it by that library, and compare features of the run's images.

    Nothing is left under the file's name unless they agree to 1e-5 of their norm. How images are prepared lies beside
    it as JSON. The last line of the output is JSON. Exit status: 0 done, 2 bad input, 1 anything else.
    """

    run: str
    """Run folder; by place, or by --run."""
    file: str
    """What is written: a file, or for timm and hf a folder. Only an earlier export is replaced."""
    to: Literal["torchvision", "timm", "safetensors", "onnx", "detectron2", "hf"] = "safetensors"
    """torchvision: a state dict; timm: a folder for timm.create_model("local-dir:…"); hf: the same for transformers;
    detectron2: a pickle for ResNets. safetensors and onnx take every encoder."""
    best: bool = False
    """Export checkpoints/best.pt, the best by training's --knn-every, instead of the newest checkpoint."""
    data: str = ""
    """Where images of the run are now, if they have moved: any data set will do."""
    method: str = ""
    """Only of a run whose method is from outside: that, package.module:Class, once more."""
    arch: str = ""
    """Likewise, of a run whose encoder is from outside: package.module:function."""
