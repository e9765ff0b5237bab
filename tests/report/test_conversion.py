"""The report of a conversion, from files alone."""

from __future__ import annotations

import json
from pathlib import Path

from bc2exp.report.conversion import lines, some, summarize_conversion

REPORT = {
    "kind": "safetensors",
    "format": "megatron",
    "target": "/x",
    "shape": {"num_layers": 32, "hidden_size": 4096, "num_heads": 32},
    "beside": ["tokenizer.model"],
    "files": 8,
    "tensors": 1560,
    "bytes": 15 * 2**30,
    "dtypes": {"bfloat16": 1560},
    "nan": [],
    "convert_s": 50.0,
    "verify_s": None,
}


def test_every_quantity_is_shown_with_its_name() -> None:
    shown = lines(REPORT)
    assert shown["from"] == "safetensors, 32 layers of 4,096, 32 heads"
    assert shown["weights"] == "15.00 GiB in 1,560 tensors, 8 files"
    assert shown["written in"] == "50.0 s, 322 MB/s"
    assert shown["compared in"].startswith("not compared")
    assert "NaN in" not in shown
    compared = lines({**REPORT, "verify_s": 25.0, "nan": ["a", "b"]})
    assert compared["compared in"] == "25.0 s, 644 MB/s; every bit is right"
    assert compared["NaN in"] == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_the_summary_is_written(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.jsonl").write_text('{"event": "done", "time": 1.0, "segment": 0}\n')
    assert summarize_conversion(tmp_path) == REPORT
    assert json.loads((tmp_path / "summary.json").read_text())["conversion"] == REPORT
