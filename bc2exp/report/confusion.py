"""Confusions as a picture: one panel a model, true classes down, chosen ones across."""

from __future__ import annotations

from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from bc2exp.report.drawing import png

_DARK = 0.5
_MOST_FONTS = 2000


def draw_confusions(report: dict[str, Any]) -> bytes:
    """The confusions of an evaluation's report as a PNG.

    Classes go by their words where a font of this machine has the characters, else by their labels: the
    fonts that come with matplotlib draw Chinese as boxes. By free answer where models were asked for one,
    with a column for what is no label word.
    """
    by = "answers" if report["generated"] else "likelihood"
    names, font = _names(report["words"], report["labels"], list(report["models"]))
    columns = [*names, "other"] if by == "answers" else names
    panels = [(model, figures[by]) for model, figures in report["models"].items()]
    size = 1.1 * len(columns) + 1.6
    figure = Figure(figsize=(size * len(panels), 0.9 * len(names) + 1.8), layout="constrained")
    for index, (model, found) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        counts = [row[: len(columns)] for row in found["confusion"]]
        _draw(axes, counts, names, columns, font)
        # The same fonts again: a model may be called anything.
        title = model if model.isascii() or font else f"model {index + 1}"
        axes.set_title(
            f"{title}: accuracy {found['accuracy']['value']:.3f}", fontsize=10, font=font, parse_math=False
        )
        if index == 0:
            axes.set_ylabel("true class")
        axes.set_xlabel("free answer" if by == "answers" else "likeliest class")
    return png(figure)


def _draw(axes: Axes, counts: list[list[int]], names: list[str], columns: list[str], font: Any) -> None:
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, font=font, parse_math=False)
    axes.set_yticks(range(len(names)), names, font=font, parse_math=False)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            color = "white" if shares[row][column] > _DARK else "black"
            text = f"{count:,}\n{shares[row][column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def _names(words: list[str], labels: list[str], models: list[str]) -> tuple[list[str], Any]:
    """What classes are called in the picture, and the font that has all characters (None: any has)."""
    if all(word.isascii() for word in (*words, *models)):
        return words, None
    font = find_font("".join((*words, *models)))
    return (words, font) if font is not None else (labels, None)


def find_font(characters: str) -> font_manager.FontProperties | None:
    """A font of this machine that has all of the characters; None where there is none."""
    wanted = {ord(character) for character in characters if not character.isspace()}
    # Not matplotlib's own list: it is kept on the disk, without fonts that were installed later, and has a
    # font that draws every character as a box.
    for path in sorted(font_manager.findSystemFonts())[:_MOST_FONTS]:
        try:
            has = FT2Font(path).get_charmap()
        except (OSError, RuntimeError):
            continue  # a font that cannot be read is none
        if wanted <= has.keys():
            return font_manager.FontProperties(fname=path)
    return None
