"""Text from a model: the next token again and again, with a key-value cache."""

from bc2exp.generation.decoding import Answer, decode
from bc2exp.generation.sampling import Sampling

__all__ = ["Answer", "Sampling", "decode"]
