"""A file or a folder is there whole, or as it was before."""

from __future__ import annotations

import json
import os

import pytest

from bc2exp.storage import atomic


def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "记录.json"
    atomic.write_json(path, {"名": 1})
    atomic.write_json(path, {"名": 2})
    assert json.loads(path.read_text("utf-8")) == {"名": 2}
    assert "名" in path.read_text("utf-8")
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_that_dies_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def power_cut(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="the disk is gone"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_everything_is_on_the_disk_before_the_new_name(tmp_path, monkeypatch):
    source, final = tmp_path / ".new", tmp_path / "final"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("a")
    (source / "b").write_text("b")
    order = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    atomic.publish_folder(source, final)
    before, after = order[: order.index("rename")], order[order.index("rename") + 1 :]
    assert sorted(before) == sorted(str(source / name) for name in (".", "b", "sub", "sub/a"))
    assert after == [str(tmp_path)]
    assert (final / "sub" / "a").read_text() == "a"


def test_a_published_folder_is_never_replaced(tmp_path):
    (tmp_path / ".new").mkdir()
    (tmp_path / "final").mkdir()  # empty: a bare rename would replace it
    with pytest.raises(FileExistsError):
        atomic.publish_folder(tmp_path / ".new", tmp_path / "final")
    assert (tmp_path / ".new").is_dir()
