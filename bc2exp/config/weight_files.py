"""What a folder of weights holds, told from its names and its small JSON files; no tensor is read.

Asked at the door, and again by whoever reads the tensors. Folders come from strangers: a name in an index
may lead anywhere, so every file is found by `inside`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAFETENSORS, TORCH, MEGATRON = "safetensors", "torch", "megatron"
"""Kinds of folders: published weights as .safetensors or as .bin, and ModelLink's (Megatron's) shards."""

INDEXES = {SAFETENSORS: "model.safetensors.index.json", TORCH: "pytorch_model.bin.index.json"}
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
"""What our own conversion leaves: checksums, and the shape of the model."""
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
"""A folder of one rank: of tensor-parallel rank XX, and where there are several of stage YYY."""

_PATTERNS = {SAFETENSORS: "*.safetensors", TORCH: "pytorch_model*.bin"}
_MAX_JSON_BYTES = 64 * 2**20

SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
"""The sizes of a model: our name and that in config.json."""
_LARGEST = {"vocab_size": 2**31, "num_layers": 10_000}
_DEFAULT_SIZE_LIMIT = 2**20
DEFAULT_MAX_POSITIONS = 4096
DEFAULT_EPS = 1e-6
DEFAULT_THETA = 10000.0
_BAICHUAN1_VOCAB_SIZE = 64000


def weight_kind(folder: Path) -> str:
    """Which kind of weights `folder` holds; safetensors where it holds .bin files of the same, too.

    Raises ValueError where it holds none.
    """
    for kind, pattern in _PATTERNS.items():
        if os.path.lexists(folder / INDEXES[kind]) or any(folder.glob(pattern)):
            return kind
    if os.path.lexists(folder / TRACKER) or any(
        RANK.fullmatch(path.name) for path in folder.glob("mp_rank_*")
    ):
        return MEGATRON
    raise ValueError(
        "holds no weights: no *.safetensors, no pytorch_model*.bin, and no mp_rank_XX folders or "
        f"{TRACKER} of ModelLink"
    )


def tensor_files(folder: Path, kind: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files of published weights, sorted, and {tensor: name of its file} where there is an index.

    Raises ValueError for an index that is none, names a file outside the folder, or one that is missing.
    """
    index = folder / INDEXES[kind]
    if not os.path.lexists(index):
        return [inside(folder, path.name) for path in sorted(folder.glob(_PATTERNS[kind]))], None
    weight_map = read_json(inside(folder, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{index}: names no file for {tensor} but {name!r}")
    return [inside(folder, name) for name in sorted(set(weight_map.values()))], weight_map


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`: a plain file, in this very folder.

    A link may lead to another file of the folder, or, in a download cache of the usual layout
    (`snapshots/<revision>/` beside `blobs/`), to one of its blobs; nowhere else.

    Raises ValueError for anything else, and where there is no such file.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{folder}: names a file outside of itself: {name!r}")
    path, home = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise ValueError(f"{path}: is a link that leads out of the folder, to {real}; copy the file instead")
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is not a file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError for anything else, a name that is given twice and a file of more than 64 MiB included.
    """
    try:
        size = os.path.getsize(path)
        if size > _MAX_JSON_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, too many for what it should hold")
        with open(path, encoding="utf-8") as file:
            value = parse_json(file.read())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where an object gives a name twice, as readers disagree on it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} is given twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder of published weights.

    Raises ValueError where it is missing or no JSON object.
    """
    if not os.path.lexists(folder / "config.json"):
        raise ValueError(f"{folder / 'config.json'} does not exist: not a folder of published weights")
    return read_json(inside(folder, "config.json"))


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape in a config.json, as keyword arguments of the model.

    The published format has no field for the kind of positions: a folder with `max_position_embeddings` is
    of the 7B kind (rope), one without it of the 13B kind (ALiBi). `rope_theta` is our own field.

    Raises ValueError where it is not of a Baichuan2, or lacks a size, or has an impossible one.
    """
    if config.get("model_type") != "baichuan":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'baichuan'")
    missing = [theirs for theirs in SHAPE_FIELDS.values() if theirs not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for ours, theirs in SHAPE_FIELDS.items():
        size, limit = config[theirs], _LARGEST.get(ours, _DEFAULT_SIZE_LIMIT)
        if type(size) is not int or not 1 <= size <= limit:
            raise ValueError(f"config.json has {theirs}={size!r}; an integer from 1 to {limit} would do")
    if config["vocab_size"] == _BAICHUAN1_VOCAB_SIZE:
        # The first Baichuan has the same model_type and names, but a plain head: it would load, wrongly.
        raise ValueError("config.json is of the first Baichuan (64,000 words), which has no NormHead")
    for name, fine in (("tie_word_embeddings", False), ("hidden_act", "silu"), ("quantization_config", None)):
        if config.get(name, fine) != fine:
            raise ValueError(f"config.json has {name}={config[name]!r}; a Baichuan2 has {fine!r}")
    numbers = {
        "rms_norm_eps": config.get("rms_norm_eps", DEFAULT_EPS),
        "rope_theta": config.get("rope_theta", DEFAULT_THETA),
        "z_loss_weight": config.get("z_loss_weight", 0.0),
    }
    for name, number in numbers.items():
        if type(number) not in (int, float):
            raise ValueError(f"config.json has {name}={number!r}, which is no number")
    rope = "max_position_embeddings" in config
    shape = {ours: config[theirs] for ours, theirs in SHAPE_FIELDS.items()}
    if shape["hidden_size"] % (shape["num_heads"] * (2 if rope else 1)):
        raise ValueError(
            f"config.json has num_attention_heads={shape['num_heads']}, which does not divide "
            f"hidden_size={shape['hidden_size']}" + (" into even heads" if rope else "")
        )
    return {**shape, "position": "rope" if rope else "alibi", **numbers}


def max_positions_of(config: Mapping[str, Any]) -> int:
    """The longest sequence that the model of a config.json was made for."""
    found = config.get("max_position_embeddings", config.get("model_max_length", DEFAULT_MAX_POSITIONS))
    return found if type(found) is int and found > 0 else DEFAULT_MAX_POSITIONS


def shape_differences(there: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Each field in which a config.json's shape and a model choice are not the same model, in words.

    What the choice leaves open (null) differs in nothing. How a model is trained (z-loss) may differ.
    """
    fields = [*SHAPE_FIELDS, "position", "rms_norm_eps"]
    if there["position"] == "rope":
        fields.append("rope_theta")
    return [
        f"{SHAPE_FIELDS.get(field, field)} is {there[field]} in the folder, model.{field} is {model[field]}"
        for field in fields
        if field in model and model[field] is not None and model[field] != there[field]
    ]
