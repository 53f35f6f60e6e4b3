"""What the page shows of the representation itself: maps, nearest neighbours, classes, and what the encoder sees."""

from __future__ import annotations

import base64
import io
import pathlib

import numpy as np
from PIL import Image

from fasttrain.page.classes import FEW, accuracies, confusions, name_of
from fasttrain.page.map import Group, drawn, shortened
from fasttrain.page.representation_style import MAP_COLOURS
from fasttrain.page.shell import charts, figure, section, text
from fasttrain.run.evaluations import NAMES
from fasttrain.run.representation import Representation, read_representation

COLOURED = 2 * len(MAP_COLOURS)  # classes that have a colour and a shape of their own
SMALL = 48  # pixels: smaller pictures are enlarged as they are


def sections(run: pathlib.Path) -> list[str]:
    """The sections on a run's representation, as HTML; none where evaluation has left nothing to show."""
    kept = read_representation(run)
    if kept is None:
        return []
    return [part for part in (_maps(kept), _neighbours(kept), _classes(kept), _views(kept)) if part]


def _of(kept: Representation) -> str:
    """Of which weights and images a section tells, HTML."""
    features = "" if kept.features == "encoder" else f" by the {kept.features}"
    return text(f"Step {kept.step:,}, images of {pathlib.Path(kept.data).name or kept.data}{features}.")


def _protocol(kept: Representation) -> str:
    return {"linear": "the linear probe"}.get(kept.predicted_by, NAMES.get(kept.predicted_by, kept.predicted_by))


def _maps(kept: Representation) -> str:
    if len(kept.label_N) < 2:
        return ""
    groups, by = _groups(kept)
    total = int(kept.count_C.sum())
    images = f"{len(kept.label_N):,} val images" + (
        f", evenly spaced of {total:,}" if total > len(kept.label_N) else ""
    )
    captions = {"PCA": "the two directions of most variance"}
    if len(kept.variance) == 2:
        held = sum(kept.variance)
        captions["PCA"] += f", which hold {100 * held:.{0 if held > 0.1 else 1}f}&nbsp;% of it"
    others = "keeps neighbours together; distances between groups, and their sizes, mean little"
    pictures = (
        figure(
            name,
            drawn(map_N2, groups, f"{name} of the features of {images}, {by}"),
            captions.get(name, others),
        )
        for name, map_N2 in zip(kept.maps, kept.map_MN2, strict=True)
    )
    note = f"{_of(kept)} Features of {images}, drawn in two dimensions; {by}. The encoder has seen no label."
    return section("Map of the images", charts(pictures), _keys(kept, groups), note=note)


def _groups(kept: Representation) -> tuple[list[Group], str]:
    """What is drawn alike, and what that shows, in words."""
    occurring = np.unique(kept.label_N[kept.label_N >= 0])
    places = {c: np.flatnonzero(kept.label_N == c) for c in occurring.tolist()}
    if 1 < len(occurring) <= COLOURED:
        ten = len(MAP_COLOURS)
        return [
            Group(index_N, at % ten, "box" if at >= ten else "dot", name_of(kept, c))
            for at, (c, index_N) in enumerate(places.items())
        ], "coloured by class"
    names = [Group(index_N, 0, "", name_of(kept, c)) for c, index_N in places.items() if len(places) > 1]
    right_N = kept.label_N == kept.predicted_N
    telling = kept.predicted_by and len(occurring) > 1 and right_N.any() and not right_N.all()
    if telling and not _unseen(kept):
        looks = [Group(np.flatnonzero(right_N), 0, "dot"), Group(np.flatnonzero(~right_N), 6, "cross")]
        return looks + names, f"by whether {_protocol(kept)} names the class"
    return [Group(np.arange(len(kept.label_N)), 0, "dot"), *names], "a dot each"


def _keys(kept: Representation, groups: list[Group]) -> str:
    shown = [group for group in groups if group.shape and (group.label or group.shape == "cross")]
    words = [group.label or f"wrong, {len(group.index_N):,}" for group in shown]
    if any(group.shape == "cross" for group in groups):
        shown, words = [groups[0], *shown], [f"right, {len(groups[0].index_N):,}", *words]
    keys = (
        f'<span class="key {group.shape} m{group.colour}" title="{text(word)}">{text(shortened(word))}</span> '
        for group, word in zip(shown, words, strict=True)
    )
    return f"<p class=keys>{''.join(keys)}</p>" if shown else ""


def _unseen(kept: Representation) -> bool:
    """Whether most val images are of classes without a train image, so that no answer could be right."""
    return bool(kept.count_C[kept.memory_C == 0].sum() > kept.count_C.sum() / 2)


