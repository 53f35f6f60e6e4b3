"""Which tensors of a file are an encoder's: the network in it whose names and shapes fit best, wherever it lies.

A checkpoint's names are a prefix (dicts, wrappers, the network's own name) and a name inside the network. The prefix
after which most of the encoder's names follow is that of the network to take.
"""

from __future__ import annotations

import collections
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.networks.vision_transformer import fixed_positions
from fasttrain.system.errors import UserError
from fasttrain.weights.foreign import HEADS, heads_of, heads_there, namings, preference
from fasttrain.weights.read import tensors_of

LISTED = 4  # names in a line
COUNTER = "num_batches_tracked"  # which older files lack, and batch norm with a momentum does not read
POSITIONS = "pos_embedding", "pos_embed"
LARGEST_GRID = 256  # side, in patches
OTHER_POSITIONS = "fixed here, others there: --vit-positions learned takes those"


class Fit(NamedTuple):
    """taken: by the encoder's names, as they fit it. of: how many it has. not_taken: why, by name. inner: tensors of
    the network there that this encoder lacks, so that it is another one. left_over: its classifier's or head's.
    prefix: of that network's names; outside: how many tensors there have another. notes: what else was done."""

    taken: dict[str, Tensor]
    of: int
    not_taken: dict[str, str]
    inner: list[str]
    left_over: list[str]
    prefix: str
    outside: int
    notes: list[str]

    @property
    def whole(self) -> bool:
        return not self.not_taken and not self.inner

    def line(self, source: str, option: str = "--init") -> str:
        parts = [f"{option} {source}: {len(self.taken)} of {self.of} tensors of the encoder taken", *self.notes]
        if self.not_taken:
            parts.append(f"not taken: {listed([f'{name} ({why})' for name, why in self.not_taken.items()])}")
        if self.inner:
            parts.append(f"the network there is another one, with more: {listed(self.inner)}")
        if self.left_over:
            parts.append(f"left over there: {listed(self.left_over)}")
        if self.outside:
            parts.append(f"{self.outside} more tensors there outside of {self.prefix.rstrip('.')}")
        return "; ".join(parts)


class _Place(NamedTuple):
    """Where a network lies. under: its tensors by their names in it. names: theirs by the encoder's. fitting: how many
    tensors of the encoder fit, and how many are there."""

    prefix: str
    under: dict[str, Tensor]
    names: dict[str, str]
    fitting: tuple[int, int]


def fit(encoder: nn.Module, tensors: Mapping[str, Tensor], heads: frozenset[int] = frozenset()) -> Fit:
    """The encoder's tensors among those of a file, by any names.

    heads: numbers of attention heads of the network there, where they are known. Raises UserError where the file has no
    such network, several that fit alike, or one with other attention heads.
    """
    here = {name: tensor.cpu() for name, tensor in encoder.state_dict().items() if not name.endswith(COUNTER)}
    place = _network(encoder, here, tensors)
    fixed = {name for name, _buffer in encoder.named_buffers()}
    taken, not_taken, notes = {}, {}, _check_heads(encoder, place, heads)
    for name, tensor in here.items():
        found, why = _fitted(place.under.get(place.names[name]), name, tensor, name in fixed)
        if why:
            not_taken[name] = why
            continue
        taken[name] = found
        original = tensors.get(place.prefix + place.names[name], found)
        if name in fixed or original.shape == tensor.shape:
            continue
        if name.endswith(POSITIONS):
            notes.append(f"positions of {original.shape[1]} tokens interpolated to {tensor.shape[1]}")
        else:
            notes.append(f"{name} converted by timm from {_shape(original)} to {_shape(tensor)}")
    inner, left_over = _left(place)
    outside = sum(not name.startswith(place.prefix) for name in tensors)
    return Fit(taken, len(here), not_taken, inner, left_over, place.prefix, outside, notes)


def _fitted(there: Tensor | None, name: str, here: Tensor, fixed: bool) -> tuple[Tensor, str]:
    """A tensor as the encoder takes it, and why it does not, or ""."""
    if there is None:
        return here, "not there"
    if not name.endswith(POSITIONS):
        return there, _objection(there, here)
    if fixed:
        return here, "" if _are_sines(there, here) else OTHER_POSITIONS
    resized = _resized(there, here.shape)
    return resized, _objection(resized, here)


def _left(place: _Place) -> tuple[list[str], list[str]]:
    """What is left of a network: tensors inside of what is taken, and heads."""
    matched = {*place.names.values()}
    trunk = {name.partition(".")[0] for name in matched}
    rest = [name for name in place.under if name not in matched and not name.endswith(COUNTER)]
    inner = [name for name in rest if name.partition(".")[0] in trunk and not HEADS & {*name.split(".")}]
    return inner, [name for name in rest if name not in inner]


