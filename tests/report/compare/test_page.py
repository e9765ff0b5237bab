"""The page needs nothing but itself and shows what is in it; the figures are drawn."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from bc2exp.report.compare.comparison import Tolerances, compare
from bc2exp.report.compare.figures import plot_comparison
from bc2exp.report.compare.page import write_page
from bc2exp.report.compare.side import Side
from tests.report.compare.logs import loss_at, row, side

CURVE = {step: loss_at(step) for step in range(1, 41)}
DRIFTED = {step: value * 1.03 for step, value in CURVE.items()}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def report_of(a: Side, b: Side) -> dict:
    return compare(a, b, Tolerances())


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of a run that drifted by 3 %, with a name that would end a script."""
    a = side({**DRIFTED, 7: math.nan}, dict.fromkeys(CURVE, 1.0), seconds=7.0)
    a.name = "</script><b>外卖</b>"
    a.notes = ["<i>note</i>"]
    return write_page(report_of(a, side(CURVE, dict.fromkeys(CURVE, 1.05), seconds=7.0)), tmp_path)


class Outside(HTMLParser):
    """Collects what would be fetched from elsewhere."""

    found: tuple[str, ...] = ()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        taken = [
            f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "srcset", "data", "action")
        ]
        self.found += tuple(taken)


def test_the_page_asks_for_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    parser = Outside()
    parser.feed(text)
    assert parser.found == ()
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    for word in ("fetch(", "XMLHttpRequest", "import(", "@import", "url(", "innerHTML", "eval("):
        assert word not in text, word


def test_the_page_holds_the_whole_report_and_names_cannot_break_out(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("</script>") == 1
    (data,) = re.findall(r"^const report = (.*);$", text, re.MULTILINE)
    report = json.loads(data)
    assert report["a"]["name"] == "</script><b>外卖</b>"
    assert report["curves"]["loss"]["a"][6] == "nan"
    assert report["curves"]["loss"]["steps"] == list(CURVE)


def test_both_languages_have_every_label(page: Path) -> None:
    text = page.read_text("utf-8")
    words = text[text.index("const WORDS") : text.index("const COLOURS")]
    english, chinese = (re.findall(r'(\w[\w ]*)"?: "', part) for part in words.split("zh: {"))
    assert english == chinese
    assert len(english) > 40
    used = set(re.findall(r'\bt\("([\w ]+)"\)', text))
    assert used <= set(english)


def dom(page: Path, folder: Path, more: str = "") -> str:
    """What a real browser makes of the page after `more` was run in it."""
    if BROWSER is None:
        pytest.skip("no browser: chromium is not installed")
    copy = folder / "opened.html"
    text = page.read_text("utf-8").replace("render();\n</script>", f"render();\n{more}\n</script>")
    copy.write_text(text, encoding="utf-8")
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
    quiet += ("--disable-component-update", "--disable-sync", "--no-sandbox", "--lang=en-US")
    place = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, "--headless", *quiet, place, "--dump-dom", copy.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


HOVER = """
const picture = document.querySelector("#loss-overlay svg"), area = picture.getBoundingClientRect();
const send = (name, part) => document.querySelector("#loss-overlay svg").dispatchEvent(new PointerEvent(name,
  { clientX: area.left + area.width * (70 + part * (960 - 96)) / 960, clientY: area.top + 9 }));
"""


def test_a_browser_shows_curves_verdict_and_values(page: Path, tmp_path: Path) -> None:
    shown = dom(page, tmp_path, HOVER + 'send("pointermove", 9 / 39);')
    assert shown.count("<svg") == 4
    for curve in ("curve-a", "curve-b", "curve-error", "acceptance"):
        assert f'class="{curve}"' in shown
    assert "Loss overlay" in shown
    assert "not finite: a at 1, first 7" in shown
    assert "&lt;/script&gt;&lt;b&gt;外卖&lt;/b&gt;" in shown
    assert f"step 10:  a = {DRIFTED[10]:.6f}".rstrip("0") in shown
    assert f"b = {CURVE[10]:.7g}" in shown


@pytest.mark.slow
def test_a_browser_enlarges_and_speaks_chinese(page: Path, tmp_path: Path) -> None:
    drag = 'send("pointerdown", 9.5 / 39); send("pointermove", 0.5); send("pointerup", 20.5 / 39);'
    before = dom(page, tmp_path)
    shown = dom(page, tmp_path, HOVER + drag)

    def points(text: str) -> int:
        (path,) = re.findall(r'<path d="([^"]*)"[^>]*class="curve-b"', text[: text.index("loss-error")])
        return path.count(" ")

    assert (points(before), points(shown)) == (40, 11)
    chinese = dom(page, tmp_path, 'document.getElementById("language").click();')
    assert "损失曲线叠加" in chinese
    assert 'lang="zh-CN"' in chinese
    assert "Loss overlay" not in re.sub(r"<script>.*?</script>", "", chinese, flags=re.DOTALL)


def colours(path: Path) -> set[int]:
    """Every colour of a picture, as 0xRRGGBB."""
    pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()))[..., :3]
    packed = (pixels * 255).round().astype(int) @ [65536, 256, 1]
    return set(packed.ravel().tolist())


A, B, LINE = 0x0072B2, 0xD55E00, 0x009E73


def test_the_two_figures(tmp_path: Path) -> None:
    overlay, error = plot_comparison(report_of(side(DRIFTED), side(CURVE)), tmp_path)
    assert (overlay.name, error.name) == ("loss_overlay.png", "loss_error.png")
    assert {A, B} <= colours(overlay)
    assert {A, LINE} <= colours(error)
    assert LINE not in colours(overlay)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (side({1: math.nan, 2: 1.0}), side({1: 1.0})),
        (side({1: 1.0}), side({5: 1.0}, seconds=1.0)),
        (row(2000.0), row(2000.0)),
        (side({1: 1.0}), side({1: 0.0})),
    ],
    ids=["nan", "no overlap", "no curve", "zero"],
)
def test_what_cannot_be_drawn_is_said_in_the_picture(a: Side, b: Side, tmp_path: Path) -> None:
    a.name, b.name = "外卖 $x_{", "$"
    for path in plot_comparison(report_of(a, b), tmp_path):
        assert len(colours(path)) > 5
    assert "null" in write_page(report_of(a, b), tmp_path).read_text("utf-8")
