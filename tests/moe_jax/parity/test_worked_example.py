"""The walkthrough's worked example, line by line, as shapes: nothing of its size is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax.attention import xla
from moe_jax.cache import init_cache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decoder import MoeParams, StepOptions, TokenPositions, decoder_layer, moe_block
from moe_jax.layers import linear
from moe_jax.model import Qwen3Moe
from moe_jax.modules import params_of
from moe_jax.routing import Routing, route
from moe_jax.routing_stats import expert_load
from tests.moe_jax.parity.golden import assert_close, call, golden, model_of

B, S, H, V = 2, 128, 4096, 151936
HEADS, KV, D = 32, 8, 128
E, K = 8, 2
KEPT = 32

CONFIG = Qwen3MoeConfig(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=11008,
    num_hidden_layers=4,
    num_attention_heads=HEADS,
    num_key_value_heads=KV,
    head_dim=D,
    decoder_sparse_step=4,
    num_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=11008,
)
MOE_LAYER = 3
OPTIONS = StepOptions(config=CONFIG, platform="cpu", phase="prefill")
HIDDEN = jax.ShapeDtypeStruct((B, S, H), jnp.bfloat16)
IDS = jax.ShapeDtypeStruct((B, S), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return Qwen3Moe(CONFIG, rngs=None)


@pytest.fixture(scope="module")
def out(model):
    cache = jax.eval_shape(lambda: init_cache(CONFIG, B, S))

    def run(model, ids, cache):
        return model(
            ids,
            cache=cache,
            logits_to_keep=KEPT,
            output_hidden_states=True,
            output_router_logits=True,
            output_routings=True,
        )

    return jax.eval_shape(run, model, IDS, cache)


@pytest.fixture(scope="module")
def params(model):
    return jax.eval_shape(params_of, model)


def shape_of(params, x) -> tuple[int, ...]:
    """Of a linear layer's output."""
    return jax.eval_shape(lambda params, x: linear(x, *params), params, x).shape


def test_embeddings(out):
    assert out.hidden_states[0].shape == (2, 128, 4096)


def test_every_layer_keeps_the_shape(out):
    assert [state.shape for state in out.hidden_states] == [(2, 128, 4096)] * 5


def test_projections(params):
    layer = params.layers[0].self_attn
    assert shape_of(layer.q_proj, HIDDEN) == (2, 128, 4096)
    assert shape_of(layer.k_proj, HIDDEN) == (2, 128, 1024)
    assert shape_of(layer.v_proj, HIDDEN) == (2, 128, 1024)


@pytest.fixture
def attended(model, monkeypatch):
    """What the layer's attention is called with, as shapes."""
    seen, attend = [], xla.attend

    def recording(q, k, v, visible):
        seen.append([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, visible)])
        return attend(q, k, v, visible)

    monkeypatch.setattr(xla, "attend", recording)
    jax.eval_shape(lambda model, ids: model(ids).logits, model, IDS)
    assert len(seen) == CONFIG.num_hidden_layers
    return seen[0]


def test_heads(attended):
    q, k, v, _ = attended
    assert q.shape == (2, 32, 128, 128)
    assert k.shape == v.shape == (2, 8, 128, 128)


def test_attention_weights(attended):
    # Heads that share a key are one more axis inside: 8 groups of 4 are the 32 heads.
    jaxpr = jax.make_jaxpr(xla.attend)(*attended)
    weights = [e.outvars[0].aval.shape for e in equations(jaxpr.jaxpr) if e.primitive.name == "exp"]
    assert weights == [(2, 8, 4, 128, 128)]
    assert math.prod(weights[0]) == math.prod((2, 32, 128, 128))


