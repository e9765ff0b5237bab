"""Hostile and damaged folders: each is refused by name, runs nothing, and nothing is written anywhere."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bc2exp.config.errors import UserError
from bc2exp.tasks.convert import convert
from bc2exp.weights.megatron import open_megatron
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory
from tests.weights.folders import as_bin, published, rewrite, shards_by_hand, tensors_of

INDEX = "model.safetensors.index.json"
Break = Callable[[Path], None]
BREAKS: dict[str, tuple[Break, str]] = {}
"""What is done to a good folder (safetensors in one file), and what is told then."""


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


def hostile(told: str) -> Callable[[Break], Break]:
    def add(function: Break) -> Break:
        BREAKS[function.__name__] = (function, told)
        return function

    return add


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def edit_header(folder: Path, change: Callable[[dict], None], pad: int = 0) -> None:
    """Change the header of the one file; the tensors stay."""
    path = only_file(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + b"\0" * pad)


@hostile("names a file outside of itself: '../secret.safetensors'")
def index_that_leads_up(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes(only_file(folder).read_bytes())
    edit_index(folder, lambda index: index.update({"lm_head.weight": "../secret.safetensors"}))


@hostile("names a file outside of itself: '/etc/passwd'")
def index_with_an_absolute_path(folder: Path) -> None:
    edit_index(folder, lambda index: index.update({"lm_head.weight": "/etc/passwd"}))


@hostile("is a link that leads out of the folder")
def link_that_leads_out(folder: Path) -> None:
    path = only_file(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@hostile("config.json: is a link that leads out of the folder, to /etc/passwd")
def config_that_is_a_link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")


@hostile("tokenizer.model: is a link that leads out of the folder, to /etc/passwd")
def tokenizer_that_is_a_link(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("/etc/passwd")


@hostile("model-00001-of-00001.safetensors: is not a file")
def a_pipe_for_a_file(folder: Path) -> None:
    path = only_file(folder)
    path.unlink()
    os.mkfifo(path)


@hostile("overlaps the tensor before it")
def tensors_that_overlap(folder: Path) -> None:
    def overlap(header: dict) -> None:
        header["model.layers.0.input_layernorm.weight"]["data_offsets"] = [0, 256]

    edit_header(folder, overlap)


@hostile("its header claims 4,611,686,018,427,387,904 bytes")
def a_huge_header(folder: Path) -> None:
    path = only_file(folder)
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


@hostile("the name 'lm_head.weight' is given twice")
def a_tensor_given_twice(folder: Path) -> None:
    path = only_file(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()[:-1] + b',"lm_head.weight":{}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@hostile("its tensors have")
def bytes_behind_the_tensors(folder: Path) -> None:
    edit_header(folder, lambda header: None, pad=64)


@hostile("lm_head.weight has 76,800 bytes, its shape asks for 1,228,800")
def a_shape_that_is_too_large(folder: Path) -> None:
    edit_header(folder, lambda header: header["lm_head.weight"].update(shape=[4800, 64]))


@hostile("missing: model.norm.weight; unexpected: model.layers.4.mlp.up_proj.weight")
def tensors_missing_and_superfluous(folder: Path) -> None:
    def change(tensors: dict) -> None:
        tensors["model.layers.4.mlp.up_proj.weight"] = tensors.pop("model.norm.weight")

    rewrite(folder, change)


@hostile("of a wrong shape: lm_head.weight (299, 64) instead of (300, 64)")
def a_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()}))


@hostile("lm_head.weight is of type I64; weights are of F32, F16, BF16")
def a_wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].long()}))


@hostile("in the index only: model.extra.weight")
def index_with_a_tensor_too_many(folder: Path) -> None:
    edit_index(folder, lambda index: index.update({"model.extra.weight": only_file(folder).name}))


@hostile("config.json has num_hidden_layers=1000000000; an integer from 1 to 10000 would do")
def a_config_of_a_billion_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))


@hostile("config.json is no JSON")
def a_config_without_a_bottom(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def replace_by_bin(folder: Path, value: object) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    torch.save(value, folder / "pytorch_model.bin")


@hostile("pytorch_model.bin: holds posix.mkdir, which is not weights; it was not loaded")
def a_bin_that_runs_code(folder: Path) -> None:
    tensors = tensors_of(folder)
    replace_by_bin(folder, {**tensors, "lm_head.weight": Runs(folder.parent / "ran")})


@hostile("pytorch_model.bin: holds argparse.Namespace, which is not weights")
def a_bin_with_arguments(folder: Path) -> None:
    from argparse import Namespace

    replace_by_bin(folder, {"args": Namespace(a=1)})


@hostile("lm_head.weight is no plain tensor (torch.sparse_coo, cpu)")
def a_bin_with_a_sparse_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    replace_by_bin(folder, {**tensors, "lm_head.weight": tensors["lm_head.weight"].to_sparse()})


@hostile("is compressed, which torch never does")
def a_bin_that_grows(folder: Path) -> None:
    replace_by_bin(folder, tensors_of(folder))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@hostile("pytorch_model.bin cannot be read: is no zip file")
def a_bin_cut_short(folder: Path) -> None:
    replace_by_bin(folder, tensors_of(folder))
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its time and size."""
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def test_there_are_more_than_twelve() -> None:
    assert len(BREAKS) >= 20