def _network(encoder: nn.Module, here: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> _Place:
    place = _best(encoder, here, tensors)
    converted = _by_timm(encoder, place.under)
    if converted is not None:
        by_timm = _best(encoder, here, converted)
        if by_timm.fitting >= place.fitting:
            return by_timm._replace(prefix=place.prefix)
    if not place.fitting[0]:
        raise UserError(f"it has none of the encoder's {len(here)} tensors, such as {listed(list(here))}; it has "
                        f"{listed(list(tensors)) or 'no tensors'}")  # fmt: skip
    return place


def _best(encoder: nn.Module, here: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> _Place:
    """The prefix and the names that fit best. Raises UserError where several do, with different weights."""
    places = []
    for names in namings(encoder, here):
        own, counts = {theirs: name for name, theirs in names.items()}, collections.Counter[str]()
        fitting = collections.Counter[str]()
        for full, tensor in tensors.items():
            for prefix, theirs in _splits(full):
                if theirs in own:
                    counts[prefix] += 1
                    fitting[prefix] += _can_fit(tensor, own[theirs], here[own[theirs]])
        places += [(fitting[prefix], counts[prefix], preference(prefix), prefix, names) for prefix in counts]
    if not places:
        return _Place("", dict(tensors), {name: name for name in here}, (0, 0))
    best = max(places, key=lambda place: place[:3])
    alike = {place[3]: _under(tensors, place[3]) for place in places if place[:3] == best[:3]}
    if len(alike) > 1 and not _equal(list(alike.values()), {best[4][name]: here[name].shape for name in here}):
        raise UserError(f"it has several networks that fit alike: {listed(sorted(alike))}: save the one alone")
    return _Place(best[3], alike[best[3]], best[4], best[:2])


def _splits(name: str) -> list[tuple[str, str]]:
    """("", "a.b"), ("a.", "b") of "a.b"."""
    dots = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
    return [(name[:place], name[place:]) for place in dots]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _equal(networks: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]) -> bool:
    """Whether all tensors of these shapes are the same in all networks."""
    first = {name: tensor for name, tensor in networks[0].items() if tensor.shape == shapes.get(name)}
    return all(name in other and torch.equal(first[name], other[name]) for other in networks[1:] for name in first)


def _by_timm(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors as timm itself converts a file for this network, DINOv2's for one; None where it does not."""
    module = type(encoder).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None) if module.startswith("timm.") else None
    if convert is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of speed
            return tensors_of(convert(dict(tensors), encoder))
    except Exception:  # it expects other tensors than there are
        return None


def _check_heads(encoder: nn.Module, place: _Place, heads: frozenset[int]) -> list[str]:
    """Raises UserError for other attention heads than the encoder's; a note where they are not known."""
    own = heads_of(encoder)
    heads = heads or heads_there(place.prefix, {name: tuple(tensor.shape) for name, tensor in place.under.items()})
    if own and heads and own != heads:
        there, here = (", ".join(map(str, sorted(each))) for each in (heads, own))
        raise UserError(f"its attention has {there} heads, this encoder's {here} (see --vit-heads)")
    if heads or not own:
        return []
    return [f"how many attention heads is not told there: {', '.join(map(str, sorted(own)))} here"]


def _can_fit(there: Tensor, name: str, here: Tensor) -> bool:
    return there.shape == here.shape or (name.endswith(POSITIONS) and _grids(there.shape, here.shape) is not None)


def _grids(there: torch.Size, here: torch.Size) -> tuple[int, int, int] | None:
    """Tokens before the patches and the sides of both grids, of positions (1, T, D) that differ in T; else None."""
    if there == here or len(there) != 3 or len(here) != 3 or (there[0], there[2]) != (here[0], here[2]):
        return None
    for extra in (1, 0):
        sides = [math.isqrt(max(0, shape[1] - extra)) for shape in (there, here)]
        if all(
            0 < s <= LARGEST_GRID and s * s == shape[1] - extra for s, shape in zip(sides, (there, here), strict=True)
        ):
            return extra, sides[0], sides[1]
    return None


def _resized(there: Tensor, shape: torch.Size) -> Tensor:
    """Positions for another grid, as our networks interpolate theirs for views of other sizes; what is no grid of
    positions, or of that size already, as it is."""
    if (grids := _grids(there.shape, shape)) is None:
        return there
    extra, side, new_side = grids
    grid = there[:, extra:].float().mT.unflatten(2, (side, side))
    grid = F.interpolate(grid, (new_side, new_side), mode="bicubic")
    return torch.cat([there[:, :extra].float(), grid.flatten(2).mT], 1)


def _are_sines(there: Tensor, here: Tensor) -> bool:
    """Whether fixed positions (1, T, D) there are this network's own formula, for its own or another grid."""
    side = math.isqrt(max(0, there.shape[1] - 1)) if there.dim() == 3 else 0
    if not 0 < side <= LARGEST_GRID or there.shape != (1, side**2 + 1, here.shape[2]):
        return False
    return torch.allclose(there.float(), fixed_positions(here.shape[2], (side, side), side), atol=1e-4)


def _objection(there: Tensor, here: Tensor) -> str:
    """Why a tensor can't be taken, or ""."""
    if there.shape != here.shape:
        return f"{_shape(there)} there, {_shape(here)} here"
    if there.is_floating_point() != here.is_floating_point() or (there.is_floating_point() and there.itemsize == 1):
        return f"{there.dtype} there".removeprefix("torch.")  # such as a quantised one, whose scale lies elsewhere
    return "" if torch.isfinite(there).all() else "not finite there"


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def listed(names: Sequence[str]) -> str:
    """The first few of them, and how many there are."""
    return ", ".join(names[:LISTED]) + (f", … ({len(names)} in all)" if len(names) > LISTED else "")
