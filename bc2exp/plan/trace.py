"""One layer, one embedding, one head, run on tensors without storage, and every allocation counted.

Nothing here follows a formula: the model's own code runs, forward and backward, cut as a rank would have it,
in a process group without peers. What stays alive after forward is what backward needs; the highest point of
either pass is what it takes on top.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bc2exp.hardware.base import Ops
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.recompute import set_recompute
from bc2exp.parallel.tensor import cut_layers

FP32 = 4


@dataclass(frozen=True)
class Pass:
    """What one module takes in a forward and a backward pass of a micro batch, bytes.

    Attributes:
        kept: alive after forward, its output included, its input not.
        forward_peak, backward_peak: most alive at one time, `kept` included, input and state not.
        backward_peak_and_gradients: the same with the gradients of the module's weights, as they come.
        gradients: those.
        calls: {collective: times} of both passes.
        sent: {collective: bytes}: what a rank gives into them.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    backward_peak_and_gradients: int
    gradients: int
    calls: dict[str, int]
    sent: dict[str, int]


@dataclass(frozen=True)
class Passes:
    """The passes of the parts of a model.

    Attributes:
        embedding, layer: what they say; `head` is final norm, head and loss.
        hidden: bytes of the hidden states between layers, which stages hand on, too.
        casts: bytes of the memory in which the matrices are cast.
    """

    embedding: Pass
    layer: Pass
    head: Pass
    hidden: int
    casts: int


class Meter(TorchDispatchMode):
    """Counts the storage that operators make, while it is alive, and the collectives that they call."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.gradients = self.peak_and_gradients = 0
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these: they are state, or somebody else's."""
        for storage in _storages(*tensors):
            self._forget(storage._cdata)
            self._see(storage, counted=False)

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on it is state: leave it out, but of the peak with gradients."""
        self.gradients += sum(storage.nbytes() for storage in _storages(tensor))
        self.leave_out(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count_collective(func, args)
        for storage in _storages(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))):
            self._see(storage, counted=True)
        return result

    def _see(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes() if counted else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_and_gradients = max(self.peak_and_gradients, self.live + self.gradients)
        self._alive[key] = size, weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        size, _ = self._alive.pop(key, (0, None))
        self.live -= size

    def _count_collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__.strip("_").replace("_base", "").replace("_", "")
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        # a gather is given the part, a scatter the whole, the others have one tensor
        sizes = [tensor.numel() * tensor.element_size() for tensor in given]
        self.calls[name] += 1
        self.sent[name] += min(sizes) if "gather" in name else max(sizes)


def trace(
    shape: dict[str, Any],
    ops: Ops,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    wide: bool,
    narrow_gradients: bool,
    sequence_parallel: bool,
    recompute: str,
) -> Passes:
    """Run the parts of a model of `shape` (`Baichuan2.shape`) on a micro batch of rows x length tokens.

    `dtype` is what it computes in; the weights are in it, too, or `wide`: fp32, and cast where they are used.
    `narrow_gradients`: see `Baichuan2.hold_gradients`.
    The process group of `mesh` has no peers (`alone`). Every position has a label.
    """
    if mesh.tensor > 1:
        mesh.group("tensor")  # made before nothing is real any more
    sequence = length // mesh.tensor if sequence_parallel and mesh.tensor > 1 else length
    with FakeTensorMode(), _default_dtype(torch.float32 if wide else dtype):
        model = Baichuan2(**{**shape, "num_layers": 1}, ops=ops)
        model.compute_in(dtype)
        model.hold_gradients(narrow=narrow_gradients)
        if mesh.tensor > 1:
            cut_layers(model, mesh, sequence_parallel=sequence_parallel)
        set_recompute(model, recompute)
        head, norm = model.lm_head, model.norm
        assert model.embed_tokens is not None
        assert head is not None
        assert norm is not None
        ids = torch.zeros(rows, length, dtype=torch.int64)
        hidden = torch.zeros(rows, sequence, shape["hidden_size"], dtype=dtype)
        context = model._context(length, ids.device, None, None, None)

        def run_head(given: Tensor) -> Tensor:
            return head(norm(given), ids)

        head.every_row = True
        with torch.no_grad():
            model.layers["0"](hidden, context)  # what all layers share is there when one is measured
        embedding = _measure(model, model.embed_tokens, ids, ids)
        if model.embed_tokens.sparse:
            # A sparse tensor without values does not know how many rows it has.
            embedding = replace(embedding, gradients=ids.numel() * shape["hidden_size"] * FP32)
        return Passes(
            embedding=embedding,
            layer=_measure(
                model, lambda given: model.layers["0"](given, context), hidden, *_tensors(context)
            ),
            head=_measure(model, run_head, hidden, ids),
            hidden=hidden.numel() * hidden.element_size(),
            casts=0 if model.casts.memory is None else model.casts.memory.untyped_storage().nbytes(),
        )


def _measure(model: Baichuan2, run: Any, given: Tensor, *others: Tensor) -> Pass:
    meter = Meter()
    given = given.detach().clone()
    if given.is_floating_point():
        given.requires_grad_()
    shared = [] if model.casts.memory is None else [model.casts.memory]
    meter.leave_out(given, *others, *shared, *model.parameters())

    def is_state_now(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.is_gradient(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(is_state_now) for p in model.parameters()]
    with meter:
        output = run(given)
        kept, forward_peak = meter.live, meter.peak
        meter.peak = meter.peak_and_gradients = meter.live
        output.backward(torch.ones_like(output))
    for hook in hooks:
        hook.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(
        kept,
        forward_peak,
        meter.peak,
        meter.peak_and_gradients,
        meter.gradients,
        dict(meter.calls),
        dict(meter.sent),
    )


def _storages(*tensors: Tensor) -> list[torch.UntypedStorage]:
    parts = [(t._indices(), t._values()) if t.is_sparse else (t,) for t in tensors]
    return [tensor.untyped_storage() for part in parts for tensor in part]


def _tensors(context: Any) -> list[Tensor]:
    found = [context.slopes, *(context.rope or ())]
    return [tensor for tensor in found if tensor is not None]


@contextmanager
def alone(rank: int, size: int) -> Iterator[None]:
    """A process group of `size` ranks of which only this one, `rank`, exists: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = dist.is_initialized()
    assert not before, "a process group of real peers is there"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
