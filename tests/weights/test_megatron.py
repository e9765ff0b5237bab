"""ModelLink's shards: as an oracle cuts them, there and back in every layout, trained ones, damaged ones."""

from __future__ import annotations

import random
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from bc2exp.weights.convert import convert
from bc2exp.weights.hf import load_into, open_hf
from bc2exp.weights.megatron import open_megatron
from bc2exp.weights.opening import open_weights
from bc2exp.weights.targets import Megatron, Published
from tests.model.small import small_model
from tests.weights.folders import SHAPE, published, same_content, shards_by_hand, tensors_of

LAYOUTS = {
    "TP 8, padded": Megatron(8, 1, "proj", 8),
    "TP 2 uneven padding": Megatron(2, 1, "proj", 7),
    "TP 2 x PP 2": Megatron(2, 2, "dense_h_to_4h", 128),
    "TP 4 unmerged": Megatron(4, 1, None, 64),
    "PP 4": Megatron(1, 4, "proj", 1),
}
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def by_hand(source: Path, target: Path, form: Megatron, **more):  # type: ignore[no-untyped-def]
    """Shards in a layout, cut by the oracle."""
    options = {"heads": SHAPE["num_heads"], "merged": form.merged, "divisible_by": form.vocab_divisible_by}
    return shards_by_hand(
        tensors_of(source), target, tensor=form.tensor, pipeline=form.pipeline, **options, **more
    )


def equal_folders(one: Path, other: Path) -> None:
    """Assert that two published folders hold the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    assert [path.name for path in sorted(other.iterdir()) if path.name != "manifest.json"] == names
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@BOTH
@pytest.mark.parametrize("form", LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back_is_bit_equal_and_as_the_oracle_cuts(tmp_path, dtype, form):
    _, folder = published(tmp_path / "hf", dtype)
    convert(open_hf(folder), tmp_path / "shards", form, verify=True)
    by_hand(folder, tmp_path / "oracle", form)
    files = sorted(path.relative_to(tmp_path / "oracle") for path in (tmp_path / "oracle").rglob("*.pt"))
    assert files == sorted(path.relative_to(tmp_path / "shards") for path in tmp_path.glob("shards/**/*.pt"))
    assert len(files) == form.tensor * form.pipeline
    for name in files:
        mine, theirs = (torch.load(tmp_path / place / name) for place in ("shards", "oracle"))
        same_content(mine, theirs)
    tracker = "latest_checkpointed_iteration.txt"
    assert (tmp_path / "shards" / tracker).read_text() == (tmp_path / "oracle" / tracker).read_text()
    for source, shape in (("shards", None), ("oracle", open_hf(folder).shape)):
        back = Published(max_shard_bytes=60_000)
        convert(open_megatron(tmp_path / source, shape), tmp_path / f"back of {source}", back, verify=True)
        equal_folders(folder, tmp_path / f"back of {source}")


def test_the_13b_kind_goes_there_and_back(tmp_path):
    _, folder = published(tmp_path / "hf", torch.bfloat16, "alibi")
    convert(open_hf(folder), tmp_path / "shards", LAYOUTS["TP 2 x PP 2"])
    convert(open_megatron(tmp_path / "shards", None), tmp_path / "back", Published(60_000))
    equal_folders(folder, tmp_path / "back")


def test_a_part_of_a_parameter_is_what_slicing_gives(tmp_path):
    model, folder = published(tmp_path / "hf")
    convert(open_hf(folder), tmp_path / "shards", LAYOUTS["TP 2 x PP 2"])
    weights, values = open_megatron(tmp_path / "shards", None), model.state_dict()
    generator = random.Random(0)
    for name, value in values.items():
        for _ in range(4):
            part = []
            for size in value.shape:
                start = generator.randrange(size)
                part.append(slice(start, generator.randint(start + 1, size)))
            assert torch.equal(weights.read(name, *part), value[tuple(part)]), (name, part)
            assert torch.equal(weights.read(name, part[0]), value[part[0]])
        assert torch.equal(weights.read(name), value)


def training(**changes) -> Namespace:  # type: ignore[no-untyped-def]
    """The arguments of a training."""
    known = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "position_embedding_type": "rope",
        "norm_epsilon": 1e-6,
        "params_dtype": torch.bfloat16,
        "data_path": ["a"],
    }
    return Namespace(**{**known, **changes})


def trained(folder: Path, target: Path, **changes):  # type: ignore[no-untyped-def]
    """Shards as a training leaves them: arguments, random states, an optimizer beside the model."""
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    more = {"iteration": 500, "rng_state": [state], "optimizer": {"fp32": [torch.ones(3)]}}
    form = LAYOUTS["TP 2 x PP 2"]
    return by_hand(folder, target, form, args=training(**changes), more=more, iteration="iter_0000500")


def test_a_training_checkpoint_is_read_with_its_arguments_beside_it(tmp_path):
    model, folder = published(tmp_path / "hf")
    trained(folder, tmp_path / "trained")
    for place in (tmp_path / "trained", tmp_path / "trained" / "iter_0000500"):
        weights = open_weights(place, model.shape)
        assert all(torch.equal(weights.read(name), value) for name, value in model.state_dict().items())
    other = small_model("rope", **SHAPE)
    load_into(other, weights)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 4 in mp_rank_00_000, model.num_heads is 8"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is alibi, model.position is rope"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon is 1e-05 in mp_rank_00_000, model.rms_norm_eps is 1e-06"),
    ],
)
def test_arguments_of_another_model_are_told(tmp_path, changes, told):
    model, folder = published(tmp_path / "hf")
    trained(folder, tmp_path / "trained", **changes)
    with pytest.raises(ValueError, match="does not hold this model") as error:
        open_megatron(tmp_path / "trained", model.shape)
    assert told in str(error.value)


def edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change what a rank's file holds."""
    content = torch.load(path)
    change(content["model"]["language_model"])
    torch.save(content, path)


