"""What other ports of Qwen3-MoE get wrong, one test each.

Each shows that the model agrees with transformers, and that the mistake would have been seen.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS, ExpertWeights, experts
from moe_jax.losses import load_balancing_loss
from moe_jax.parameters import parameter_shapes
from moe_jax.presets import PRESETS
from moe_jax.rope import RopeConfig, attention_factor, rope_tables
from tests.moe_jax.goldens.cases import ABSENT, BASE, ROPE_SETTINGS, replace_keys
from tests.moe_jax.parity.golden import (
    assert_close,
    assert_logits_differ,
    assert_matches,
    call,
    golden,
    model_of,
)

PADDED = np.array([1, 4, 5])
XLA_BACKENDS = [
    name for name, backend in EXPERTS_BACKENDS.items() if "float32" in backend.rel_error
]


@pytest.mark.parametrize("name", ["rope_theta", "rope_theta_absent", "rope_parameters"])
def test_theta_is_not_hard_coded(name):
    assert_matches(model_of(name), golden(name))
    hard_coded = {"rope_theta": 1e6, "rope_parameters": ABSENT}
    assert_logits_differ(model_of(name, **hard_coded), golden(name))


def test_norm_topk_prob_false_is_honoured():
    name = "norm_topk_prob_false"
    assert_matches(model_of(name), golden(name))
    assert_logits_differ(model_of(name, norm_topk_prob=True), golden(name))


def test_decoder_sparse_step_is_not_ignored():
    name = "decoder_sparse_step"
    assert_matches(model_of(name), golden(name))
    config = Qwen3MoeConfig.from_hf(
        BASE | {"decoder_sparse_step": 3, "num_hidden_layers": 8, "mlp_only_layers": [5]}
    )
    gates = [name for name in parameter_shapes(config) if name.endswith("mlp.gate.weight")]
    assert gates == ["layers.2.mlp.gate.weight"]


@pytest.mark.parametrize("kind", [kind for kind in ROPE_SETTINGS if kind != "default"])
def test_rope_scaling_is_not_dropped(kind):
    name = f"rope_{kind}_beyond"
    assert_matches(model_of(name), golden(name))
    dropped = {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
    assert_logits_differ(model_of(name, **dropped), golden(name))


def test_the_aux_loss_leaves_padding_out():
    differences = []
    for name in ("padding_left", "padding_right", "padding_both"):
        found = golden(name)
        out = call(model_of(name), found)
        assert_close(out.aux_loss, found.outputs["aux_loss"])
        with_padding = load_balancing_loss(out.router_logits, found.config.num_experts_per_tok)
        differences.append(abs(with_padding - out.aux_loss))
    assert max(differences) > 0.01


def test_the_aux_loss_is_added_once():
    name = "router_aux_loss_coef"
    model, found = model_of(name), golden(name)
    out = call(model, found)
    without = call(model, found, output_router_logits=False)
    assert_close(out.loss, found.outputs["loss"])
    assert_close(out.loss - without.loss, 0.7 * out.aux_loss)
    assert without.aux_loss is None
    # and only where there are labels
    unlabelled = call(model, found, labels=None)
    assert unlabelled.loss is None
    assert_close(unlabelled.aux_loss, out.aux_loss)


def test_head_dim_is_not_hidden_size_over_heads():
    name = "base"
    H, heads, D = (BASE[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
    assert H // heads != D
    assert_matches(model_of(name), golden(name))
    assert golden("head_dim_absent").config.head_dim == H // heads

    shapes = parameter_shapes(PRESETS["qwen3_30b_a3b"])
    assert shapes["layers.0.self_attn.q_proj.weight"].shape == (4096, 2048)
    assert shapes["layers.0.self_attn.k_proj.weight"].shape == (512, 2048)
    assert shapes["layers.0.self_attn.o_proj.weight"].shape == (2048, 4096)
    assert shapes["layers.0.self_attn.q_norm.weight"].shape == (128,)


@pytest.fixture
def padded_layer():
    """A layer's x [T, H], weights, ids and routing weights; PADDED rows are routed nowhere."""
    T, K, E, H, I = 7, 2, 4, 8, 6
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((T, H), (E, 2, I, H), (E, H, I))
    )
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (T, 1)), axis=1)[:, :K]
    ids[PADDED] = -1
    weights = ExpertWeights(gate_up=gate_up, down=down)
    return x, weights, jnp.asarray(ids), jnp.full((T, K), 0.5)


