"""Folders of weights in every training layout and back; what a rank reads, and what it holds meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bc2exp.parallel.shard import local
from bc2exp.tasks import build
from bc2exp.weights import save_hf
from bc2exp.weights.convert import convert
from bc2exp.weights.hf import open_hf
from bc2exp.weights.layout import Weights
from bc2exp.weights.targets import Megatron
from tests.parallel.problem import CASES, Case, laid_out, model_of
from tests.weights.folders import as_bin

TOKENIZER = SimpleNamespace(path=None)
SMALL = [name for name, case in CASES.items() if case.size <= 4]
LARGE = [name for name, case in CASES.items() if case.size > 4]


def through(world, kind, case, source, target):
    """Fill a layout from a folder as training does, export it; the elements this rank read."""
    counted = [0]
    read = Weights.read

    def counting(self, name, *part):
        found = read(self, name, *part)
        counted[0] += found.numel()
        return found

    Weights.read = counting
    try:
        layout = laid_out(world, kind, case)
        with torch.no_grad():
            for parameter in layout.model.parameters():
                local(parameter).fill_(7.0)
        build.fill(layout, SimpleNamespace(weights=str(source)), seed=0, init_std=0.1)
    finally:
        Weights.read = read
    shape = SimpleNamespace(**layout.model.shape, max_positions=64)
    shape.position = SimpleNamespace(value=shape.position)
    vocabulary = layout.model.shape["vocab_size"]
    build.export(layout, shape, vocabulary, TOKENIZER, target)
    mine = sum(local(parameter).numel() for parameter in layout.model.parameters())
    return counted[0], mine


def saved(kind: str, folder: Path) -> Path:
    """A folder of a model whose every weight counts."""
    model = model_of(kind)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(value.shape, generator=generator) for name, value in model.named_parameters()}
    save_hf(values, folder, config={**model.shape, "max_positions": 64}, dtype=torch.float32)
    return folder


def there_and_back(ranks, tmp_path: Path, name: str) -> None:
    for kind in ("7b", "13b"):
        source, target = saved(kind, tmp_path / kind), tmp_path / f"{kind} back"
        for read, mine in ranks(CASES[name].size, through, kind, CASES[name], source, target):
            assert read == mine  # no rank reads what is not its own
        for path in source.iterdir():
            assert path.read_bytes() == (target / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", SMALL)
def test_a_published_folder_goes_through_every_layout_unchanged(ranks, tmp_path, name):
    there_and_back(ranks, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_and_through_those_of_eight_ranks(ranks, tmp_path, name):
    there_and_back(ranks, tmp_path, name)


@pytest.mark.parametrize("form", ["bin", "shards"])
def test_training_begins_from_bin_files_and_from_shards(ranks, tmp_path, form):
    source = saved("7b", tmp_path / "hf")
    if form == "bin":
        as_bin(source, tmp_path / "bin")
    else:
        convert(open_hf(source), tmp_path / "shards", Megatron(4, 1, "proj", 8))
    case = CASES["tp2 x zero3 2"]
    for read, mine in ranks(case.size, through, "7b", case, tmp_path / form, tmp_path / "back"):
        assert read == mine
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name


EIGHT = [Case({"tensor": 8}), Case({"shard": 8}, {"zero_stage": 3})]
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2, "vocab_size": 8192}


def grown(world, source, case):
    """Anonymous memory that filling a layout takes, at its peak, and what this rank's share has; bytes."""
    layout = laid_out(world, "7b", case, **WIDE)
    layout.model.to("meta")
    gc.collect()
    peak = [0]
    put = type(layout).put

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))

    before = held()

    def measuring(self, name, part):
        put(self, name, part)
        peak[0] = max(peak[0], held() - before)

    type(layout).put = measuring
    try:
        build.fill(layout, SimpleNamespace(weights=str(source)), seed=0, init_std=0.1)
    finally:
        type(layout).put = put
    return peak[0], sum(local(parameter).nbytes for parameter in layout.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT, ids=["tp8", "zero3"])
@pytest.mark.parametrize("form", ["hf", "shards"])
def test_eight_ranks_hold_their_share_and_no_more_than_a_tensor(ranks, tmp_path, case, form):
    model = model_of("7b", **WIDE)
    values = {name: torch.randn(value.shape) for name, value in model.named_parameters()}
    save_hf(values, tmp_path / "hf", config=model.shape, dtype=torch.bfloat16)
    if form == "shards":
        convert(open_hf(tmp_path / "hf"), tmp_path / "shards", Megatron(4, 1, "proj", 128))
    largest = max(value.nbytes for value in values.values())
    for peak, share in ranks(8, grown, tmp_path / form, case):
        assert share < 4 * sum(value.numel() for value in values.values()) / 7
        assert peak < share + largest
