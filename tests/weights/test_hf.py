"""Folders in the published layout: there and back, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bc2exp.weights import load_hf, load_hf_into, save_hf
from bc2exp.weights.hf import INDEX, read_shape
from tests.model.small import random_ids, small_model
from tests.weights.folders import as_bin, rewrite

BOTH = pytest.mark.parametrize("position", ["rope", "alibi"])


def saved(folder: Path, position: str = "rope", *, dtype=torch.float32, **settings):
    """A small model and the folder it was saved to."""
    model = small_model(position, **settings)
    save_hf(model.state_dict(), folder, config=model.shape, dtype=dtype)
    return model, folder


@BOTH
def test_a_round_trip_is_bit_equal(tmp_path, position):
    model, folder = saved(tmp_path / "weights", position, rms_norm_eps=1e-5, z_loss_weight=0.1)
    loaded = load_hf(folder)
    assert loaded.shape == model.shape
    values = model.state_dict()
    assert set(loaded.state_dict()) == set(values)
    assert all(torch.equal(value, values[name]) for name, value in loaded.state_dict().items())
    ids = random_ids(1, 9)
    assert torch.equal(loaded(ids), model(ids))
    save_hf(loaded.state_dict(), tmp_path / "again", config=loaded.shape, dtype=torch.float32)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_round_trip_in_bf16_rounds_once(tmp_path):
    model, folder = saved(tmp_path / "weights", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half, full = load_hf(folder, torch.bfloat16).state_dict(), load_hf(folder).state_dict()
    for name, value in model.state_dict().items():
        rounded = value.to(torch.bfloat16)
        assert half[name].dtype == torch.bfloat16
        assert torch.equal(half[name], rounded)
        assert torch.equal(full[name], rounded.float())


def test_the_layout_is_the_published_one(tmp_path):
    model, folder = saved(tmp_path / "weights")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    layer = ["input_layernorm", "self_attn.W_pack", "self_attn.o_proj", "post_attention_layernorm"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    names += [f"model.layers.{index}.{name}" for index in range(2) for name in layer]
    assert set(tensors) == {f"{name}.weight" for name in names}
    attention = model.layers["1"].self_attn
    thirds = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(tensors["model.layers.1.self_attn.W_pack.weight"], torch.cat(thirds))


def test_config_json_tells_the_two_kinds_apart(tmp_path):
    kinds = {}
    for position in ("rope", "alibi"):
        model = small_model(position)
        config = {**model.shape, "max_positions": 77, "name": "not for the file"}
        save_hf(model.state_dict(), tmp_path / position, config=config, dtype=torch.float32)
        kinds[position] = json.loads((tmp_path / position / "config.json").read_text())
        assert read_shape(tmp_path / position)["position"] == position
    assert kinds["rope"]["max_position_embeddings"] == 77
    assert "max_position_embeddings" not in kinds["alibi"]
    assert kinds["alibi"]["model_max_length"] == 77
    for config in kinds.values():
        assert config["model_type"] == "baichuan"
        assert config["architectures"] == ["BaichuanForCausalLM"]
        assert (config["num_hidden_layers"], config["num_attention_heads"]) == (2, 6)
        assert config["tie_word_embeddings"] is False
        assert "rope_theta" not in config


def test_shards_keep_to_their_size_and_the_index_finds_every_tensor(tmp_path):
    model = small_model("rope")
    limit = 40_000
    pairs = ((name, tensor) for name, tensor in model.state_dict().items())
    save_hf(pairs, tmp_path / "w", config=model.shape, dtype=torch.float32, max_shard_bytes=limit)
    index = json.loads((tmp_path / "w" / INDEX).read_text())
    paths = sorted((tmp_path / "w").glob("*.safetensors"))
    assert len(paths) > 2
    for number, path in enumerate(paths, start=1):
        assert path.name == f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    loaded = load_hf(tmp_path / "w").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_stray_shard_that_the_index_does_not_name_is_left_alone(tmp_path):
    _, folder = saved(tmp_path / "weights")
    save_file({"lm_head.weight": torch.zeros(3)}, folder / "old.safetensors")
    load_hf(folder)


def test_the_tokenizer_goes_along(tmp_path):
    model = small_model("rope")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    save_hf(model.state_dict(), tmp_path / "w", config=model.shape, dtype=torch.float32, tokenizer=tokenizer)
    assert (tmp_path / "w" / "tokenizer.model").read_bytes() == b"pieces"


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "w").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        saved(tmp_path / "w")
    assert list(tmp_path.iterdir()) == [tmp_path / "w"]
    assert not any((tmp_path / "w").iterdir())


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    model = small_model("rope")
    tensors = model.state_dict()
    del tensors["layers.1.self_attn.k_proj.weight"]
    tensors["extra.weight"] = torch.zeros(2)
    tensors["norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"missing: layers\.1\.self_attn\.k_proj") as error:
        save_hf(tensors, tmp_path / "w", config=model.shape, dtype=torch.float32)
    assert "extra.weight" in str(error.value)
    assert "norm.weight (5,) instead of (48,)" in str(error.value)
    assert not any(tmp_path.iterdir())


def test_one_error_names_every_tensor_that_is_wrong(tmp_path):
    _, folder = saved(tmp_path / "weights")

    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match="does not hold this model") as error:
        load_hf(folder)
    assert "missing: model.layers.0.mlp.up_proj.weight, model.norm.weight;" in str(error.value)
    assert "unexpected: model.layers.2.mlp.up_proj.weight;" in str(error.value)
    assert "of a wrong shape: lm_head.weight (130, 48) instead of (131, 48)" in str(error.value)


def test_a_folder_of_another_size_is_refused_by_the_model(tmp_path):
    _, folder = saved(tmp_path / "weights")
    other = small_model("rope", intermediate_size=81)
    before = other.norm.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight \(81, 48\).*layers\.1"):
        load_hf_into(other, folder)
    assert torch.equal(other.norm.weight, before)


def test_written_out_rotary_frequencies_are_no_surprise(tmp_path):
    _, folder = saved(tmp_path / "weights")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(folder, lambda tensors: tensors.update(frequencies))
    (folder / INDEX).unlink()
    load_hf(folder)


def test_a_stage_takes_its_own_layers_and_assign_sees_whole_tensors(tmp_path):
    model, folder = saved(tmp_path / "weights")
    stage = small_model("rope")
    stage.embed_tokens = None
    del stage.layers["0"]
    seen = {}
    load_hf_into(stage, folder, assign=lambda name, parameter, tensor: seen.update({name: tensor}))
    assert set(seen) == set(stage.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in seen.items())


@pytest.mark.parametrize("save", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("limit", [40_000, 10**9])
def test_bin_files_are_read_as_safetensors_are(tmp_path, save, index, limit):
    model = small_model("rope")
    save_hf(
        model.state_dict(), tmp_path / "w", config=model.shape, dtype=torch.bfloat16, max_shard_bytes=limit
    )
    folder = as_bin(tmp_path / "w", tmp_path / "bin", index=index, **save)
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody asked for")
    if save:
        with pytest.raises(ValueError, match="is no zip file; torch wrote another format before"):
            load_hf(folder)
        return
    loaded, expected = load_hf(folder, torch.bfloat16), load_hf(tmp_path / "w", torch.bfloat16)
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_folder_without_weights(tmp_path):
    _, folder = saved(tmp_path / "weights")
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no weights: no \*\.safetensors"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama', not 'baichuan'"),
        ({"vocab_size": 64000}, "first Baichuan"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    _, folder = saved(tmp_path / "weights")
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_hf(folder)


def test_damaged_files_are_named(tmp_path):
    _, folder = saved(tmp_path / "weights")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        load_hf(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}: cannot be read"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_hf(folder)
