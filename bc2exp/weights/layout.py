"""A layout of weights as data: which rows and columns of which parameters each stored tensor holds.

Every format here stores tensors that are pieces of the model's parameters, one below the other. A `Plan` says
which; it is read in both directions: a writer walks through its tensors, and `Weights` finds the pieces of a
parameter in them. Parameters are named as in the model, where query, key and value are matrices of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20
"""About how much of a tensor is in memory at a time."""


@dataclass(frozen=True)
class Part:
    """A piece of a parameter.

    Attributes:
        name: the parameter.
        rows: first row and the one after the last.
        columns: the same; None for a parameter of one dim.
        repeated: it is held elsewhere, too, and is read there.
        unit: each row is divided by its length (L2), as NormHead does.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    repeated: bool = False
    unit: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.rows[1] - self.rows[0]

    def chunks(self, row_bytes: int) -> Iterator[Part]:
        """The same in pieces of about CHUNK_BYTES."""
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(*self.rows, step):
            yield replace(self, rows=(start, min(start + step, self.rows[1])))


Plan = Mapping[str, tuple[Part, ...]]
"""Stored tensors by name: the parts that lie in each, from its first row to its last."""


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """All of a parameter."""
    return Part(name, (0, shape[0]), (0, shape[1]) if len(shape) > 1 else None)


def stored_shape(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """The shape of a stored tensor."""
    rows, columns = sum(part.num_rows for part in parts), parts[0].columns
    return (rows,) if columns is None else (rows, columns[1] - columns[0])


def model_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of this shape, and its own shape, in the order of the network."""
    vocab, hidden, inner = shape["vocab_size"], shape["hidden_size"], shape["intermediate_size"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, hidden)}
    for index in range(shape["num_layers"]):
        shapes |= {f"layers.{index}.{name}.weight": size for name, size in layer.items()}
    return {**shapes, "norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


@dataclass(frozen=True)
class _Segment:
    """Where a piece of a parameter lies: in the stored tensor `key`, from its row `at` on."""

    part: Part
    key: str
    at: int


class Weights:
    """A folder of weights, opened and found to be right; its tensors are mapped, not in memory.

    Attributes:
        shape: keyword arguments of the model.
        max_positions: the longest sequence it was made for.
        tensors: the stored tensors by name. Do not write to them.
    """

    def __init__(
        self, plan: Plan, tensors: Mapping[str, Tensor], shape: Mapping[str, Any], max_positions: int
    ) -> None:
        self.shape, self.max_positions, self.tensors = dict(shape), max_positions, tensors
        self.shapes = model_shapes(shape)
        self._segments: dict[str, list[_Segment]] = {name: [] for name in self.shapes}
        for key, parts in plan.items():
            at = 0
            for part in parts:
                if not part.repeated:
                    self._segments[part.name].append(_Segment(part, key, at))
                at += part.num_rows

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter."""
        return reduce(torch.promote_types, {self.tensors[found.key].dtype for found in self._segments[name]})

    def read(self, name: str, *part: slice) -> Tensor:
        """The part of a parameter: its rows, and where it has any its columns; all without them.

        A view of the mapped file where the part lies in one piece, else put together in memory.
        """
        spans = [range(size)[piece] for size, piece in zip(self.shapes[name], part, strict=False)]
        spans += [range(size) for size in self.shapes[name][len(spans) :]]
        pieces = [piece for piece in (self._cut(each, spans) for each in self._segments[name]) if piece]
        if len(pieces) == 1 and pieces[0][1].shape == torch.Size(map(len, spans)):
            return pieces[0][1]
        out = torch.empty(tuple(map(len, spans)), dtype=self.dtype(name))
        for place, piece in pieces:
            out[place].copy_(piece)
        assert sum(piece.numel() for _, piece in pieces) == out.numel(), name
        return out

    def _cut(self, segment: _Segment, spans: list[range]) -> tuple[tuple[slice, ...], Tensor] | None:
        """What of a segment lies in the spans: where it goes in the result, and the values."""
        bounds = [segment.part.rows, segment.part.columns][: len(spans)]
        place: list[slice] = []
        source: list[slice] = []
        for span, bound in zip(spans, bounds, strict=True):
            assert bound is not None
            start, stop = max(span.start, bound[0]), min(span.stop, bound[1])
            if start >= stop:
                return None
            offset = segment.at if not place else 0
            place.append(slice(start - span.start, stop - span.start))
            source.append(slice(offset + start - bound[0], offset + stop - bound[0]))
        return tuple(place), self.tensors[segment.key][tuple(source)]


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the tensors found, by name; empty if nothing is."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of a wrong shape": misshapen}
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
