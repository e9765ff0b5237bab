"""A model that is there already, laid out to answer: what `task.model` and `task.models` name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.model import ModelConfig
from bc2exp.config.model_folders import RESOLVED, ModelFolder, find_model_folder
from bc2exp.config.parallelism import AXES, degrees
from bc2exp.config.root import Config
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.model.initial import initial_tensor
from bc2exp.parallel.layout import Layout, lay_out_copies
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.tasks import build
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.state import load_weights
from bc2exp.weights.hf import read_shape


@dataclass(frozen=True)
class Answerer:
    """A model that is not trained, and its tokenizer."""

    layout: Layout
    tokenizer: Tokenizer


def make_copies_mesh(config: Config, world: World) -> Mesh:
    """The ranks: those of the configured tensor axis share a model, all others have copies of it."""
    wanted = {axis: getattr(config.parallelism, axis) for axis in AXES}
    tensor = degrees(wanted, world.size)["tensor"]
    return Mesh(world, replicate=world.size // tensor, tensor=tensor)


def open_model(
    config: Config, source: str | None, key: str, mesh: Mesh, init_std: float, journal: Journal | NullJournal
) -> Answerer:
    """Load a model over the ranks of `mesh`; every rank must call it.

    Args:
        config: says what a model without a folder is, and with which tokenizer one answers that has none.
        source: published weights, a run, a checkpoint of one; None: the model of the configuration.
        key: what errors begin with.
        mesh: of `make_copies_mesh`.
        init_std: of fresh weights.
        journal: notes of a vocabulary larger than the tokenizer's.

    Raises:
        UserError: what lies there is no model, or not one that these ranks can share.
    """
    found = None
    if source is None and config.model.weights is not None:
        source, key = config.model.weights, "model.weights"
    if source is not None:
        found = find_model_folder(Path(source), f"{key}={source}")
        key = f"{key}={source}"
    tokenizer = Tokenizer(_tokenizer_of(found, config.model))
    shape = _shape_of(found, config.model, tokenizer, key)
    _require(shape, tokenizer, key, mesh, journal)
    with torch.device("meta"):
        model = Baichuan2(**shape, ops=build.make_ops(config.hardware, mesh.world))
    layout = lay_out_copies(model, mesh, precision=config.hardware.precision.value)
    layout.take_storage()
    if found is None:
        for name in layout.own_names():
            value = initial_tensor(name, layout.parts.shapes[name], seed=config.seed, std=init_std)
            layout.assign(name, value)
    elif found.run is not None:
        load_weights(layout, found.weights)
    else:
        build.load(layout, found.weights, key.partition("=")[0])
    return Answerer(layout, tokenizer)


def _tokenizer_of(found: ModelFolder | None, model: ModelConfig) -> Path:
    """The model's own where it has one, else the configuration's."""
    if found is None:
        return find_tokenizer(model.tokenizer, model.weights)
    if found.run is not None:
        trained = _trained(found.run)
        return find_tokenizer(trained.tokenizer, trained.weights)
    return found.tokenizer or find_tokenizer(model.tokenizer, None)


def _shape_of(
    found: ModelFolder | None, model: ModelConfig, tokenizer: Tokenizer, key: str
) -> dict[str, Any]:
    """The keyword arguments of the network, less `ops`."""
    if found is not None and found.run is None:
        try:
            return read_shape(found.weights)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
    if found is not None and found.run is not None:
        model = _trained(found.run)
    return build.shape_of(model, tokenizer.vocab_size if model.vocab_size is None else model.vocab_size)


def _trained(run: Path) -> ModelConfig:
    """The model of a run."""
    resolved = OmegaConf.load(run / RESOLVED)
    assert isinstance(resolved, DictConfig)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), resolved.model))
    assert isinstance(model, ModelConfig)
    return model


def _require(
    shape: dict[str, Any], tokenizer: Tokenizer, key: str, mesh: Mesh, journal: Journal | NullJournal
) -> None:
    """The tokenizer fits the model, and the model can be shared by the tensor-parallel ranks."""
    rows, pieces = shape["vocab_size"], tokenizer.vocab_size
    if pieces > rows:
        raise UserError(
            f"{key}: has {rows} rows, the tokenizer {tokenizer.path} {pieces} pieces; use the tokenizer that "
            "the model was made with"
        )
    if pieces < rows:
        journal.event("note", text=f"the tokenizer has {pieces} pieces, the model {rows} rows")
    if shape["num_heads"] % mesh.tensor:
        raise UserError(
            f"parallelism.tensor={mesh.tensor}: does not divide the {shape['num_heads']} heads of {key}"
        )
