"""What lies beside weights and goes along with them: tokenizer and generation settings, never code."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bc2exp.config.weight_files import inside, read_json

TOKENIZER = "tokenizer.model"
_SETTINGS = ("generation_config.json",)
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MAX_TOKENIZER_BYTES = 256 * 2**20


def files_beside(source: Path, form: str, tokenizer: Path | None) -> dict[str, bytes]:
    """The files of `source` that belong into a target of the layout `form` (hf, llama, megatron), by name.

    `tokenizer` is a SentencePiece file that takes the place of the folder's own. In JSON files the key
    `auto_map`, which names code, is left out. The tokenizer's settings are for the class of the published
    folders, so a Llama gets none: with its own class transformers would encode differently.

    Raises ValueError for a file that is not what its name says, or leads out of the folder.
    """
    found: dict[str, bytes] = {}
    path = tokenizer
    if path is None and os.path.lexists(source / TOKENIZER):
        path = inside(source, TOKENIZER)
    if path is not None:
        if os.path.getsize(path) > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path}: has {os.path.getsize(path):,} bytes, too many for a tokenizer")
        found[TOKENIZER] = path.read_bytes()
    names = {"hf": (*_SETTINGS, *_TOKENIZER_SETTINGS), "llama": _SETTINGS}.get(form, ())
    for name in names:
        if os.path.lexists(source / name):
            settings = read_json(inside(source, name))
            settings.pop("auto_map", None)
            found[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return found