def test_names_of_other_versions_are_understood(tmp_path):
    model, folder = published(tmp_path / "hf")
    by_hand(folder, tmp_path / "shards", Megatron(2, 1, None, 1))

    def rename(model):
        encoder = model.pop("encoder")
        renamed = {}
        for name, value in encoder.items():
            name = name.replace("dense_h_to_4h", "up_proj").replace("dense_4h_to_h", "down_proj")
            name = name.replace("input_layernorm", "input_norm").replace("final_layernorm", "final_norm")
            renamed[name.replace("post_attention_layernorm", "post_attention_norm")] = value
        renamed["layers.0.self_attention.rotary_emb.inv_freq"] = torch.ones(3)
        renamed["layers.0.self_attention._extra_state"] = None
        model["transformer"] = renamed

    for path in tmp_path.glob("shards/release/*/*.pt"):
        edit(path, rename)
    weights = open_megatron(tmp_path / "shards", model.shape)
    assert all(torch.equal(weights.read(name), value) for name, value in model.state_dict().items())


def spoil_names(model):
    del model["encoder"]["layers.0.input_layernorm.weight"]
    model["encoder"]["layers.9.input_layernorm.weight"] = torch.ones(64)


def spoil_shape(model):
    model["encoder"]["layers.1.mlp.proj.weight"] = torch.ones(2, 64)


def spoil_norm(model):
    model["encoder"]["layers.1.input_layernorm.weight"] += 1


def spoil_words(model):
    model["output_layer"]["weight"] = model["output_layer"]["weight"][:5]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_names, "missing: mp_rank_01/encoder.layers.0.input_layernorm.weight; unexpected: mp_rank_01/"),
        (
            spoil_shape,
            "of a wrong shape: mp_rank_01/encoder.layers.1.mlp.proj.weight (2, 64) instead of (96,",
        ),
        (spoil_norm, "mp_rank_01/encoder.layers.1.input_layernorm.weight is not what mp_rank_00/"),
        (spoil_words, "rows of the vocabulary"),
    ],
)
def test_shards_that_do_not_fit_are_named(tmp_path, spoil, told):
    model, folder = published(tmp_path / "hf")
    by_hand(folder, tmp_path / "shards", Megatron(2, 1, "proj", 1))
    edit(tmp_path / "shards" / "release" / "mp_rank_01" / "model_optim_rng.pt", spoil)
    with pytest.raises(ValueError, match=re.escape(told)):
        open_megatron(tmp_path / "shards", model.shape)


def test_ranks_that_are_missing_are_named(tmp_path):
    model, folder = published(tmp_path / "hf")
    by_hand(folder, tmp_path / "shards", LAYOUTS["TP 2 x PP 2"])
    shutil.rmtree(tmp_path / "shards" / "release" / "mp_rank_01_000")
    with pytest.raises(ValueError, match="ranks are missing: mp_rank_01_000"):
        open_megatron(tmp_path / "shards", model.shape)


def test_a_model_choice_that_is_not_that_of_the_conversion_is_told(tmp_path):
    model, folder = published(tmp_path / "hf")
    convert(open_hf(folder), tmp_path / "shards", LAYOUTS["TP 4 unmerged"])
    with pytest.raises(ValueError, match=r"num_attention_heads is 8 in the folder, model\.num_heads is 4"):
        open_weights(tmp_path / "shards", {**model.shape, "num_heads": 4})
    (tmp_path / "shards" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"does not say which model it is of; name it \(model=baichuan2_7b\)"
    ):
        open_megatron(tmp_path / "shards", None)
    with pytest.raises(ValueError, match="4 tensor ranks, which do not divide num_heads=6"):
        open_megatron(tmp_path / "shards", {**model.shape, "num_heads": 6, "hidden_size": 48})
