"""What the page shows of the representation itself: maps, nearest neighbours, classes, and what the encoder sees."""

from __future__ import annotations

import base64
import pathlib

import numpy as np

from fasttrain.page.classes import FEW, accuracies, confusions, name_of
from fasttrain.page.map import Group, drawn, keys
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
    note = f"{_of(kept)} Features of {images}, drawn in two dimensions; {text(by)}."
    return section("Map of the images", charts(pictures), keys(groups), note=note)


def _groups(kept: Representation) -> tuple[list[Group], str]:
    """What is drawn alike, and what that shows, in words."""
    occurring = np.unique(kept.label_N[kept.label_N >= 0])
    places = {c: np.flatnonzero(kept.label_N == c) for c in occurring.tolist()}
    if 1 < len(occurring) <= COLOURED:
        ten = len(MAP_COLOURS)
        shapes = ["dot"] * ten + ["box"] * ten
        return [
            Group(index_N, at % ten, shapes[at], name_of(kept, c), marked=True)
            for at, (c, index_N) in enumerate(places.items())
        ], "coloured by class"
    middles = [Group(index_N, 0, "", name_of(kept, c), marked=True) for c, index_N in places.items() if len(places) > 1]
    right_N = kept.label_N == kept.predicted_N
    telling = kept.predicted_by and len(occurring) > 1 and right_N.any() and not right_N.all()
    if not telling or _unseen(kept):
        return [Group(np.arange(len(kept.label_N)), 0, "dot"), *middles], "a dot each"
    looks = (("dot", "right", right_N, 0), ("cross", "wrong", ~right_N, 6))
    groups = [Group(np.flatnonzero(of_N), m, shape, f"{word}, {of_N.sum():,}") for shape, word, of_N, m in looks]
    return groups + middles, f"marked by whether {_protocol(kept)} names the class"


def _unseen(kept: Representation) -> bool:
    """Whether most val images are of classes without a train image, so that no answer could be right."""
    return bool(kept.count_C[kept.memory_C == 0].sum() > kept.count_C.sum() / 2)


def _neighbours(kept: Representation) -> str:
    queries, k = kept.neighbour_label_QK.shape
    if not queries or not k:
        return ""
    said = f"The {k} images of train whose features are nearest to a val image's, and their cosine similarity."
    if kept.predicted_by:
        said += f" One of three was chosen among those that {_protocol(kept)} takes for another class."
    labelled = bool((kept.query_label_Q >= 0).all())
    median = int(np.median(kept.memory_C[kept.query_label_Q])) if labelled else 0
    if not labelled:
        said += " The images have no labels: look whether they are alike."
    elif not median:
        said += " Most of these classes have no image in train: look whether the images are alike."
    elif median < k:
        said += f" Classes have {median:,} in train at the median, so most neighbours have to be of others."
        said += " ✓ and a frame: of the same class."
    else:
        said += " ✗ and a dashed frame: of another class."
    rows = "".join(_query(kept, q, median >= k) for q in range(queries))
    return section("Nearest neighbours", f"<div class=queries>{rows}</div>", note=text(said))


def _query(kept: Representation, q: int, wrong_marked: bool) -> str:
    """A val image and its neighbours. Marked are those of other classes, or else those of its own."""
    label, found, k = int(kept.query_label_Q[q]), int(kept.query_predicted_Q[q]), kept.neighbour_label_QK.shape[1]
    name = _named(kept, label)
    below = f"<strong>{text(name)}</strong>"
    if 0 <= found != label >= 0:
        below += f"<span>✗ taken for {text(name_of(kept, found))}</span>"
    pictures = kept.thumbnails[q * (1 + k) : (q + 1) * (1 + k)]
    cells = [f"<figure>{_image(pictures[0], f'val image: {name}', kept.size)}<figcaption>{below}</figcaption></figure>"]
    neighbours = zip(pictures[1:], kept.neighbour_label_QK[q].tolist(), kept.similarity_QK[q].tolist(), strict=True)
    for place, (picture, other, similarity) in enumerate(neighbours, 1):
        of, kind, mark, words = _named(kept, other), "", "", ""
        if wrong_marked and other != label:
            kind, mark, words = " class=other", "✗ ", ", another class"
        elif not wrong_marked and other == label >= 0:
            kind, mark, words = " class=same", "✓ ", ", the same class"
        image = _image(picture, f"neighbour {place}: {of}, similarity {similarity:.2f}{words}", kept.size)
        caption = f'{mark}{similarity:.2f}<span title="{text(of)}">{text(of)}</span>'
        cells.append(f"<figure{kind}>{image}<figcaption>{caption}</figcaption></figure>")
    return f"<div class=query>{''.join(cells)}</div>"


def _named(kept: Representation, label: int) -> str:
    return name_of(kept, label) if label >= 0 else "no label"


def _classes(kept: Representation) -> str:
    occurring = int((kept.count_C > 0).sum())
    if not kept.predicted_by or occurring < 2:
        return ""
    of = f"By {text(_protocol(kept))}."
    if _unseen(kept):
        return section("Classes", f"<p class=note>{of} Most val images are of classes that train has no image of.</p>")
    few = int(np.median(kept.count_C[kept.count_C > 0]))
    if few < FEW:
        images = f"{few} val {'image' if few == 1 else 'images'} at the median"
        bars = f"<p class=note>{of} Classes have {images}: too few for an accuracy of each.</p>"
    else:
        bars = f"<p class=note>{of} Share of a class's val images that is classified right.</p>{accuracies(kept)}"
    found = confusions(kept)
    if "<table" in found:
        said = "Rows: a class; columns: what its val images were taken for, in percent. Right ones are framed."
        found = f"<p class=note>{said}</p>{found}"
    mistakes = f"<h3>Which class is taken for which</h3>{found}" if found else ""
    return section("Classes", bars, mistakes)


def _views(kept: Representation) -> str:
    if kept.views[::2] == kept.views[1::2]:  # small images, which are seen as they are
        return ""
    pairs = (
        f"<figure>{_image(whole, 'a val image', SMALL + 1)}<span aria-hidden=true>→</span>"
        f"{_image(view, f'its central {kept.size} pixels', kept.size)}</figure>"
        for whole, view in zip(kept.views[::2], kept.views[1::2], strict=True)
    )
    note = f"Val images, and the {kept.size} × {kept.size} pixels of each that evaluation gives to the encoder."
    return section("What the encoder sees", f"<div class=seen>{''.join(pairs)}</div>", note=note)


def _image(jpeg: bytes, alt: str, size: int) -> str:
    """size: of the picture, in pixels."""
    kind = " class=small" if size <= SMALL else ""
    return f'<img{kind} alt="{text(alt)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
