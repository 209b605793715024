"""The published sizes are those of the models that moe_jax knows, and sizes that kernels take."""

import pytest

from moe_jax.presets import PRESETS
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.api import SIZE_MULTIPLE
from pallas_kernels.decode_experts.shapes import PUBLISHED_LAYERS, SHAPES

# moe_jax's preset -> the sizes of its expert layers.
MODELS = {
    "qwen3_30b_a3b": "qwen3_30b_a3b",
    "qwen3_30b_a3b_instruct_2507": "qwen3_30b_a3b",
    "qwen3_coder_30b_a3b": "qwen3_30b_a3b",
    "qwen3_235b_a22b": "qwen3_235b_a22b",
    "qwen3_coder_480b_a35b": "qwen3_coder_480b",
}


def test_every_model_preset_is_checked():
    assert set(MODELS) == set(PRESETS) - {"tiny"}
    assert set(MODELS.values()) == {
        name for name, layer in PUBLISHED_LAYERS.items() if not layer.beyond
    }


@pytest.mark.parametrize(("model", "layer"), MODELS.items())
def test_sizes_are_the_models(model, layer):
    config = PRESETS[model]
    assert SHAPES[layer] == ExpertShapes(
        E=config.num_experts,
        K=config.num_experts_per_tok,
        H=config.hidden_size,
        I=config.moe_intermediate_size,
    )


def test_the_kernels_take_all_of_them():
    for name, shapes in SHAPES.items():
        assert shapes.H % SIZE_MULTIPLE == shapes.I % SIZE_MULTIPLE == 0, name
        assert shapes.K <= shapes.E, name
