"""Weights in and out: the names and layouts of other programs, which the model itself knows none of."""

from bc2exp.weights.hf import load_hf, load_hf_into, save_hf

__all__ = ["load_hf", "load_hf_into", "save_hf"]