def equations(jaxpr):
    """The equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_router(params, out):
    tokens = jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16)
    assert shape_of(params.layers[MOE_LAYER].mlp.gate, tokens) == (256, 8)
    [routing] = out.routings
    assert routing.ids.shape == routing.weights.shape == (256, 2)
    assert routing.probabilities.shape == (256, 8)


def test_rows_of_the_experts_add_up_to_512():
    logits = jax.random.normal(jax.random.key(0), (B * S, E))
    load = expert_load(route(logits, K, norm_topk_prob=False).ids, E)
    assert load.shape == (E,)
    assert load.sum() == 512


def test_moe_output(params):
    valid = jax.ShapeDtypeStruct((B, S), jnp.bool_)
    y, _ = jax.eval_shape(
        lambda moe, x, valid: moe_block(moe, x, valid, OPTIONS),
        params.layers[MOE_LAYER].mlp,
        HIDDEN,
        valid,
    )
    assert y.shape == (2, 128, 4096)


def test_only_the_fourth_layer_has_experts(params):
    sparse = [isinstance(layer.mlp, MoeParams) for layer in params.layers]
    assert sparse == [False, False, False, True]


def test_one_entry_of_router_logits(out):
    assert [logits.shape for logits in out.router_logits] == [(256, 8)]


def test_logits_to_keep(out):
    assert out.logits.shape == (2, 32, 151936)


def test_kept_logits_are_the_tail_of_all():
    model, found = model_of("logits_to_keep_3"), golden("logits_to_keep_3")
    kept = call(model, found).logits
    assert_close(kept, call(model, found, logits_to_keep=0).logits[:, -3:])
    assert_close(kept, found.outputs["logits"])


def test_cache(out):
    assert [k.shape for k in out.cache.keys] == [(2, 8, 128, 128)] * 4
    assert [v.shape for v in out.cache.values] == [(2, 8, 128, 128)] * 4


# What the walkthrough is wrong about.


def test_position_ids_with_a_leading_axis_are_refused(model):
    position_ids = jax.ShapeDtypeStruct((1, B, S), jnp.int32)
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 2, 128\)"):
        jax.eval_shape(lambda m, ids, p: m(ids, position_ids=p).logits, model, IDS, position_ids)


def test_position_ids_of_one_row_and_of_all(model):
    for rows in (1, B):
        position_ids = jax.ShapeDtypeStruct((rows, S), jnp.int32)
        logits = jax.eval_shape(
            lambda m, ids, p: m(ids, position_ids=p).logits, model, IDS, position_ids
        )
        assert logits.shape == (B, S, V)


def test_head_dim_is_what_the_config_says():
    config = dataclasses.replace(CONFIG, head_dim=64)
    model = Qwen3Moe(config, rngs=None)
    attention = jax.eval_shape(params_of, model.layers[0].self_attn)
    assert shape_of(attention.q_proj, HIDDEN) == (2, 128, 2048)
    assert model.layers[0].self_attn.o_proj.weight.shape == (4096, 2048)


def test_masks_are_finite_so_that_a_row_of_padding_is_not_nan():
    model, found = model_of("base"), golden("base")
    mask = jnp.asarray(np.where([[True], [False]], 1, np.zeros_like(found.valid, np.int32)))
    out = call(model, found, attention_mask=mask)
    assert all(bool(jnp.isfinite(state).all()) for state in out.hidden_states)
    assert bool(jnp.isfinite(out.logits).all())
    assert_close(out.logits[0], found.outputs["logits"][0])


def test_a_decoder_layer_returns_hidden_states_and_no_router_logits(model, params, out):
    # A layer's first result is the hidden states. How it routed, if it has experts, is a Routing;
    # router logits are the model's output, one entry for each layer with experts.
    slots = jax.ShapeDtypeStruct((B, S), jnp.int32)
    valid = jax.ShapeDtypeStruct((B, S), jnp.bool_)
    rope = (jax.ShapeDtypeStruct((1, S, D), jnp.bfloat16),) * 2
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    positions = TokenPositions(rope=rope, slots=slots, valid=valid, lengths=lengths)
    for index, layer in enumerate(params.layers):
        x, _, routing = jax.eval_shape(
            lambda layer, x, positions: decoder_layer(layer, x, positions, None, None, OPTIONS),
            layer,
            HIDDEN,
            positions,
        )
        assert x.shape == (2, 128, 4096)
        assert isinstance(routing, Routing if index == MOE_LAYER else type(None))
    assert len(out.router_logits) == 1
    silent = jax.eval_shape(lambda model, ids: model(ids), model, IDS)
    assert silent.router_logits is None
