"""A method's networks as they are run: built from the options, compiled, and laid out for their device."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import torch
from torch import Tensor

from fasttrain.engine.options import MachineOptions, OptimisationOptions
from fasttrain.engine.precision import DTYPES
from fasttrain.methods import Method, MethodOptions
from fasttrain.networks.anchor import Anchor
from fasttrain.networks.batch_norm import convert_batch_norm, is_synchronised
from fasttrain.networks.convolution import convert_convolutions
from fasttrain.networks.encoders import WrongSize, check_sides, make_encoder, named, sizes_near, takes
from fasttrain.networks.options import EncoderOptions
from fasttrain.networks.queue import Queue
from fasttrain.networks.recompute import checkpoint_activations
from fasttrain.system.errors import UserError
from fasttrain.views.options import ViewOptions
from fasttrain.views.spec import Recipe, sides


def make_method(method: MethodOptions, encoder: EncoderOptions, size: int, seed: int) -> Method:
    """The method around its encoder, for views of a size, with the weights that the seed gives.

    Batch norm is of the kind that is asked for everywhere, in the method's heads, too.
    Raises UserError for an encoder that can't be.
    """
    torch.manual_seed(seed)
    network, width = make_encoder(encoder, size)
    kind = encoder.batch_norm, encoder.batch_norm_groups
    return convert_batch_norm(method.build(convert_batch_norm(network, *kind), width), *kind)  # type: ignore[return-value]


def make_networks(
    method: MethodOptions, encoder: EncoderOptions, views: ViewOptions, optimisation: OptimisationOptions,
    machine: MachineOptions, device: torch.device, seed: int,
) -> Method:  # fmt: skip
    """The method for training: on its device, its networks as the options have them run. Raises UserError."""
    built = make_method(method, encoder, views.size, seed)
    for size in sorted({views.size_at(epoch, optimisation.epochs) for epoch in range(optimisation.epochs)}):
        _check_sides(built, encoder, views, views.recipe_for(method.all_views), size)
    if machine.checkpoint_activations:
        for name in built.encoders:
            checkpoint_activations(built.get_submodule(name))
    compile_networks(built, machine, device, optimisation.accumulate)
    return laid_out(built, device, optimisation.precision)


def _check_sides(built: Method, encoder: EncoderOptions, views: ViewOptions, recipe: Recipe, size: int) -> None:
    """Raises UserError, with sizes that do, where the encoder can't take an epoch's views, small crops among them."""
    try:
        check_sides(built.encoder, encoder.arch, views.size, sorted(set(sides(recipe, size)) - {views.size}))
    except WrongSize as error:
        final = size == views.size
        near = sizes_near(size, lambda n: takes(encoder, n if final else views.size, sides(recipe, n)))
        whose = "these are small crops of --size" if final else "--resolution comes to views of"
        raise UserError(f"{error}; {whose} {size}, where {named(near)}") from error


@torch.no_grad()
def initialise(method: Method, weights: Mapping[str, Tensor], anchor: bool = False) -> None:
    """Give weights, by the encoder's names, to the encoder and to every copy of it that the method keeps, but for an
    anchor, whose weights are others. anchor: to that alone.

    After it was built: some methods set weights of their own then.
    """
    names = method.encoder.state_dict().keys()
    anchors = [module.encoder for module in method.modules() if isinstance(module, Anchor)]
    for module in method.modules():
        if (module in anchors) == anchor and (own := module.state_dict()).keys() == names:
            for name, tensor in weights.items():
                own[name].copy_(tensor)


def compile_networks(method: Method, machine: MachineOptions, device: torch.device, accumulate: int) -> None:
    """torch.compile a method's networks in place: the names in its state stay as they are.

    --compile auto does so on a GPU where there is the C compiler that Triton needs. An encoder that recomputes its
    activations is left as it is: its stages run twice under different conditions.
    Raises UserError for --cuda-graph where it can't be.
    """
    compiler = any(map(shutil.which, ("g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")))
    if machine.compile == "on" and not compiler:
        raise UserError("--compile on needs a C++ compiler on a CPU (g++), and a C compiler on a GPU (gcc)")
    wanted = machine.compile == "on" or (machine.compile == "auto" and device.type == "cuda" and compiler)
    if machine.cuda_graph and (device.type != "cuda" or not wanted or accumulate > 1):
        raise UserError("--cuda-graph needs a GPU, --compile on or auto (with a C compiler), and --accumulate 1")
    if machine.cuda_graph and is_synchronised(method):
        raise UserError("--cuda-graph can't replay what --batch-norm sync or machine exchanges: leave it out")
    if wanted:  # every network, at every size of views (--resolution), counts towards one limit; beyond it runs eagerly
        torch._dynamo.config.recompile_limit = 64
    for name, network in method.named_children():
        recomputed = machine.checkpoint_activations and name in method.encoders
        if wanted and not recomputed and any(p.dim() > 1 for p in network.parameters()):
            network.compile(dynamic=False, mode="reduce-overhead" if machine.cuda_graph else None)


def is_compiled(method: Method) -> bool:
    """Is any of its networks compiled?"""
    return any(network._compiled_call_impl is not None for network in method.children())


def laid_out(method: Method, device: torch.device, precision: str) -> Method:
    """The method on a device, in the memory formats and dtypes that are fastest there.

    Convolution weights lie channels-last, as views do. A GPU multiplies with the queue in the step's precision, so the
    queue is kept in it there: half the memory to read. A CPU in bf16 takes small convolutions as products of matrices.
    """
    if device.type == "cuda":
        for module in method.modules():
            if isinstance(module, Queue):
                module.keys_KD = module.keys_KD.to(DTYPES[precision])
    if device.type == "cpu" and precision == "bf16":
        for name in method.encoders:
            convert_convolutions(method.get_submodule(name))
    return method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
