"""Make the schemas known to Hydra: the first default of every file is `<group>/schema`."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.model import ModelConfig
from bc2exp.config.parallelism import ParallelismConfig
from bc2exp.config.root import Config
from bc2exp.config.tasks import TASKS


def register() -> None:
    """Put every schema into Hydra's store. May be called more than once."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="hardware", name="schema", node=HardwareConfig)
    store.store(group="parallelism", name="schema", node=ParallelismConfig)
    store.store(group="dataset", name="schema", node=DatasetConfig)
    for name, schema in TASKS.items():
        store.store(group="task", name=f"{name}_schema", node=schema)