@pytest.mark.parametrize("name", BREAKS)
def test_a_hostile_folder_is_refused_by_name_and_nothing_happens(tmp_path: Path, name: str) -> None:
    breaking, told = BREAKS[name]
    place = tmp_path / "place"
    place.mkdir()
    _, folder = published(place / "hf")
    (folder / "modeling_baichuan.py").write_text(f"import os; os.mkdir({str(place / 'ran')!r})")
    good = small_config(
        tmp_path / "run", "task=convert", f"task.source={folder}", f"task.target={place}/target"
    )
    whole = {path: load_file(path) for path in folder.glob("*.safetensors")}
    from safetensors.torch import save_file

    for path in (*whole, folder / INDEX):  # in one file
        path.unlink()
    only = folder / "model-00001-of-00001.safetensors"
    tensors = {key: value for part in whole.values() for key, value in part.items()}
    save_file(tensors, only, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, only.name)}))
    breaking(folder)
    before = everything_in(place)
    with pytest.raises(UserError) as error:
        convert(good, tmp_path / "run", ONE_RANK, Memory())
    assert told in str(error.value)
    assert str(error.value).startswith(f"task.source={folder}: ")
    assert "\n" not in str(error.value)
    assert everything_in(place) == before


def test_code_beside_good_weights_is_neither_run_nor_copied(tmp_path: Path) -> None:
    _, folder = published(tmp_path / "hf")
    (folder / "modeling_baichuan.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {"top_k": 5}
        known["auto_map"] = {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}
        (folder / name).write_text(json.dumps(known))
    words = ("task=convert", f"task.source={folder}", f"task.target={tmp_path}/target")
    convert(small_config(tmp_path / "run", *words), tmp_path / "run", ONE_RANK, Memory())
    assert not (tmp_path / "ran").exists()
    files = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    assert files["tokenizer.model"] == b"pieces"
    assert json.loads(files["tokenizer_config.json"]) == {"top_k": 5}
    assert not [name for name, data in files.items() if name.endswith(".py") or b"auto_map" in data]


def test_a_cache_of_downloads_is_no_stranger(tmp_path: Path) -> None:
    _, folder = published(tmp_path / "models--x" / "snapshots" / "0123abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "..", "blobs", str(number)))
    words = ("task=convert", f"task.source={folder}", f"task.target={tmp_path}/target")
    assert convert(small_config(tmp_path / "run", *words), tmp_path / "run", ONE_RANK, Memory()) == "done"


def hostile_shards(folder: Path, kind: str) -> str:
    """Spoil good shards; what is told then."""
    path = folder / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(path)
    if kind == "code":
        torch.save({**content, "rng_state": Runs(folder / "ran")}, path)
        return "holds posix.mkdir, which is not weights"
    if kind == "tracker":
        (folder / "latest_checkpointed_iteration.txt").write_text("../../etc")
        return "holds '../../etc', which is neither a number nor release"
    if kind == "link":
        path.rename(folder / "elsewhere.pt")
        path.symlink_to(folder / "elsewhere.pt")
        return "is a link that leads out of the folder"
    if kind == "rank":
        path.parent.rename(folder / "elsewhere")
        path.parent.symlink_to(folder / "elsewhere")
        return "mp_rank_01: is no folder of its own"
    assert kind == "virtual"
    torch.save({"model0": content["model"]}, path)
    return "virtual stages (model0, ...), which are not read"


@pytest.mark.parametrize("kind", ["code", "tracker", "link", "rank", "virtual"])
def test_hostile_shards_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    model, folder = published(tmp_path / "hf")
    shards_by_hand(tensors_of(folder), tmp_path / "shards", tensor=2, heads=8, divisible_by=1)
    told = hostile_shards(tmp_path / "shards", kind)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_megatron(tmp_path / "shards", model.shape)
    assert told in str(error.value)
    assert not (tmp_path / "shards" / "ran").exists()


def test_the_code_of_the_tests_would_run(tmp_path: Path) -> None:
    torch.save(Runs(tmp_path / "ran"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_bin_of_the_helpers_is_sound(tmp_path: Path) -> None:
    _, folder = published(tmp_path / "hf")
    as_bin(folder, tmp_path / "bin")
    words = (
        "task=convert",
        f"task.source={tmp_path}/bin",
        f"task.target={tmp_path}/target",
        "task.verify=true",
    )
    assert convert(small_config(tmp_path / "run", *words), tmp_path / "run", ONE_RANK, Memory()) == "done"
