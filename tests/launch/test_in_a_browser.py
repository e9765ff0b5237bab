"""What a person sees in a browser of a sweep of two trainings: MLflow's pages, and that of a comparison."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.browser import browser
from tests.launch.commands import STEPS, values
from tests.pages import commands
from tests.tracking.servers import served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two trainings, a server, a browser

GUIDE = "docs/guides/tracking.md"
"""Its command makes the sweep, and its picture is made here."""

PICTURES = os.environ.get("BC2EXP_PICTURES")
"""A folder for the pictures of the guide; without it they are made, looked at for their size, and dropped."""


@pytest.fixture(scope="module")
def site(launches):
    """The launch folder of a sweep of two jobs and of their comparison, both over."""
    with browser() as page:  # skips before anything is trained
        page.size(1500, 700)
        launch = launches("site")
        (typed,) = [line for line in commands(GUIDE) if " -m task.steps" in line]
        sweep = launch.run(*shlex.split(typed)[3:], "tracking.enabled=true", *STEPS[1:])
        jobs = sorted(launch.folder.glob("runs/sweep/*/[01]"))
        sides = [f"task.{side}={job}" for side, job in zip("ab", jobs, strict=True)]
        launch.run("task=compare", *sides, "hydra.run.dir=comparison", code=1)
        yield SimpleNamespace(launch=launch, page=page, jobs=jobs, line=sweep.out.splitlines()[-1])


def picture(page, name: str, folder: Path) -> None:
    path = (Path(PICTURES) if PICTURES else folder) / name
    page.shot(path)
    assert 10_000 < path.stat().st_size < 300_000


def test_mlflow_shows_the_jobs_below_their_sweep_and_their_losses_on_one_chart(site, tmp_path):
    page, words = site.page, shlex.split(site.line.removeprefix("mlflow "))
    assert words[:2] == ["mlflow", "ui"]
    with served(tmp_path, *words[1:]) as address:
        record = json.loads((site.jobs[0] / "tracking.json").read_text())
        experiment = f"{address}/#/experiments/{record['experiment_id']}"
        page.open(experiment)
        page.click(
            "[...document.querySelectorAll('span, label, button')].find(each => "
            "each.innerText === 'Model training')"
        )
        page.open(f"{experiment}/runs?compareRunsMode=CHART")
        runs = "[...document.querySelectorAll('a[href*=\"/runs/\"]')]"
        page.wait(f"{runs}.some(each => each.innerText.startsWith('sweep-'))")
        # The jobs are folded away below their sweep.
        assert page.value(f"{runs}.filter(each => each.innerText.startsWith('tiny_7b-')).length") == 0
        page.value("document.querySelector('[aria-label=Close]')?.click()")
        page.click(f"{runs}[0].closest('.ag-cell-value').querySelector('button')")
        page.wait(f"{runs}.filter(each => each.innerText.startsWith('tiny_7b-')).length === 2")
        page.type("document.querySelector('input[placeholder^=\"Search metric\"]')", "train/loss")
        plots = "[...document.querySelectorAll('.js-plotly-plot')]"
        drawn = f"{plots}[0].data.filter(line => line.x?.length === 30)"
        page.wait(f"{plots}.length === 1 && new Set({drawn}.map(line => line.uuid)).size === 2")
        lines = page.value(f"{drawn}.map(line => [line.uuid, line.metricKey, [...line.x], [...line.y]])")
        strokes = f"[...{plots}[0].querySelectorAll('path.js-line')].map(line => line.style.stroke)"
        assert len(set(page.value(strokes))) == 2
        picture(page, "mlflow_sweep.png", tmp_path)
        assert {metric for _, metric, _, _ in lines} == {"train/loss"}
        for job in site.jobs:
            record = json.loads((job / "tracking.json").read_text())
            found = [(x, y) for run, _, x, y in lines if run == record["run_id"]]
            losses = values(job, "train/loss")
            assert found
            assert all(x == list(losses) for x, _ in found)
            assert all(y == pytest.approx(list(losses.values())) for _, y in found)
        # Its checkpoints, ranked by what they were worth, none of them uploaded.
        page.open(f"{experiment}/models")
        page.wait("document.body.innerText.includes('step-00000028')")
        text = page.text()
        picture(page, "mlflow_models.png", tmp_path)
        assert text.count("step-00000030") == 2
        assert "train/loss" in text


def test_the_page_of_a_comparison_needs_nothing_else(site, tmp_path):
    page, file = site.page, site.launch.folder / "comparison" / "compare.html"
    page.size(1100, 1500)
    page.open(file.as_uri())
    page.wait("document.querySelector('svg .curve-a, svg.curve-a, path.curve-a')")
    for name in ("a", "b"):
        points = page.value(
            f"document.querySelector('path.curve-{name}').getAttribute('d').split(/[ML]/).length - 1"
        )
        assert points == 30, name
    assert page.value("document.querySelectorAll('path.curve-error').length") >= 1
    report = json.loads((file.parent / "compare.json").read_text())
    text = page.text()
    assert report["a"]["name"] in text
    assert report["b"]["name"] in text
    assert "2%" in text.replace(" ", "") or "2 %" in text
    assert page.requests == [file.as_uri()]
    assert page.errors == []
    picture(page, "compare.png", tmp_path)
