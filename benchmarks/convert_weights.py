"""Conversion of a checkpoint of a true model's shape, beside the disk's own copy and the whole-model way.

    python benchmarks/convert_weights.py [--folder SCRATCH] [--model 7b] [--layers 32] [--tensor 8]
                                         [--whole-layers 4] [--rounds 2]

Makes a synthetic published folder (bf16, cheap random data; 15 GB for the 7B shape, 28 GB for the 13B with
`--model 13b`) in a new folder of SCRATCH, else of the system's temporary folder: it should be on a disk and
needs room for three of the checkpoint. Then, each in a process of its own and from a cold page cache:

    copy          the disk's own speed: the files are read and written in pieces of 16 MiB, each then fsynced
    ours          HF -> ModelLink's shards (.pt) of TENSOR ranks, and those shards -> HF safetensors
    whole model   a smaller model (`--whole-layers`), HF -> shards: load all, split, save, without checksums;
                  ours beside it

Anonymous memory is RssAnon + RssShmem of the process, sampled every 20 ms, less what it was before the work
began; its limits are a rank's share and 0.5 GiB on the way to shards, 1 GiB back. `copy` runs before and
after each conversion, as a disk that others use varies. At the end of a round what came back is compared with
what went. Writes every sample, in seconds a GB, and the ratios to results/convert_weights.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402

SHAPES = {
    "7b": {
        "vocab_size": 125696,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "position": "rope",
    },
    "13b": {
        "vocab_size": 125696,
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_layers": 40,
        "num_heads": 40,
        "position": "alibi",
    },
}
PIECE = 16 * 2**20


def anonymous_bytes() -> int:
    """What this process holds that no file could give back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


