"""Logs of the Hugging Face Trainer, printed and as `trainer_state.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from tests.report.compare.logs import TRAINER, lines, loss_at, read

LINE = "{'loss': 1.1342, 'grad_norm': 9.811, 'learning_rate': 7e-08, 'epoch': 0.01}"
END = (
    "{'train_runtime': 100.0, 'train_samples_per_second': 4.589, 'train_steps_per_second': 0.143, "
    "'train_loss': 0.9, 'epoch': 1.0}"
)


def test_every_field_of_a_line_is_read(tmp_path: Path) -> None:
    side = read(tmp_path, LINE + "\n")
    assert side.kind == "Hugging Face log"
    assert side.series == {
        "train/loss": {1: 1.1342},
        "train/grad_norm": {1: 9.811},
        "train/lr": {1: 7e-8},
        "log/epoch": {1: 0.01},
    }


@pytest.mark.parametrize(
    "text",
    [
        f"  1%|          | 7/1000 [00:10<24:13,  1.46s/it]{LINE}\n",
        f"\r 1%| 7/1000\r{LINE}          \r\n",
        LINE.replace(": ", ": '").replace(", '", "', '").replace("}", "'}") + "\n",
        f"[INFO] {LINE}\n",
        f"config {{'a': {{'b': 1}}}}\n{LINE}\n",
    ],
)
def test_whatever_stands_around_it(text: str, tmp_path: Path) -> None:
    side = read(tmp_path, text)
    assert side.series["train/loss"] == {1: 1.1342}
    assert side.series["train/lr"] == {1: 7e-8}


def test_steps_are_counted(tmp_path: Path) -> None:
    text = lines(TRAINER, range(10, 101, 10)) + "{'eval_loss': 0.8, 'eval_runtime': 3.0, 'epoch': 1.0}\n"
    side = read(tmp_path, text, log_every=10)
    assert side.series["train/loss"] == {n: round(loss_at(n), 4) for n in range(10, 101, 10)}
    assert side.series["eval/loss"] == {100: 0.8}
    assert side.series["log/eval_runtime"] == {100: 3.0}
    assert side.notes == ["its lines bear no step: they are counted as every 10. step"]


def test_nan_is_read_and_text_is_never_run(tmp_path: Path) -> None:
    side = read(tmp_path, "{'loss': nan, 'learning_rate': 1e-6}\n{'loss': 1.0, 'note': __import__('os')}\n")
    assert math.isnan(side.series["train/loss"][1])
    assert side.series["train/loss"][2] == 1.0
    assert set(side.series) == {"train/loss", "train/lr"}


def test_the_speed_of_the_whole_run(tmp_path: Path) -> None:
    side = read(tmp_path, f"{LINE}\n{END}\n", global_batch=32, num_devices=8, sequence_length=4096)
    assert side.columns.samples_per_s.value == 4.589
    assert side.columns.s_per_step.value == pytest.approx(1 / 0.143)
    assert side.columns.tokens_per_s_per_device.value == pytest.approx(4.589 * 512)
    assert [check["holds"] for check in side.columns.identities()] == [True]
    other = read(tmp_path, f"{LINE}\n{END}\n", global_batch=64)
    assert [check["holds"] for check in other.columns.identities()] == [False]


STATE = {
    "global_step": 20,
    "max_steps": 312,
    "train_batch_size": 1,
    "log_history": [
        {"epoch": 0.1, "grad_norm": 9.8, "learning_rate": 1e-5, "loss": 1.5, "step": 10},
        {"epoch": 0.2, "grad_norm": 9.7, "learning_rate": 9e-6, "loss": float("nan"), "step": 20},
        {"epoch": 0.2, "eval_loss": 1.4, "step": 20},
        {"epoch": 0.2, "step": 20, "train_runtime": 9.0, "train_samples_per_second": 4.0, "total_flos": 1e9},
    ],
}


def test_trainer_state(tmp_path: Path) -> None:
    side = read(tmp_path, json.dumps(STATE), "trainer_state.json")
    assert side.series["train/loss"][10] == 1.5
    assert math.isnan(side.series["train/loss"][20])
    assert side.series["train/grad_norm"] == {10: 9.8, 20: 9.7}
    assert side.series["train/lr"] == {10: 1e-5, 20: 9e-6}
    assert side.series["log/epoch"] == {10: 0.1, 20: 0.2}
    assert side.series["eval/loss"] == {20: 1.4}
    assert side.series["log/total_flos"] == {20: 1e9}
    assert side.config == {"task": {"steps": 312, "micro_batch": 1}}
    assert side.columns.samples_per_s.value == 4.0


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"log_history": 3}', '{"log_history": [{"loss": 1}]}'])
def test_another_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.a=x\.json: is no trainer_state\.json"):
        read(tmp_path, text, "x.json")
