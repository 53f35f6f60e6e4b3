"""The sections on a representation: sound HTML whatever the classes are, and nothing said that labels do not bear."""

import html.parser
import pathlib
import re

import numpy as np
import pytest
from support.browser import browser, installed
from support.representation import represented

from fasttrain.page.representation import sections
from fasttrain.page.shell import write_page
from fasttrain.run.representation import FILE, Representation, write_representation

VOID = {"img", "br", "meta", "link", "input"}
ODD = ["<script>alert(1)</script>", '"><b>', "", "  ", "日本語", "\ud800", "x" * 300, "&amp;", "a\nb", "n02084071_dog"]


class Sound(html.parser.HTMLParser):
    """Counts tags, and raises for one that is not closed, a picture without words, or an address to ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.tags.append((tag, names))
        assert tag not in {"script", "b"} or names, f"<{tag}> came from a name"
        assert tag != "img" or (names["alt"] and str(names["src"]).startswith("data:image/jpeg;base64,/9j/"))
        assert tag != "svg" or names["aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(run: pathlib.Path, kept: Representation) -> tuple[str, Sound]:
    write_representation(run, kept)
    page = "".join(sections(run))
    sound = Sound()
    sound.feed(page)
    sound.close()
    assert sound.open == []
    assert "http" not in page
    page.encode()  # no half of a character
    return page, sound


def titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_a_run_without_a_representation_has_no_sections(tmp_path: pathlib.Path) -> None:
    assert sections(tmp_path) == []
    (tmp_path / FILE).write_bytes(b"PK")
    assert sections(tmp_path) == []


def test_each_part_is_shown_with_what_it_is_of(tmp_path: pathlib.Path) -> None:
    page, _ = shown(tmp_path, represented([f"class {c}" for c in range(10)]))
    assert titles(page) == ["Map of the images", "Nearest neighbours", "Classes", "What the encoder sees"]
    assert "Step 1,234, images of flowers. Features of 120 val images" in page
    assert "which hold 39&nbsp;% of it" in page
    assert len(page) < 1 << 20


@pytest.mark.parametrize(("classes", "shapes"), [(10, {"dot": 10}), (20, {"dot": 10, "box": 10})])
def test_a_map_has_a_point_for_each_image_and_a_look_for_each_class(
    tmp_path: pathlib.Path, classes: int, shapes: dict[str, int]
) -> None:
    _, sound = shown(tmp_path, represented([str(c) for c in range(classes)]))
    paths = [names for tag, names in sound.tags if tag == "path"]
    assert sum(str(names["d"]).count("M") for names in paths) == 2 * 12 * classes
    looks = {str(names["class"]) for names in paths}
    assert len(looks) == classes
    assert {shape: sum(shape in look for look in looks) for shape in shapes} == shapes


def test_more_classes_than_looks_are_marked_by_right_and_wrong(tmp_path: pathlib.Path) -> None:
    kept = represented([str(c) for c in range(1000)], 2)
    page, sound = shown(tmp_path, kept)
    right = int((kept.label_N == kept.predicted_N).sum())
    assert "marked by whether the linear probe names the class" in page
    assert f">right, {right:,}</span>" in page
    assert f">wrong, {2000 - right:,}</span>" in page
    assert sum(str(names["d"]).count("M") for tag, names in sound.tags if tag == "path") == 4000
    assert len(page) < 1 << 20


def test_neighbours_of_another_class_are_marked_by_a_sign_a_frame_and_words(tmp_path: pathlib.Path) -> None:
    kept = represented(list("abc"))
    page, sound = shown(tmp_path, kept)
    wrong = int((kept.neighbour_label_QK != kept.query_label_Q[:, None]).sum())
    assert page.count("<figure class=other>") == page.count(", another class") == wrong
    assert page.count("<figcaption>✗ ") == wrong
    assert next(names["alt"] for tag, names in sound.tags if tag == "img") == "val image: a"
    assert "of the same class" not in page


def test_where_a_class_has_one_image_in_train_the_right_neighbour_is_marked(tmp_path: pathlib.Path) -> None:
    classes = [str(c) for c in range(40)]
    kept = represented(classes, 1, memory_C=np.ones(40, int), count_C=np.ones(40, int))
    page, _ = shown(tmp_path, kept)
    right = int((kept.neighbour_label_QK == kept.query_label_Q[:, None]).sum())
    assert page.count("<figure class=same>") == page.count("<figcaption>✓ ") == right > 0
    assert "class=other" not in page
    assert "Classes have 1 in train at the median, so most neighbours have to be of others." in page
    assert "Classes have 1 val image at the median: too few for an accuracy of each." in page
    assert "<li>" not in page


def test_classes_that_train_has_no_image_of_are_neither_right_nor_wrong(tmp_path: pathlib.Path) -> None:
    kept = represented([str(c) for c in range(40)], right=0, memory_C=np.zeros(40, int))
    page, _ = shown(tmp_path, kept)
    assert "Most of these classes have no image in train: look whether the images are alike." in page
    assert "Most val images are of classes that train has no image of." in page
    assert "class=other" not in page
    assert "wrong," not in page


def test_images_without_labels_have_maps_and_neighbours_alone(tmp_path: pathlib.Path) -> None:
    none = {name: np.full_like(getattr(represented("ab"), name), -1) for name in
            ("label_N", "predicted_N", "query_label_Q", "query_predicted_Q", "neighbour_label_QK")}  # fmt: skip
    empty = np.zeros((0, 0), int)
    kept = represented(
        "ab", **none, predicted_by="", count_C=np.zeros(2, int), memory_C=np.zeros(2, int),
        right_C=np.zeros(2, int), confusion_CC=empty, pair_P3=np.zeros((0, 3), int),
    )  # fmt: skip
    page, _ = shown(tmp_path, kept)
    assert titles(page) == ["Map of the images", "Nearest neighbours", "What the encoder sees"]
    assert "The images have no labels: look whether they are alike." in page
    assert "✗" not in page
    assert "✓" not in page


def test_a_single_class_has_no_accuracy_to_show(tmp_path: pathlib.Path) -> None:
    page, _ = shown(tmp_path, represented(["all"], right=1))
    assert titles(page) == ["Map of the images", "Nearest neighbours", "What the encoder sees"]
    assert "a dot each" in page


def test_names_of_classes_are_words_and_nothing_else(tmp_path: pathlib.Path) -> None:
    page, sound = shown(tmp_path, represented(ODD))
    words = "".join(sound.words)
    assert "<script>alert(1)</script>" in words
    assert "\\ud800" in words
    assert "class 2" in words  # of an empty name
    assert "dog" in words
    assert "n02084071" not in page


def test_bars_are_sorted_and_of_many_classes_both_ends_are_shown(tmp_path: pathlib.Path) -> None:
    def widths(page: str) -> list[float]:
        return [float(share) for share in re.findall(r'<i style="--share: ([\d.]+)%">', page)]

    few, _ = shown(tmp_path, represented([str(c) for c in range(40)]))
    assert len(widths(few)) == 40
    assert widths(few) == sorted(widths(few), reverse=True)
    kept = represented([str(c) for c in range(200)])
    many, sound = shown(tmp_path, kept)
    assert len(widths(many)) == 30
    assert max(widths(many)) == pytest.approx(100 * max(kept.right_C / 12), abs=0.1)
    assert min(widths(many)) == pytest.approx(100 * min(kept.right_C / 12), abs=0.1)
    counts = next(str(n["aria-label"]) for tag, n in sound.tags if "classes by" in str(n.get("aria-label")))
    assert sum(int(count) for count in re.findall(r"(\d+) from", counts)) == 200


def test_a_matrix_has_the_shares_of_each_row(tmp_path: pathlib.Path) -> None:
    confusion_CC = np.array([[9, 1, 0], [0, 5, 5], [2, 0, 8]])
    page, _ = shown(tmp_path, represented(list("abc"), confusion_CC=confusion_CC))
    rows = re.findall("<tr>(.*?)</tr>", page)[1:]
    assert [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in rows] == [
        ["90", "10", ""],
        ["", "50", "50"],
        ["20", "", "80"],
    ]
    assert re.findall('class="(h[0-9]+) right"', page) == ["h9", "h5", "h8"]


def test_of_many_classes_mistakes_made_more_than_once_are_listed(tmp_path: pathlib.Path) -> None:
    kept = represented([f"c{c}" for c in range(100)], pair_P3=np.array([[4, 7, 3], [1, 2, 1]]))
    page, _ = shown(tmp_path, kept)
    assert "<li>c4 → c7: 3 of 12</li>" in page
    assert "c1 → c2" not in page


def test_views_that_show_the_image_as_it_is_are_left_out(tmp_path: pathlib.Path) -> None:
    same = represented("ab").views[0]
    assert "What the encoder sees" not in titles(shown(tmp_path, represented("ab", views=(same,) * 6))[0])


SCRIPT = """({
  wide: document.documentElement.scrollWidth > innerWidth,
  empty: [...document.images].filter(i => !i.complete || !i.naturalWidth || i.clientWidth < 20).length,
  pictures: document.images.length,
  small: [...document.querySelectorAll('main *')].filter(
    e => e.children.length == 0 && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length,
})"""


@pytest.mark.skipif(not installed(), reason="no Chromium here")
def test_a_browser_shows_all_pictures_at_both_widths_and_asks_for_nothing(tmp_path: pathlib.Path) -> None:
    write_representation(tmp_path, represented(ODD))
    write_page(tmp_path / "page.html", "page", sections(tmp_path), "test")
    with browser(tmp_path / "profile") as opened:
        for width, dark in ((400, False), (1280, True)):
            look = opened.look(tmp_path / "page.html", SCRIPT, width, dark)
            assert look.complaints == []
            assert [address for address in look.requests if not address.startswith(("data:", "file:"))] == []
            assert look.found == {"wide": False, "empty": 0, "pictures": 71, "small": 0}