class Peak:
    """The highest anonymous memory while a block runs, less that at its start."""

    def __enter__(self) -> Peak:
        self._before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self.begin = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begin
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes()) - self._before


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Put the files of a folder on the disk and out of the page cache."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make(folder: Path, shape: dict) -> None:
    """Write a checkpoint of random numbers; every tensor has its own."""
    import torch

    from bc2exp.weights import save_hf
    from bc2exp.weights.layout import model_shapes

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**25 + 1, generator=generator).mul_(0.02).to(torch.bfloat16)

    def tensors():  # type: ignore[no-untyped-def]
        for number, (name, size) in enumerate(model_shapes(shape).items()):
            count = 1
            for dim in size:
                count *= dim
            shift = number * 7919 % 2**20
            once = torch.cat((noise[shift:], noise[:shift]))
            yield name, once.repeat(-(-count // len(once)))[:count].view(size)

    save_hf(tensors(), folder, config=shape, dtype=torch.bfloat16)


def copy(source: Path, target: Path) -> dict:
    """Copy every file, as plainly as it goes."""
    target.mkdir()
    total, begin = 0, time.perf_counter()
    piece = bytearray(PIECE)
    for path in files_of(source):
        with open(path, "rb", buffering=0) as read, open(target / path.name, "wb", buffering=0) as written:
            while count := read.readinto(piece):
                written.write(memoryview(piece)[:count])
                total += count
            os.fsync(written.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return {"s_per_gb": seconds / total * 1e9}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are the same, without having them in memory."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while (piece := first.read(PIECE)) or second.peek(1):
            if piece != second.read(PIECE):
                return False
    return True


def to_megatron(source: Path, target: Path, args: argparse.Namespace) -> dict:
    """HF to shards."""
    from bc2exp.weights.convert import convert
    from bc2exp.weights.hf import open_hf
    from bc2exp.weights.targets import Megatron

    with Peak() as peak:
        done = convert(open_hf(source), target, Megatron(args.tensor, 1, "proj", 128))
    share = max(path.stat().st_size for path in target.rglob("*.pt"))
    return {**measured(done.bytes, peak), "share_bytes": share}


def to_hf(source: Path, target: Path, args: argparse.Namespace) -> dict:
    """Shards to HF."""
    from bc2exp.weights.convert import convert
    from bc2exp.weights.megatron import open_megatron
    from bc2exp.weights.targets import Published

    with Peak() as peak:
        done = convert(open_megatron(source, None), target, Published())
    return measured(done.bytes, peak)


def whole_model(source: Path, target: Path, args: argparse.Namespace) -> dict:
    """HF to shards the usual way: everything is loaded, cut, and saved rank by rank; nothing is checked."""
    import torch
    from safetensors.torch import load_file

    heads, tensor = SHAPES[args.model]["num_heads"], args.tensor
    with Peak() as peak:
        weights: dict = {}
        for path in sorted(source.glob("*.safetensors")):
            weights |= {name: value.clone() for name, value in load_file(path).items()}
        vocab = weights["lm_head.weight"].shape[0]
        added = -vocab % (128 * tensor)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.cat((weights[name], weights[name][-added:]))
        total = 0
        for rank in range(tensor):
            encoder = {}
            for index in range(args.layers):
                ours, theirs = f"model.layers.{index}.", f"layers.{index}."
                packed = weights[f"{ours}self_attn.W_pack.weight"]
                parts = [third.chunk(tensor)[rank].chunk(heads // tensor) for third in packed.chunk(3)]
                qkv = torch.cat([part for head in zip(*parts, strict=True) for part in head])
                encoder[f"{theirs}self_attention.query_key_value.weight"] = qkv
                gate_up = [
                    weights[f"{ours}mlp.{name}_proj.weight"].chunk(tensor)[rank] for name in ("gate", "up")
                ]
                encoder[f"{theirs}mlp.proj.weight"] = torch.cat(gate_up)
                for mine, name in (
                    ("mlp.down_proj", "mlp.dense_4h_to_h"),
                    ("self_attn.o_proj", "self_attention.dense"),
                ):
                    columns = weights[f"{ours}{mine}.weight"].chunk(tensor, dim=1)[rank]
                    encoder[f"{theirs}{name}.weight"] = columns.contiguous()
                for name in ("input_layernorm", "post_attention_layernorm"):
                    encoder[f"{theirs}{name}.weight"] = weights[f"{ours}{name}.weight"]
            encoder["final_layernorm.weight"] = weights["model.norm.weight"]
            embedding = weights["model.embed_tokens.weight"].chunk(tensor)[rank].clone()
            head = weights["lm_head.weight"].chunk(tensor)[rank].clone()
            model = {"encoder": encoder, "embedding": {"word_embeddings": {"weight": embedding}}}
            model["output_layer"] = {"weight": head}
            path = target / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save({"checkpoint_version": 3.0, "model": {"language_model": model}}, path)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            total += path.stat().st_size
    return measured(total, peak)


def measured(num_bytes: int, peak: Peak) -> dict:
    """Speed and memory of a block."""
    return {"s_per_gb": peak.seconds / num_bytes * 1e9, "peak_bytes": peak.bytes}


STEPS: dict[str, Callable[..., dict]] = {"megatron": to_megatron, "hf": to_hf, "whole": whole_model}


def run(step: str, source: Path, target: Path, args: argparse.Namespace) -> dict:
    """One step in a process of its own, from a cold cache."""
    forget(source)
    command = [sys.executable, __file__, "--step", step, "--source", str(source), "--target", str(target)]
    command += ["--model", args.model, "--tensor", str(args.tensor), "--layers", str(args.layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def beside_copy(step: str, source: Path, target: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The samples of a step and of two copies of its source, before and after it."""
    before = run("copy", source, target.with_name("copy"), args)
    found = run(step, source, target, args)
    after = run("copy", source, target.with_name("copy"), args)
    side = "whole model" if step == "whole" else "ours"
    samples = [
        {"side": "copy", "values": [before["s_per_gb"], after["s_per_gb"]]},
        {"side": side, "values": [found.pop("s_per_gb")], **found},
    ]
    print(json.dumps({"step": step, "layers": args.layers, "samples": samples}), flush=True)
    return samples


def there_and_back(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The samples of both ways, of the whole checkpoint."""
    first, shards, back = (folder / name for name in ("hf", "shards", "back"))
    make(first, {**SHAPES[args.model], "num_layers": args.layers})
    samples = []
    for number in range(args.rounds):
        for step, source, target in (("megatron", first, shards), ("hf", shards, back)):
            found = beside_copy(step, source, target, args)
            samples += [{"case": case_of(step, args), "round": number, **sample} for sample in found]
        same = all(same_bytes(path, back / path.name) for path in first.glob("model-*"))
        assert same, "the way there and back is not bit-equal"
        shutil.rmtree(shards)
        shutil.rmtree(back)
    shutil.rmtree(first)
    return samples


def beside_whole_model(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The samples of ours and the whole-model way, of a smaller checkpoint."""
    first = folder / "hf"
    make(first, {**SHAPES[args.model], "num_layers": args.layers})
    samples = []
    for number in range(args.rounds):
        for step in ("megatron", "whole"):
            found = beside_copy(step, first, folder / step, args)
            samples += [{"case": case_of("whole", args), "round": number, **sample} for sample in found]
            shutil.rmtree(folder / step)
    return samples


def case_of(step: str, args: argparse.Namespace) -> str:
    """What a step converts, in words."""
    way = {"hf": "back to HF", "whole": f"to TP {args.tensor} beside the whole model"}
    return f"{args.model}, {args.layers} layers, {way.get(step, f'to TP {args.tensor}')}"


def ratios(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the samples come to."""
    found = []
    for case in dict.fromkeys(sample["case"] for sample in samples):
        runs: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            if sample["case"] == case:
                runs.setdefault(sample["side"], []).append(sample)
        times = {side: [value for run in them for value in run["values"]] for side, them in runs.items()}
        peaks = {side: [run.get("peak_bytes", 0) for run in them] for side, them in runs.items()}
        if "whole model" in runs:
            mine, theirs = "ours", "whole model"
            found += [
                record.ratio(case, "time of the whole-model way's", times[mine], times[theirs],
                             better="lower", margin=0.3),
                record.ratio(case, "anonymous memory of the whole-model way's", peaks[mine], peaks[theirs],
                             better="lower", margin=1.0),
            ]  # fmt: skip
            continue
        shares = [run.get("share_bytes") for run in runs["ours"]]
        limits = [share + 2**29 if share else 2**30 for share in shares]
        limit = "a rank's share and 0.5 GiB" if shares[0] else "1 GiB"
        found += [
            record.ratio(case, "speed of a copy's", times["copy"], times["ours"],
                         better="higher", target=0.8),
            record.ratio(case, f"anonymous memory of the limit, {limit}", peaks["ours"], limits,
                         better="lower", target=1.0, margin=1.0),
        ]  # fmt: skip
    return found


def main() -> None:
    """Make, convert, convert back, compare, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--whole-layers", type=int, default=4, help="0: leave this part out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.layers = args.layers or SHAPES[args.model]["num_layers"]
    if args.step:
        found = (
            copy(args.source, args.target)
            if args.step == "copy"
            else STEPS[args.step](args.source, args.target, args)
        )
        print(json.dumps(found))
        return
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        samples = there_and_back(Path(scratch), args)
        if args.whole_layers:
            args.layers = args.whole_layers
            samples += beside_whole_model(Path(scratch), args)
    entries = ratios(samples)
    sides = {
        "ours": "bc2exp.weights.convert, with checksums",
        "copy": f"files read and written by {PIECE // 2**20} MiB, each then fsynced",
        "whole model": "load all, split, save; no checksums",
    }
    whole = {"unit": "s a GB", "sides": sides}
    record.write("convert_weights", {**whole, "samples": samples, "ratios": entries}, args.results)
    print(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
