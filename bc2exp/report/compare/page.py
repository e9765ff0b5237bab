"""A comparison as one HTML file: it needs no network, and no other file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bc2exp.storage import atomic

PAGE = "compare.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*REPORT*/null"


def write_page(report: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `compare.html` into `folder`; returns its path."""
    template = _TEMPLATE.read_text("utf-8")
    assert template.count(_PLACE) == 1
    # The names in it are a person's: "<" could end the script that holds them.
    data = json.dumps(report, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    path = Path(folder) / PAGE
    atomic.write_text(path, template.replace(_PLACE, data))
    return path
