"""Logs of Megatron and ModelLink: every field, in every spelling that is about."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from tests.report.compare.logs import MODELLINK, lines, loss_at, read

LINE = (
    " iteration        7/    1000 | consumed samples:          224 | "
    "elapsed time per iteration (ms): 6973.0 | learning rate: 7.000E-08 | global batch size:    32 | "
    "lm loss: 1.134203E+00 | loss scale: 1.0 | grad norm: 9.811 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
FIELDS = {
    "train/loss": 1.134203,
    "train/grad_norm": 9.811,
    "train/lr": 7e-8,
    "perf/step_time_s": 6.973,
    "log/consumed samples": 224.0,
    "log/global batch size": 32.0,
    "log/loss scale": 1.0,
    "log/number of skipped iterations": 0.0,
    "log/number of nan iterations": 0.0,
}


def test_every_field_of_a_line_is_read(tmp_path: Path) -> None:
    side = read(tmp_path, LINE + "\n")
    assert side.kind == "Megatron log"
    assert side.series == {name: {7: pytest.approx(value)} for name, value in FIELDS.items()}
    assert side.columns.global_batch == 32
    assert side.notes == []


SPEEDS = " samples per second: 4.589 | tokens per gpu per second (tgs): 2349.6 | TFLOPs: 113.70 |"
VARIANTS = [
    (f"[2024-01-26 10:11:12]{LINE}", {}),
    (f" [default7]: {LINE}", {}),
    (f"7: {LINE}", {}),
    (LINE.replace("1000 |", "infinity |").replace("    infinity", "infinity"), {}),
    (
        LINE + SPEEDS,
        {
            "perf/samples_per_s": 4.589,
            "perf/tokens_per_s_per_device": 2349.6,
            "perf/tflops_per_device": 113.7,
        },
    ),
    (LINE + " throughput per GPU (TFLOP/s/GPU): 113.7 |", {"perf/tflops_per_device": 113.7}),
    (LINE + " throughput per GPU (TFLOP/s/GPU): 113.7/112.9 |", {"perf/tflops_per_device": 113.7}),
    (LINE.replace("iteration (ms): 6973.0", "iteration (s): 6.973"), {}),
    (LINE + " num zeros: 0.0 | params norm: 1024.5 |", {"log/num zeros": 0.0, "log/params norm": 1024.5}),
    (LINE + " actual seqlen:  4096 |", {"log/actual seqlen": 4096.0}),
    (LINE.replace("learning rate:", "learning rate").replace("lm loss:", "lm loss"), {}),
]


@pytest.mark.parametrize(("line", "more"), VARIANTS)
def test_releases_differ_in_what_they_print(line: str, more: dict[str, float], tmp_path: Path) -> None:
    side = read(tmp_path, line + "\n")
    assert side.series == {name: {7: pytest.approx(value)} for name, value in {**FIELDS, **more}.items()}


def test_nan_skipped_and_repeated_iterations(tmp_path: Path) -> None:
    skipped = " iteration 1/ 9 | learning rate: 0.0E+00 | loss scale: 8388608.0 |"
    one, other, nan = (LINE.replace("7/", f"{n}/").replace("1.134203E+00", v) for n, v in
                       [(2, "1.5E+00"), (2, "1.7E+00"), (3, "nan")])  # fmt: skip
    side = read(tmp_path, "\n".join([skipped, one, other, nan]) + "\n")
    assert side.series["train/loss"][2] == 1.5
    assert math.isnan(side.series["train/loss"][3])
    assert 1 not in side.series["train/loss"]
    assert side.series["log/loss scale"][1] == 8388608.0
    assert side.notes == ["1 iterations stand there more than once; the first of each counts"]


def test_a_line_that_is_cut_off_gives_no_half_number(tmp_path: Path) -> None:
    for end in range(len(LINE)):
        side = read(tmp_path, LINE + "\n" + LINE.replace("7/", "8/")[:end])
        for name, values in side.series.items():
            assert values.get(8, values[7]) == values[7], (name, end)


def test_arguments_evaluations_and_memory(tmp_path: Path) -> None:
    top = (
        "------------------------ arguments ------------------------\n"
        "  seq_length ...................................... 4096\n"
        "  world_size ...................................... 8\n"
        "  lr .............................................. 1e-06\n"
        "  params_dtype .................................... torch.bfloat16\n"
        "  sequence_parallel ............................... True\n"
        "  tensor_model_parallel_size ...................... 8\n"
        "  data_path ....................................... ['./dataset/alpaca']\n"
    )
    memory = "".join(
        f"[Rank {rank}] (after 7 iterations) memory (MB) | allocated: 9000.0 | max allocated: 20000 | "
        f"reserved: 21000.0 | max reserved: {20480 + 1024 * rank}\n"
        for rank in (0, 1)
    )
    evaluation = (
        " validation loss at iteration 7 on validation set | lm loss value: 9.5E-01 | lm loss PPL: 2.6 |\n"
    )
    side = read(tmp_path, f"{top}{LINE}\n{memory}{evaluation}")
    assert side.series["mem/peak_gib"] == {7: 21.0}
    assert side.peak_gib == 21.0
    assert side.series["eval/loss"] == {7: 0.95}
    assert side.config == {
        "dataset": {"sequence_length": 4096},
        "hardware": {"num_devices": 8, "precision": "bf16"},
        "parallelism": {"sequence_parallel": True, "tensor": 8},
        "task": {"global_batch": 32, "optimizer": {"lr": 1e-6}},
    }
    assert side.columns.samples_per_s.value == pytest.approx(32 / 6.973)
    assert side.columns.tokens_per_s_per_device.value == pytest.approx(32 / 6.973 * 512)
    assert side.columns.tokens_per_s_per_device.derived
    assert list(side.columns.identities()) == [], "what was derived confirms nothing"


def test_a_log_of_1000_steps_and_what_is_said_of_it(tmp_path: Path) -> None:
    text = lines(MODELLINK, range(1, 1001))
    side = read(tmp_path, text, num_devices=8, sequence_length=4096)
    assert side.series["train/loss"] == {n: pytest.approx(loss_at(n), rel=1e-6) for n in range(1, 1001)}
    assert side.columns.tokens_per_s_per_device.value == pytest.approx(2349.6, abs=0.1)
    with pytest.raises(UserError, match=r"task\.about_a\.global_batch=64: train\.log says 32 itself"):
        read(tmp_path, text, global_batch=64)
    with pytest.raises(UserError, match=r"task\.about_a\.row=x: train\.log is no published table"):
        read(tmp_path, text, row="x")


def test_a_log_that_contradicts_itself(tmp_path: Path) -> None:
    slow = LINE + SPEEDS.replace("4.589", "4.1")
    side = read(tmp_path, slow + "\n", num_devices=8, sequence_length=4096)
    broken = [check["name"] for check in side.columns.identities() if not check["holds"]]
    assert broken == ["samples/s x s/step = global batch", "tokens/s/p = samples/s x sequence / devices"]


@pytest.mark.parametrize("text", ["", "no training here\n", "{'a': 1}\n", " iteration 7/ 1000 |\n"])
def test_a_file_without_a_training_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.a=train\.log: holds no line of a training"):
        read(tmp_path, text)
