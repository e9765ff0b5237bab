"""What is read is what was written, or DamagedCheckpoint says which tensor of which file is not."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bc2exp.storage import tensors
from bc2exp.storage.tensors import DamagedCheckpoint


@pytest.fixture
def written():
    """Tensors of many kinds: {file: {name: tensor}}."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "model.safetensors": {
            "weight": base.to(torch.bfloat16),
            "transposed": base.t(),
            "row": base[2],
            "rows": base[1:3],
            "scalar": torch.tensor(3.5, dtype=torch.float64),
        },
        "optimizer.safetensors": {
            "step": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "nan": torch.tensor([float("nan"), float("inf")]),
        },
    }


@pytest.fixture
def folder(tmp_path, written):
    tensors.save_tensors(tmp_path / "step-00000007", written, {"step": 7, "数": [1, 2], "by": {3: 0.1}})
    return tmp_path / "step-00000007"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_round_trip(folder, written):
    read, extra = tensors.load_tensors(folder)
    assert extra == {"step": 7, "数": [1, 2], "by": {"3": 0.1}}
    assert os.listdir(folder.parent) == [folder.name]
    assert {file: set(names) for file, names in read.items()} == {f: set(n) for f, n in written.items()}
    for file, names in written.items():
        for name, tensor in names.items():
            assert read[file][name].dtype == tensor.dtype
            assert torch.equal(torch.nan_to_num(read[file][name]), torch.nan_to_num(tensor)), name
    assert tensors.verify(folder)["extra"] == extra


def test_a_part_of_a_file(folder, written):
    manifest = tensors.read_manifest(folder)
    read = tensors.load_file(folder, "model.safetensors", manifest, ["row"])
    assert list(read) == ["row"]
    assert torch.equal(read["row"], written["model.safetensors"]["row"])


@pytest.mark.parametrize("name", ["weight", "transposed", "row", "scalar"])
def test_a_flipped_bit_is_named(folder, name):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + header])[name]["data_offsets"]
    flip(path, 8 + header + begin)
    with pytest.raises(DamagedCheckpoint, match=rf"model\.safetensors: tensor '{name}': the checksum"):
        tensors.verify(folder)


def test_any_flipped_bit_of_a_header_is_an_error(folder, written):
    path = folder / "model.safetensors"
    original = path.read_bytes()
    header = int.from_bytes(original[:8], "little")
    for position in range(8 + len(original[8 : 8 + header].rstrip())):
        flip(path, position)
        # A flip inside the metadata, which safetensors ignores, may pass if every tensor is right.
        with contextlib.suppress(DamagedCheckpoint):
            read, _ = tensors.load_tensors(folder)
            for name, tensor in written["model.safetensors"].items():
                assert torch.equal(read["model.safetensors"][name], tensor)
        path.write_bytes(original)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(folder, kept):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors"):
        tensors.load_tensors(folder)


def test_a_missing_file(folder):
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors"):
        tensors.verify(folder)


@pytest.mark.parametrize("change", ["dtype", "shape", "other name"])
def test_a_valid_file_that_is_not_the_one_written(folder, change):
    path = folder / "model.safetensors"
    read = load_file(path)
    if change == "dtype":
        read["weight"] = read["weight"].view(torch.float16)  # the same bytes
    elif change == "shape":
        read["weight"] = read["weight"].reshape(4, 6)
    else:
        read["heavy"] = read.pop("weight")
    save_file(read, path)
    manifest = tensors.read_manifest(folder)
    manifest["files"]["model.safetensors"]["bytes"] = path.stat().st_size
    tensors.write_manifest(folder, manifest["files"])
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: tensor '(weight|heavy)'"):
        tensors.verify(folder)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"3", b"\xff\xfe", b"{}"])
def test_a_missing_or_garbled_manifest(folder, content):
    path = folder / tensors.MANIFEST
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        tensors.load_tensors(folder)


def test_a_changed_number_in_the_manifest(folder):
    path = folder / tensors.MANIFEST
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(DamagedCheckpoint, match="its own checksum"):
        tensors.read_manifest(folder)


def test_a_folder_is_never_overwritten_and_a_failure_leaves_none(tmp_path, folder, written):
    with pytest.raises(FileExistsError):
        tensors.save_tensors(folder, written)
    with pytest.raises(TypeError):
        tensors.save_tensors(tmp_path / "new", written, {"not json": object()})
    assert os.listdir(tmp_path) == [folder.name]
