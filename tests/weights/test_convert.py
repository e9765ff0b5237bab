"""Conversions: what they leave, what they refuse, what a kill leaves; and the Llama."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bc2exp.config.errors import UserError
from bc2exp.storage import lock
from bc2exp.storage.tensors import read_manifest, verify
from bc2exp.weights import convert as conversion
from bc2exp.weights import load_hf
from bc2exp.weights.convert import convert
from bc2exp.weights.hf import open_hf
from bc2exp.weights.megatron import open_megatron
from bc2exp.weights.targets import Llama, Megatron, Published
from bc2exp.weights.writing import SafetensorsWriter
from tests.model.small import random_ids
from tests.weights.folders import published, tensors_of

SHARDS = Megatron(2, 2, "proj", 1)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None,
    reason="transformers imports torch_npu where it is installed, and that wants CANN",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_reproduces_the_logits(tmp_path, dtype):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import LlamaForCausalLM

    _, folder = published(tmp_path / "hf", dtype, rms_norm_eps=1e-5)
    form = Llama(max_shard_bytes=60_000)
    convert(open_hf(folder), tmp_path / "llama", form, dtype=torch.float32, verify=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama", trust_remote_code=False)
    assert theirs.dtype == torch.float32
    ids = random_ids(2, 40)
    torch.testing.assert_close(theirs(ids).logits, load_hf(folder)(ids), rtol=0, atol=1e-5)
    assert theirs.lm_head.weight.norm(dim=-1).sub(1).abs().max() < 1e-6


def test_a_13b_is_no_llama(tmp_path):
    _, folder = published(tmp_path / "hf", position="alibi")
    with pytest.raises(ValueError, match=r"13B kind cannot be written as a Llama.*ALiBi"):
        convert(open_hf(folder), tmp_path / "llama", Llama())
    assert left_in(tmp_path) == ["hf"]


def test_the_manifest_has_the_checksum_of_every_tensor(tmp_path):
    _, folder = published(tmp_path / "hf")
    convert(open_hf(folder), tmp_path / "copy", Published(60_000), about={"source": "x"})
    manifest = verify(tmp_path / "copy")  # reads and compares
    assert manifest["extra"]["source"] == "x"
    assert manifest["extra"]["shape"]["num_layers"] == 4
    convert(open_hf(folder), tmp_path / "shards", SHARDS)
    files = read_manifest(tmp_path / "shards")["files"]
    assert len(files) == 4
    for name, entry in files.items():
        assert (tmp_path / "shards" / name).stat().st_size == entry["bytes"]
        found = torch.load(tmp_path / "shards" / name)["model"]["language_model"]["encoder"]
        for key, value in found.items():
            data = value.contiguous().view(torch.uint8).numpy().tobytes()
            assert entry["tensors"][f"encoder.{key}"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_shard_is_the_file_that_torch_would_have_saved(tmp_path):
    _, folder = published(tmp_path / "hf", torch.bfloat16)
    convert(open_hf(folder), tmp_path / "shards", SHARDS)
    for path in (tmp_path / "shards").rglob("*.pt"):
        torch.save(torch.load(path), tmp_path / "model_optim_rng.pt")
        with zipfile.ZipFile(path) as mine, zipfile.ZipFile(tmp_path / "model_optim_rng.pt") as theirs:
            assert mine.testzip() is None  # every checksum holds
            assert mine.namelist() == theirs.namelist()
            assert all(mine.read(name) == theirs.read(name) for name in mine.namelist() if "/data/" in name)


def test_the_type_can_be_another(tmp_path):
    model, folder = published(tmp_path / "hf")
    done = convert(open_hf(folder), tmp_path / "half", SHARDS, dtype=torch.bfloat16, verify=True)
    assert list(done.dtypes) == ["bfloat16"]
    weights = open_megatron(tmp_path / "half", None)
    for name, value in model.state_dict().items():
        assert torch.equal(weights.read(name), value.bfloat16())


def test_nan_is_named_and_compared_by_its_bits(tmp_path):
    model, folder = published(tmp_path / "hf")
    values = dict(model.state_dict())
    values["layers.1.mlp.up_proj.weight"][95, 63] = float("nan")
    values["norm.weight"][0] = float("nan")
    shutil.rmtree(folder)
    from bc2exp.weights import save_hf

    save_hf(values, folder, config=model.shape, dtype=torch.float32)
    done = convert(open_hf(folder), tmp_path / "copy", Published(), verify=True)
    assert done.nan == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    done = convert(open_hf(folder), tmp_path / "shards", Megatron(2, 1, None, 1), verify=True)
    assert done.nan == [
        "release/mp_rank_01/encoder.layers.1.mlp.dense_h_to_4h.weight",
        "release/mp_rank_00/encoder.final_layernorm.weight",
        "release/mp_rank_01/encoder.final_layernorm.weight",
    ]


def test_verification_finds_one_bit_and_leaves_nothing(tmp_path, monkeypatch):
    _, folder = published(tmp_path / "hf")
    put = SafetensorsWriter.put

    def spoiled(self, name, tensor, row=0):
        if name == "model.layers.2.mlp.down_proj.weight":
            tensor = tensor.clone()
            tensor.view(torch.int32)[-1, -1] ^= 1
        put(self, name, tensor, row)

    monkeypatch.setattr(SafetensorsWriter, "put", spoiled)
    with pytest.raises(RuntimeError, match=r"layers\.2\.mlp\.down_proj\.weight is not what was written"):
        convert(open_hf(folder), tmp_path / "copy", Published(), verify=True)
    assert left_in(tmp_path) == ["hf"]


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    _, folder = published(tmp_path / "hf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage(10**9, 0, 64 * 2**20))
    with pytest.raises(UserError, match=r"needs 0\.06 GiB, and 0\.06 are free there"):
        convert(open_hf(folder), tmp_path / "copy", Published())
    assert left_in(tmp_path) == ["hf"]


def test_what_exists_and_what_another_writes_is_left_alone(tmp_path):
    _, folder = published(tmp_path / "hf")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already; name another, or remove it"):
        convert(open_hf(folder), tmp_path / "there", Published())
    with lock.hold(tmp_path / ".copy.lock"), pytest.raises(UserError, match="another process is writing it"):
        convert(open_hf(folder), tmp_path / "copy", Published())
    assert left_in(tmp_path / "there") == []


def test_progress_goes_to_the_end_of_both_stages(tmp_path):
    _, folder = published(tmp_path / "hf")
    told = []
    done = convert(open_hf(folder), tmp_path / "copy", Published(), verify=True, progress=told.append)
    for stage in ("convert", "verify"):
        counts = [entry.bytes_done for entry in told if entry.stage == stage]
        assert counts == sorted(counts)
        assert counts[-1] == told[0].bytes_total == done.bytes
    assert told[0].tensor == "model.embed_tokens.weight"


def killed_at(piece: int, work) -> bool:
    """Do `work` in a forked process that is killed before it writes piece `piece`; whether it was."""
    if (child := os.fork()) == 0:
        left = [piece]

        def counted(path, data, at, pwrite=os.pwrite):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return pwrite(path, data, at)

        os.pwrite = counted
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("form", [Published(60_000), SHARDS], ids=["hf", "megatron"])
def test_after_a_kill_the_target_is_absent_and_the_next_start_makes_it(tmp_path, form):
    _, folder = published(tmp_path / "hf", torch.bfloat16)
    convert(open_hf(folder), tmp_path / "good", form)
    good = {path.relative_to(tmp_path / "good"): path for path in (tmp_path / "good").rglob("*.*t*")}
    generator, kills = random.Random(1), 0
    for number in range(20):
        target = tmp_path / f"target-{number}"
        if killed_at(generator.randrange(45), lambda: convert(open_hf(folder), target, form)):  # noqa: B023
            kills += 1
            assert not target.exists()
            assert f".{target.name}.partial" in left_in(tmp_path)
            convert(open_hf(folder), target, form)
        for name, path in good.items():
            if path.suffix in (".safetensors", ".json") and path.name != "manifest.json":
                assert (target / name).read_bytes() == path.read_bytes()
        weights = open_hf(target) if form != SHARDS else open_megatron(target, None)
        assert all(torch.equal(weights.read(n), open_hf(folder).read(n)) for n in weights.shapes)
        assert not [name for name in left_in(tmp_path) if name.startswith(f".{target.name}")]
        shutil.rmtree(target)
    assert kills > 10


def test_a_kill_at_the_last_moment_leaves_the_name_or_nothing(tmp_path):
    _, folder = published(tmp_path / "hf")
    target = tmp_path / "copy"
    assert killed_at(3, lambda: convert(open_hf(folder), target, Published()))
    assert left_in(tmp_path) == [".copy.lock", ".copy.partial", "hf"]
    convert(open_hf(folder), target, Published())
    assert left_in(tmp_path) == ["copy", "hf"]
    assert tensors_of(target).keys() == tensors_of(folder).keys()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(target / "model-00001-of-00001.safetensors").keys()
