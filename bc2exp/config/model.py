"""The model group: the shape of a Baichuan2, its files, and the recipes that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bc2exp.config.fields import setting


class Position(Enum):
    """How a model knows order: rotary embeddings (7B) or attention with linear biases (13B)."""

    rope = "rope"
    alibi = "alibi"


class Schedule(Enum):
    """The course of the learning rate after the warmup."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class Recipe:
    """The numbers with which a model is trained. Tasks read them by interpolation."""

    sequence_length: int = setting("tokens a sample", minimum=2)
    global_batch: int = setting("samples an optimizer step, over all devices", minimum=1)
    micro_batch: int | None = setting("samples a forward pass on one device; null: a rank's share", minimum=1)
    steps: int | None = setting("optimizer steps; null: by epochs", minimum=1)
    epochs: float | None = setting("passes over the training data; null: by steps", above=0)
    lr: float = setting("highest learning rate", above=0)
    min_lr: float = setting("learning rate at the end of the schedule", minimum=0)
    schedule: Schedule = setting("course after the warmup")
    warmup_steps: int | None = setting("steps of linear warmup; null: by fraction", minimum=0)
    warmup_fraction: float | None = setting("warmup as a part of all steps", minimum=0, maximum=1)
    beta1: float = setting("AdamW: decay of the first moment", minimum=0, below=1)
    beta2: float = setting("AdamW: decay of the second moment", minimum=0, below=1)
    eps: float = setting("AdamW: added to the root of the second moment", above=0)
    weight_decay: float = setting("AdamW: decoupled decay of every weight but the norms", minimum=0)
    clip_norm: float | None = setting("highest global gradient norm; null: no clipping", above=0)
    init_std: float = setting("standard deviation of fresh weights", above=0)
    eval_every: int | None = setting("steps between evaluations; null: only at the end", minimum=1)
    save_every: int | None = setting("steps between checkpoints; null: only at the end", minimum=1)


@dataclass
class Recipes:
    """One recipe a training task."""

    pretrain: Recipe = setting("next-token training on plain text")
    finetune: Recipe = setting("supervised fine-tuning")


@dataclass
class ModelConfig:
    """A Baichuan2: shape, files, recipes."""

    name: str = setting("name of the model, used for runs and folders")
    vocab_size: int | None = setting(
        "rows of embedding and head; null: the tokenizer's", minimum=8, maximum=2**31
    )
    hidden_size: int = setting("width of the residual stream", minimum=1, maximum=2**20)
    intermediate_size: int = setting("width inside the feed-forward network", minimum=1)
    num_layers: int = setting("transformer blocks", minimum=1)
    num_heads: int = setting("attention heads; divides hidden_size", minimum=1)
    position: Position = setting("rope (7B) or alibi (13B)")
    max_positions: int = setting("longest sequence the model was made for", 4096, minimum=2)
    rms_norm_eps: float = setting("added to the variance in RMSNorm", 1e-6, above=0)
    rope_theta: float = setting("base of the rotary frequencies (rope only)", 10000.0, above=0)
    z_loss_weight: float = setting("weight of mean(max logit squared) in the loss", 0.0, minimum=0)
    tokenizer: str | None = setting(
        "tokenizer.model or a folder that holds one; null: model.weights' own, else the embedded one",
        None,
        path=True,
    )
    weights: str | None = setting(
        "folder of weights, published (.safetensors, .bin) or ModelLink's shards; null: fresh weights",
        None,
        path=True,
    )
    recipes: Recipes = setting("the recipes of this model")
