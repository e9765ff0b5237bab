"""What of Hydra's own settings a command line may hold: folders, and the plugins of a sweep.

The others either do nothing here or undo what the door promises (`hydra.mode=MULTIRUN` would start a sweep
that nobody checked, `hydra.searchpath=[...]` would lose experiments/).
"""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bc2exp.config.overrides import Word, parse, quote, quote_text

RUN_FOLDER = "hydra.run.dir"
SWEEP_FOLDERS = ("hydra.sweep.dir", "hydra.sweep.subdir")
PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler")


def is_folder(key: str) -> bool:
    """Whether a key names a folder."""
    return key == RUN_FOLDER or key in SWEEP_FOLDERS


def is_plugin_setting(key: str) -> bool:
    """Whether a key sets something of a launcher or a sweeper."""
    return key.startswith(("hydra.launcher.", "hydra.sweeper."))


def refuse_setting(word: Word, *, sweep: bool) -> str | None:
    """Why an override of a setting of Hydra's is not taken, in words; None for any other override."""
    key = word.key
    if key != "hydra" and not key.startswith(("hydra.", "hydra/")):
        return None
    known = is_folder(key) or key in PLUGIN_GROUPS or is_plugin_setting(key)
    if not known or key.startswith("hydra.sweeper.params"):
        taken = ", ".join((*SWEEP_FOLDERS, *PLUGIN_GROUPS))
        return f"{word.text}: of Hydra's settings these are taken: {RUN_FOLDER}; with -m {taken}"
    if sweep and (reason := _refuse_plugin(word)):
        return reason
    if key == RUN_FOLDER and sweep:
        return f"{word.text}: is the folder of one run; with -m name the sweep's ({SWEEP_FOLDERS[0]}=...)"
    if key != RUN_FOLDER and not sweep:
        return f"{word.text}: belongs to a sweep; it needs -m"
    return None


def _refuse_plugin(word: Word) -> str | None:
    """Why a choice or a setting of a sweep's plugin is not taken."""
    if word.key.startswith("hydra.launcher.") or (word.key == "hydra/launcher" and word.value != "basic"):
        return (
            f"{word.text}: each job has processes of its own, one job after the other; leave the key out, or "
            "let Slurm run them at the same time: sweep.sbatch=true"
        )
    if word.key in ("hydra.sweeper.storage", "hydra.sweeper.study_name"):
        return f"{word.text}: the ledger of the sweep keeps what its jobs came to; leave the key out"
    if word.key == "hydra/sweeper/sampler" and word.value == "grid":
        return f"{word.text}: draws a grid by chance, and no resume could tell it again; -m alone runs a grid"
    return None


def quote_folder(word: Word) -> str:
    """The folder as Hydra must read it; Hydra knows no home folder."""
    assert word.value is not None
    text = quote_text(word.value)
    return quote(os.path.expanduser(word.value)) if text != word.value else text


def refuse_folder(word: Word, folder: Path, config: DictConfig) -> str | None:
    """Why a folder cannot be used, in words; relative ones count from `folder`, references from `config`."""
    value = parse(f"{word.key}={quote_folder(word)}").value()
    if not isinstance(value, str) or not value.strip():
        return f"{word.text}: must be a folder"
    if "${hydra:" not in value:  # those are known only once Hydra runs
        try:
            value = str(OmegaConf.create({"folder": value}, parent=config).folder)
        except OmegaConfBaseException as error:
            return f"{word.text}: cannot be read ({str(error).splitlines()[0]})"
    path = folder / value
    taken = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if taken is not None and not taken.is_dir():
        return f"{word.text}: {taken} is a file, not a folder"
    return None
