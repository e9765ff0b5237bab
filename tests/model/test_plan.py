"""What is cut how: parts cover everything once, and the model has no weight that the plan does not know."""

from __future__ import annotations

import pytest

from bc2exp.model.plan import span, stage_layers, stage_of, tensor_cut
from tests.model.small import small_model


@pytest.mark.parametrize(("length", "parts"), [(8, 1), (8, 4), (203, 8), (7, 3), (3, 5)])
def test_parts_are_consecutive_and_cover_everything(length, parts):
    spans = [span(length, parts, index) for index in range(parts)]
    assert [number for each in spans for number in range(length)[each]] == list(range(length))
    sizes = [each.stop - each.start for each in spans]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("layers", "stages"), [(32, 2), (40, 8), (3, 2), (5, 4)])
def test_stages_have_all_layers_in_order_and_the_first_no_fewer_than_the_last(layers, stages):
    found = stage_layers(layers, stages)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    assert len(found) == stages
    assert len(found[0]) >= len(found[-1]) >= 1
    assert len(found[0]) - len(found[-1]) <= 1


def test_every_weight_has_a_cut_and_a_stage():
    weights = dict(small_model("rope").named_parameters())
    cuts = {name: tensor_cut(name).dim for name in weights}
    assert {name for name, dim in cuts.items() if dim is None} == {name for name in weights if "norm" in name}
    assert {name.split(".")[-2] for name, dim in cuts.items() if dim == 1} == {"o_proj", "down_proj"}
    assert {name for name in weights if stage_of(name, 2, 2) == 0} == {
        name for name in weights if name.startswith(("embed_tokens.", "layers.0."))
    }


def test_a_weight_that_the_plan_does_not_know_is_an_error():
    with pytest.raises(KeyError):
        tensor_cut("layers.0.self_attn.rotary.weight")
