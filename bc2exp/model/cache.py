"""The keys and values of earlier positions, for decoding token by token."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """What the model asks of a key-value cache; `KeyValueCache` answers it."""

    @property
    def length(self) -> int:
        """Positions held from earlier calls."""
        ...

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [batch, heads, new, head_dim]; returns all of them."""
        ...


class KeyValueCache:
    """Keys and values of up to `max_length` positions of every layer.

    Storage is taken at a layer's first update, in the shape, type and device that the layer hands in:
    the cache need not know how many heads this rank holds. It is written in place: no gradients.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Positions held by every layer (between two forwards: by all of them alike)."""
        return min(self._lengths.values(), default=0)

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [batch, heads, new, head_dim]; returns all so far [batch, heads, length, head_dim].

        Raises ValueError when the positions do not fit.
        """
        start = self._lengths.get(layer_index, 0)
        stop = start + k.shape[-2]
        if stop > self.max_length:
            raise ValueError(f"{stop} positions do not fit a key-value cache of {self.max_length}")
        if layer_index not in self._storage:
            shape = (*k.shape[:-2], self.max_length, k.shape[-1])
            self._storage[layer_index] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._storage[layer_index]
        keys[..., start:stop, :] = k
        values[..., start:stop, :] = v
        self._lengths[layer_index] = stop
        return keys[..., :stop, :], values[..., :stop, :]
