"""Conversion of a checkpoint of a true model's shape: speed beside the disk's own, and memory.

    python benchmarks/convert_weights.py --folder SCRATCH [--model 7b] [--layers 32] [--tensor 8]
                                         [--whole-layers 4]

Makes a synthetic published folder in SCRATCH (bf16, cheap random data; 15 GB for the 7B shape, 28 GB for the
13B with `--model 13b`), and then, each in a process of its own and from a cold page cache:

    copy       the disk's own speed: the files are read and written in pieces of 16 MiB, each then fsynced
    megatron   HF -> ModelLink's shards (.pt) of TENSOR ranks
    hf         those shards -> HF safetensors
    whole      a smaller model (`--whole-layers`), HF -> shards: load all, split, save; and ours beside it

Anonymous memory is RssAnon + RssShmem of the process, sampled every 20 ms, less what it was before the work
began. The speed of `copy` is measured before and after each conversion, as a disk that others use varies; the
ratio is to the mean of both. In the end the folders of both ways are compared and removed. SCRATCH needs
room for three of the checkpoint. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    return {"bytes": total, "seconds": seconds, "mb_per_s": total / 1e6 / seconds}


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
    """Bytes, speed and memory of a block."""
    speed = num_bytes / 1e6 / peak.seconds
    return {
        "bytes": num_bytes,
        "seconds": peak.seconds,
        "mb_per_s": speed,
        "peak_anonymous_bytes": peak.bytes,
    }


STEPS: dict[str, Callable[..., dict]] = {"megatron": to_megatron, "hf": to_hf, "whole": whole_model}


def run(step: str, source: Path, target: Path, args: argparse.Namespace) -> dict:
    """One step in a process of its own, from a cold cache."""
    forget(source)
    command = [sys.executable, __file__, "--step", step, "--source", str(source), "--target", str(target)]
    command += ["--folder", str(args.folder), "--model", args.model, "--tensor", str(args.tensor)]
    command += ["--layers", str(args.layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def beside_copy(step: str, source: Path, target: Path, args: argparse.Namespace) -> None:
    """A step between two copies of its source."""
    before = run("copy", source, args.folder / "copy", args)
    found = run(step, source, target, args)
    after = run("copy", source, args.folder / "copy", args)
    speed = (before["mb_per_s"] + after["mb_per_s"]) / 2
    copies = [round(each["mb_per_s"], 1) for each in (before, after)]
    line = {"step": step, **found, "copy_mb_per_s": copies, "of_copy": round(found["mb_per_s"] / speed, 3)}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Make, convert, convert back, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--whole-layers", type=int, default=4, help="0: leave this part out")
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
    args.folder.mkdir(parents=True)
    try:
        first, shards, back = (args.folder / name for name in ("hf", "shards", "back"))
        make(first, {**SHAPES[args.model], "num_layers": args.layers})
        beside_copy("megatron", first, shards, args)
        beside_copy("hf", shards, back, args)
        same = all(same_bytes(path, back / path.name) for path in first.glob("model-*"))
        print(json.dumps({"round_trip_is_bit_equal": same}), flush=True)
        for folder in (first, shards, back):
            shutil.rmtree(folder)
        if args.whole_layers:
            args.layers = args.whole_layers
            make(first, {**SHAPES[args.model], "num_layers": args.layers})
            for step in ("megatron", "whole"):
                print(json.dumps({"layers": args.layers}), flush=True)
                beside_copy(step, first, args.folder / step, args)
                shutil.rmtree(args.folder / step)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