def _neighbours(kept: Representation) -> str:
    k = kept.neighbour_label_QK.shape[1]
    if not len(kept.query_label_Q) or not k:
        return ""
    rows = "".join(_query(kept, q) for q in range(len(kept.query_label_Q)))
    said = f"The {k} images of train whose features are nearest to a val image's, and their cosine similarity."
    if kept.predicted_by:
        said += " Every third val image was taken for another class where there is such a one."
    median = int(np.median(kept.memory_C[kept.query_label_Q])) if (kept.query_label_Q >= 0).all() else -1
    if median == 0:
        said += (
            " Most of their classes have no image in train, so no neighbour could be of the same: look at the pictures."
        )
    elif 0 < median < k:
        said += f" Their classes have {median:,} in train at the median: most neighbours have to be of other classes."
    said += " ✗ and a dashed frame: of another class." if "class=other" in rows else ""
    return section("Nearest neighbours", f"<div class=queries>{rows}</div>", note=f"{_of(kept)} {text(said)}")


def _query(kept: Representation, q: int) -> str:
    """A val image and its neighbours. Those of another class are marked only where train has some of its own."""
    label, found, k = int(kept.query_label_Q[q]), int(kept.query_predicted_Q[q]), kept.neighbour_label_QK.shape[1]
    name = name_of(kept, label) if label >= 0 else "no label"
    first = q * (1 + k)
    taken = f'<span title="{text(name_of(kept, found))}">✗ {text(_protocol(kept))}: {text(name_of(kept, found))}</span>'
    below = f"<strong>{text(name)}</strong>{taken if 0 <= found != label else ''}"
    cells = [f"<figure>{_image(kept.thumbnails[first], f'val image: {name}')}<figcaption>{below}</figcaption></figure>"]
    if label >= 0 and not kept.memory_C[label]:
        cells[0] = cells[0].replace("</figcaption>", "<span>none in train</span></figcaption>")
    for place, (other, similarity) in enumerate(zip(kept.neighbour_label_QK[q], kept.similarity_QK[q], strict=True)):
        of = name_of(kept, int(other)) if other >= 0 else "no label"
        wrong = bool(label >= 0 and other != label and kept.memory_C[label] > 0)
        alt = f"neighbour {place + 1}: {of}, similarity {similarity:.2f}{', another class' if wrong else ''}"
        caption = f'{"✗ " * wrong}{similarity:.2f}<span title="{text(of)}">{text(of)}</span>'
        picture = _image(kept.thumbnails[first + 1 + place], alt)
        cells.append(f"<figure{' class=other' * wrong}>{picture}<figcaption>{caption}</figcaption></figure>")
    return f"<div class=query>{''.join(cells)}</div>"


def _classes(kept: Representation) -> str:
    occurring = int((kept.count_C > 0).sum())
    if not kept.predicted_by or occurring < 2:
        return ""
    of = f"{_of(kept)} By {text(_protocol(kept))}."
    if _unseen(kept):
        return section("Classes", note=f"{of} Most val images are of classes without an image in train: no accuracy.")
    few = int(np.median(kept.count_C[kept.count_C > 0]))
    bars = (
        accuracies(kept)
        if few >= FEW
        else (
            f"<p class=sub>Classes have {few} val {'image' if few == 1 else 'images'} at the median: too few for an "
            "accuracy of each.</p>"
        )
    )
    found = confusions(kept)
    whole = "Rows: a class; columns: what its val images were taken for, in percent. Right ones are framed." if "<table" in found else ""
    title = "<h3>Which class is taken for which</h3>"
    none = "" if few < FEW else "<p class=sub>No class was taken for the same other one twice.</p>"
    mistakes = f"{title}<p class=note>{whole}</p>{found}" if found else none
    return section("Classes", bars, mistakes, note=f"{of} Share of a class's val images that is classified right.")


def _views(kept: Representation) -> str:
    if kept.views[::2] == kept.views[1::2]:  # small images, which are seen as they are
        return ""
    pairs = (
        f"<figure>{_image(whole, 'a val image')}<span aria-hidden=true>→</span>"
        f"{_image(view, f'its central view of {kept.size} px')}</figure>"
        for whole, view in zip(kept.views[::2], kept.views[1::2], strict=True)
    )
    note = f"Val images, and the {kept.size} px of each that evaluation gives to the encoder."
    return section(
        "What the encoder sees", f"<div class=seen>{''.join(pairs)}</div>", note=note
    )


def _image(jpeg: bytes, alt: str) -> str:
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
        width, height = picture.size
    kind = " class=small" if max(width, height) <= SMALL else ""
    data = base64.b64encode(jpeg).decode()
    return f'<img{kind} width={width} height={height} alt="{text(alt)}" src="data:image/jpeg;base64,{data}">'
