"""Attention on Ascend NPUs, by torch_npu's fused operator.

    out = softmax(mask(scale * q k^T + bias)) v

What decides whether that is so, each from the operator's documentation (op-plugin, npu_fusion_attention and
_v2) and its sources:

- `scale` is 1 unless given, and a True in the mask hides, contrary to torch's own masks.
- Causality is a mask AND a mode: without a mask nothing is hidden, whatever the mode; in the mode used here
  the mask has 2048 x 2048 places whatever the length.
- A bias that is handed in as a tensor is added before the scale is multiplied. ALiBi is handed in as slopes
  instead (type 2): the kernel makes -slope * |key - query| of them and adds it after the scale. Under a
  causal mask that is slope * (key - query). It knows no more keys than queries then.
- Samples packed into a sequence are handed in as one long row of tokens (layout TND) with the ends of the
  segments, a list on the host: positions, and with them the bias, count within each.

Legend: B batch, N heads on this rank, S queries, K keys, D head dimension.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bc2exp.hardware import eager

MOST_HEADS, LARGEST_HEAD, MOST_SEGMENTS, MOST_TOKENS = 256, 768, 2048, 2**20
"""What the operator takes (op-plugin, npu_fusion_attention, constraints)."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)

_MASK_LENGTH = 2048
_CAUSAL = 3  # key <= query, from the bottom right; with as many keys as queries the same as from the top left
_SLOPES = 2


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """See `base.Attention`. Where the fused operator does not serve, the eager twin does: see `takes`."""
    ends = None if segment_ids is None or not takes(q, k) else segment_ends(segment_ids)
    if not takes(q, k) or (segment_ids is not None and ends is None):
        return eager.attention(q, k, v, segment_ids=segment_ids, slopes=slopes, scale=scale)
    return fused(q, k, v, ends=ends, slopes=slopes, scale=scale)


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the fused operator serves for q [B, N, S, D] and k [B, N, K, D].

    It is for training: as many keys as queries, more than one. A cache makes K > S, which slopes do not know.
    """
    batch, heads, length, dim = q.shape
    return (
        length == k.shape[-2]
        and length > 1
        and heads <= MOST_HEADS
        and dim <= LARGEST_HEAD
        and batch * length <= MOST_TOKENS
        and q.dtype in TYPES
    )


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, ends: list[int] | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """The operator itself, on what it `takes`. `ends`: of the segments among the B * S tokens, in order."""
    # The model's tensors lie as [B, S, N, D]: seen so, the operator needs no copies of them.
    rows = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    batch, length, heads, _ = rows[0].shape
    given: dict[str, Any] = {"atten_mask": causal_mask(q.device), "sparse_mode": _CAUSAL, "scale": scale}
    layout = "BSND"
    if ends is not None:
        rows, layout = [tensor.flatten(0, 1) for tensor in rows], "TND"
        given |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    if slopes is None:
        out = torch_npu.npu_fusion_attention(*rows, heads, layout, **given)[0]
    else:
        given |= {"pse": slopes.contiguous(), "pse_type": _SLOPES}
        out = torch_npu.npu_fusion_attention_v2(*rows, heads, layout, **given)[0]
    result: Tensor = out.view(batch, length, heads, -1).transpose(1, 2)
    return result


_masks: dict[torch.device, Tensor] = {}


def causal_mask(device: torch.device) -> Tensor:
    """The mask that the causal mode wants: bool [2048, 2048], True above the diagonal; 4 MiB, made once."""
    mask = _masks.get(device)
    if mask is None:
        # Made for inference, it could not be saved for a backward pass later.
        with torch.inference_mode(False):
            # In place: a second one would be the most that a small model takes at any moment.
            mask = torch.ones(_MASK_LENGTH, _MASK_LENGTH, dtype=torch.bool, device=device).triu_(1)
        if type(mask) is Tensor:  # not one without storage, which would be wrong in the next run
            _masks[device] = mask
    return mask


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def segment_ends(segment_ids: Tensor) -> list[int] | None:
    """Where the segments end among the tokens of `segment_ids` [B, S], counted through all rows.

    None where the operator cannot keep them apart: an id that comes back after another one in its row, or too
    many segments. They are read from the device once, and kept as long as the tensor lives unchanged: every
    layer of a pass, and the pass that recomputes it, ask again.
    """
    known = _known.get(segment_ids)
    if known is None or known[0] != segment_ids._version:
        known = segment_ids._version, _read_ends(segment_ids.tolist())
        _known[segment_ids] = known
    ends: list[int] | None = known[1]
    return ends


def _read_ends(rows: list[list[int]]) -> list[int] | None:
    lengths: list[int] = []
    for row in rows:
        runs = [(number, len(list(run))) for number, run in itertools.groupby(row)]
        if len({number for number, _ in runs}) < len(runs):
            return None
        lengths += [length for _, length in runs]
    return list(itertools.accumulate(lengths)) if len(lengths) <= MOST_SEGMENTS else None
