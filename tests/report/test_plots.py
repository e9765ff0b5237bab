"""The picture of the loss is a whole PNG, drawn from the journal, and warns about nothing."""

from __future__ import annotations

import io
import warnings

import matplotlib.image
import numpy as np
import pytest

from bc2exp.report.plots import _smooth, plot_loss


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours(path):
    """The set of colours in a PNG, as 0xRRGGBB."""
    pixels = (matplotlib.image.imread(io.BytesIO(path.read_bytes()))[..., :3] * 255).round().astype(np.int64)
    return set(np.unique(pixels @ [65536, 256, 1]).tolist())


def test_the_parts_of_the_picture(run_folder):
    folder = run_folder()
    assert plot_loss(folder) == folder / "loss.png"
    assert {0x0072B2, 0xD55E00, 0x555555} <= colours(folder / "loss.png")
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "metrics.jsonl", "resolved.yaml"]


def test_no_evaluation_and_no_entropy(run_folder, line, tmp_path):
    target = plot_loss(run_folder([line(step, 7.0) for step in range(1, 31)]), tmp_path / "a.png")
    assert 0x0072B2 in colours(target)
    assert 0xD55E00 not in colours(target)


def test_a_long_run_with_values_that_are_not_finite(run_folder, line):
    records = [line(step, 7.0) for step in range(1, 301)]
    records[7]["metrics"]["train/loss"] = "nan"
    records[9]["metrics"]["train/loss"] = "inf"
    assert 0x0072B2 in colours(plot_loss(run_folder(records)))


def test_a_run_without_a_loss(run_folder):
    folder = run_folder([])
    assert 0x555555 in colours(plot_loss(folder))


@pytest.mark.parametrize("name", ["实验", "a$b$c_{"])
def test_any_folder_name(run_folder, name):
    folder = run_folder()
    plot_loss(folder.rename(folder.with_name(name)))


def test_smoothing_is_a_centred_mean():
    assert _smooth([1.0, 2.0, 6.0, 4.0, 5.0], 1) == pytest.approx([3.0, 4.0, 5.0])
    line = [3.0 * i for i in range(50)]
    assert _smooth(line, 5) == pytest.approx(line[5:-5]), "no lag on a slope"
