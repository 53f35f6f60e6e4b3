"""The pages as a browser shows them: at two widths, in light and in dark."""

import pathlib
from collections.abc import Iterator

import pytest
from support import browser as browsers
from support.browser import Browser
from support.representation import represented
from support.runs import ended, evaluated, make_run

from fasttrain import report
from fasttrain.run.representation import write_representation

# What a browser can tell of a page. Text of an SVG is as large as it is drawn; whether text can be read follows from
# its colour and the nearest background behind it (WCAG 2.2: 4.5 at least, 3 for large letters).
SCRIPT = """(() => {
const channel = v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
const rgb = said => said.match(/[\\d.]+/g).map(Number);
const light = c => .2126 * channel(c[0]) + .7152 * channel(c[1]) + .0722 * channel(c[2]);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const seen = e => e.checkVisibility() && e.getClientRects().length;
const unreadable = [], tiny = [], outside = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const words = walk.currentNode.data.trim(), e = walk.currentNode.parentElement;
  if (!words || !seen(e)) continue;
  const style = getComputedStyle(e), svg = e.closest('svg');
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(style.fontSize) * scale;
  const a = light(rgb(svg ? style.fill : style.color)), b = light(behind(e));
  if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < (size >= 24 ? 3 : 4.5)) unreadable.push(words);
  if (size < 11.9) tiny.push(words + ' ' + size);
  const box = e.getBoundingClientRect();
  if (box.left < -1 || box.right > innerWidth + 1) outside.push(words);
}
const pictures = [...document.querySelectorAll('svg, img, [role=img]')].filter(seen);
const shapes = e => e.querySelectorAll('path[d], use, rect').length;
return {
  scrolls: document.documentElement.scrollWidth - innerWidth, unreadable, tiny, outside, pictures: pictures.length,
  empty: pictures.filter(e => e.getBoundingClientRect().width < 20 || e.getBoundingClientRect().height < 5
    || (e.tagName == 'IMG' && !e.naturalWidth) || (e.tagName == 'svg' && shapes(e) < 3)).length,
  unnamed: pictures.filter(e => !(e.getAttribute('aria-label') || e.getAttribute('alt'))).length,
  twice: [...document.querySelectorAll('[id]')].filter((e, n, all) => all.some((o, m) => m < n && o.id == e.id)).length,
  narrow: [...document.querySelectorAll('summary, label')].filter(e => seen(e) && e.getBoundingClientRect().height < 40)
    .length,
};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not browsers.installed():
        pytest.skip(f"no browser here: none of {', '.join(browsers.NAMES)}")
    with browsers.browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The page of a run with all there may be, of one with hardly anything, and of comparisons of few and of many."""
    folder = tmp_path_factory.mktemp("runs")
    full = make_run(folder / "full", resolution="24:32", queue_size=4096)
    for protocol, top1 in (("knn", 70.0), ("linear", 75.0), ("linear_moco", 76.0)):
        evaluated(full, top1, protocol=protocol, settings={f"a setting of many {n}": 0.1 for n in range(9)})
    ended(full, "stopped", "by SIGTERM")
    write_representation(full, represented(["ant", "bee", "a class with a rather long name"]))
    bare = make_run(folder / "bare", steps=8, every=8)
    (bare / "samples.png").unlink()
    others = [make_run(folder / f"a-run-with-a-rather-long-name-{n}", seed=n, lr=0.01 * n) for n in range(1, 14)]
    for number, run in enumerate(others):
        evaluated(run, 60.0 + number)
    assert report.main([str(full)]) == report.main([str(bare)]) == 0
    few, many = folder / "comparison.html", folder / "many.html"
    assert report.main([str(full), *map(str, others[:2])]) == 0
    assert report.main([*map(str, others), "--out", str(many)]) == 0
    return {"full": full / "report.html", "bare": bare / "report.html", "few": few, "many": many}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["full", "bare", "few", "many"])
def test_a_page_is_whole_and_readable(
    browser: Browser, pages: dict[str, pathlib.Path], name: str, width: int, dark: bool
) -> None:
    look = browser.look(pages[name], SCRIPT, width, dark)
    assert look.complaints == []
    assert [address for address in look.requests if not address.startswith("data:")] == [pages[name].as_uri()]
    found = dict(look.found)
    assert found.pop("pictures") >= {"full": 20, "bare": 4, "few": 10, "many": 10}[name]
    nothing = {"scrolls": 0, "unreadable": [], "tiny": [], "outside": []}
    assert found == {**nothing, "empty": 0, "unnamed": 0, "twice": 0, "narrow": 0}


def test_the_checks_of_a_page_can_fail(browser: Browser, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><body style='background:#fff'><p id=a style='color:#ccc'>pale</p><p id=a "
        "style='font-size:9px'>small</p><p style='width:3000px'>wide</p><img src='no.png'><svg viewBox='0 0 9 9'></svg>"
        "<label>flat</label><script>console.error('oh')</script>",
        "utf-8",
    )
    look = browser.look(page, SCRIPT, 400)
    assert any("oh" in said for said in look.complaints)
    assert any(address.endswith("no.png") for address in look.requests)
    found = look.found
    assert (found["unreadable"], found["outside"]) == (["pale"], ["wide"])
    assert len(found["tiny"]) == found["twice"] == found["narrow"] == 1
    assert min(found["empty"], found["unnamed"], found["scrolls"]) >= 1


def test_the_reader_chooses_what_curves_are_over_without_a_script(
    browser: Browser, pages: dict[str, pathlib.Path]
) -> None:
    script = """(() => {
        const shown = () => [...document.querySelectorAll('section .charts svg')].slice(0, 1).flatMap(svg =>
            [...svg.querySelectorAll('.x-step, .x-epoch, .x-hours')]).filter(e => getComputedStyle(e).display != 'none')
            .map(e => e.textContent.trim());
        return ['step', 'epoch', 'hours'].map(name => {
            document.querySelector(`label[for=by-${name}]`).click(); return shown(); });
    })()"""
    steps, epochs, hours = browser.look(pages["full"], script).found
    assert steps == ["100", "200", "300", "400"]
    assert epochs == ["5", "10", "15", "20"]
    assert all(label.endswith(" h") for label in hours)
    assert len(hours) == 4


def test_a_confusion_matrix_is_a_matrix_in_a_narrow_window(browser: Browser, pages: dict[str, pathlib.Path]) -> None:
    script = """(() => { const rows = [...document.querySelectorAll('.confusion tr')];
        const x = e => e.getBoundingClientRect().x;
        return [rows.length, rows.every(row => row.children.length == rows[0].children.length),
            rows.every(row => [...row.children].every((cell, n) => Math.abs(x(cell) - x(rows[1].children[n])) < 1)
                && row.checkVisibility())]; })()"""
    for width in (400, 1280):
        assert browser.look(pages["full"], script, width).found == [4, True, True]
