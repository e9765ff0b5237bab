"""Baichuan2: the network, its positions, its loss and its key-value cache."""

from bc2exp.model.baichuan2 import Baichuan2, NormHead, parameter_count
from bc2exp.model.cache import KeyValueCache
from bc2exp.model.initial import init_weights, initial_tensor
from bc2exp.model.loss import norm_head_loss_sum
from bc2exp.model.positions import alibi_slopes, rope_tables, segment_positions

__all__ = [
    "Baichuan2",
    "KeyValueCache",
    "NormHead",
    "alibi_slopes",
    "init_weights",
    "initial_tensor",
    "norm_head_loss_sum",
    "parameter_count",
    "rope_tables",
    "segment_positions",
]