@pytest.mark.parametrize("backend", XLA_BACKENDS)
def test_rows_of_padding_leak_no_nan(padded_layer, backend):
    x, weights, ids, w = padded_layer
    run = jax.jit(functools.partial(experts, backend=backend))
    clean = run(x, weights, ids, w)
    dirty = run(x.at[PADDED].set(jnp.nan), weights, ids, w.at[PADDED].set(jnp.nan))
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(clean[PADDED], 0)
    assert jnp.all(jnp.delete(clean, PADDED, axis=0) != 0)


def test_rows_of_padding_leak_no_nan_into_gradients(padded_layer):
    # grouped is the backend whose products leave rows undefined, and the one that trains
    x, weights, ids, w = padded_layer

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients_of(x, weights, w):
        return experts(x, weights, ids, w, backend="grouped").sum()

    clean = gradients_of(x, weights, w)
    dirty = gradients_of(x.at[PADDED].set(jnp.nan), weights, w.at[PADDED].set(jnp.nan))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(clean))
    chex.assert_trees_all_equal(dirty, clean)


@pytest.mark.parametrize(("factor", "expected"), [(4.0, 1.13863), (10.0, 1.23026)])
def test_yarn_scales_cos_and_sin(factor, expected):
    rope = RopeConfig(kind="yarn", factor=factor, original_max_position_embeddings=1024)
    assert attention_factor(rope, 4096) == pytest.approx(expected, abs=5e-6)
    # at position 0 the cosine is 1
    cos, _ = rope_tables(rope, 16, 4096, jnp.zeros((1, 1), jnp.int32), jnp.float32)
    assert_close(cos, jnp.full((1, 1, 16), expected))


def test_angles_are_not_computed_in_bfloat16():
    assert jnp.bfloat16(257) == 256  # the trap
    positions = jnp.array([[256, 257]])
    tables = rope_tables(RopeConfig(), 16, 512, positions, jnp.bfloat16)
    exact = rope_tables(RopeConfig(), 16, 512, positions, jnp.float32)
    for rounded, table in zip(tables, exact, strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, table.astype(jnp.bfloat16))
        assert rounded[0, 0, 0] != rounded[0, 1, 0]
    # the first frequency is 1: the angle is the position
    assert_close(exact[0][0, :, 0], jnp.asarray(np.cos([256.0, 257.0]), jnp.float32))


@pytest.mark.parametrize("given", ["neither", "both"])
def test_exactly_one_of_input_ids_and_inputs_embeds(given):
    model, found = model_of("base"), golden("base")
    ids = jnp.asarray(found.inputs["input_ids"]) if given == "both" else None
    embeds = jnp.zeros((*found.valid.shape, 24)) if given == "both" else None
    with pytest.raises(ValueError, match="exactly one") as raised:
        model(ids, inputs_embeds=embeds)
    assert "input_ids" in str(raised.value)
    assert "inputs_embeds" in str(raised.value)


def test_a_window_counts_only_if_it_is_used():
    name = "use_sliding_window_false"
    assert_matches(model_of(name), golden(name))
    assert_logits_differ(model_of(name, use_sliding_window=True), golden(name))


def test_max_window_layers_is_ignored():
    name = "max_window_layers"
    assert_matches(model_of(name), golden(name))
    assert Qwen3MoeConfig.from_hf(replace_keys(BASE, {"max_window_layers": 1})).window is None
