"""The network against others: transformers' Llama for 7B, the published 13B code's recorded values."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2
from tests.model.small import VOCAB, next_tokens, random_ids, small_model
from tests.shared_data import shared_data


@pytest.fixture(scope="module")
def llama():
    """A Llama of `small_model("rope")`'s shape, without weights of its own that matter."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def llama_logits(llama, model, ids):
    """Logits of the Llama with this model's weights, its head by its unit rows; differentiable."""
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": value
        for name, value in model.named_parameters()
    }
    weights["lm_head.weight"] = F.normalize(weights["lm_head.weight"])
    return torch.func.functional_call(llama, weights, (ids,), strict=False).logits


@pytest.mark.parametrize("packed", [False, True])
def test_7b_equals_llama_with_a_normalised_head(llama, packed):
    model = small_model("rope")
    lengths = [9, 20, 1, 14] if packed else [44]
    ids = random_ids(2, sum(lengths))
    pieces = ids.split(lengths, dim=1)
    segment_ids = torch.cat([torch.full_like(p, i) for i, p in enumerate(pieces, start=1)], dim=1)
    labels = torch.cat([next_tokens(piece) for piece in pieces], dim=1)
    theirs = torch.cat([llama_logits(llama, model, piece) for piece in pieces], dim=1)
    expected = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum")
    parameters = dict(model.named_parameters())
    their_gradients = torch.autograd.grad(expected, list(parameters.values()))

    given = segment_ids if packed else None
    torch.testing.assert_close(model(ids, given), theirs, rtol=1e-5, atol=1e-5)
    loss = model(ids, given, labels)
    torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=1e-5)
    num_labels = int((labels != -100).sum())
    mine = torch.autograd.grad(loss / num_labels, list(parameters.values()))
    for name, ours, other in zip(parameters, mine, their_gradients, strict=True):
        torch.testing.assert_close(ours, other / num_labels, rtol=1e-5, atol=1e-5, msg=f"gradient of {name}")


@pytest.fixture(scope="module")
def golden():
    """Recorded values of the published 13B code, and our model with its weights."""
    recorded = load_file(shared_data("golden/golden_13b_h5.safetensors"))
    model = Baichuan2(
        vocab_size=320,
        hidden_size=80,
        intermediate_size=208,
        num_layers=2,
        num_heads=5,
        position="alibi",
        ops=get_backend("cpu").ops,
    )
    model.load_state_dict(unpacked(recorded, "w."))
    return recorded, model


def unpacked(recorded, prefix):
    """The recorded tensors with this prefix under our names, each W_pack in its thirds."""
    tensors = {}
    for key, tensor in recorded.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix).removeprefix("model.")
        if "W_pack" in name:
            for projection, third in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("W_pack", f"{projection}_proj")] = third
        else:
            tensors[name] = tensor
    return tensors


def test_13b_logits_equal_the_recorded_ones(golden):
    recorded, model = golden
    torch.testing.assert_close(
        model(recorded["input_ids"]), recorded["train_logits_nomask"], rtol=1e-4, atol=1e-4
    )


def test_13b_hidden_states_and_logits_of_a_padded_batch(golden):
    recorded, model = golden
    mask, hidden = recorded["attention_mask"], []
    hook = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    logits = model(recorded["input_ids"], mask)
    hook.remove()
    real = mask.bool()
    torch.testing.assert_close(hidden[0][real], recorded["hidden"][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[real], recorded["train_logits"][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[real], recorded["eval_logits"][real], rtol=1e-4, atol=1e-4)


def test_13b_loss_and_gradients_of_a_padded_batch(golden):
    recorded, model = golden
    labels = recorded["labels"]
    shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    loss = model(recorded["input_ids"], recorded["attention_mask"], shifted) / (shifted != -100).sum()
    torch.testing.assert_close(loss[0], recorded["train_loss"], rtol=0, atol=5e-4)
    expected = unpacked(recorded, "grad.")
    parameters = dict(model.named_parameters())
    for name, ours in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")
