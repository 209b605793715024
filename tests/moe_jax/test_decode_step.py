"""The op "layers": a decode step by the kernels against the blocks, and who runs which call."""

import contextlib
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decode_step
from moe_jax.cache import KVCache, init_cache
from moe_jax.decode_step import LAYERS_BACKENDS
from moe_jax.dispatch import BackendChoice, record_choices
from moe_jax.generation import stream
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.quantization import fp8_config
from moe_jax.rope import RopeConfig
from moe_jax.sharding import MESH_AXES
from moe_jax.traces import RoutingTrace
from pallas_kernels.decode_step import LayerStep, Residual
from tests.moe_jax.scaled_weights import in_format_of
from tests.moe_jax.tiny import TINY, model_of, random_arrays
from tests.pallas_kernels.machine import ON_GPU

KERNELS = "pallas" if ON_GPU else "pallas_interpret"
SIZES = {
    "hidden_size": 128, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 64,
}  # fmt: skip
CONFIG = dataclasses.replace(TINY, **SIZES, num_hidden_layers=2)
ONE_LAYER = dataclasses.replace(CONFIG, num_hidden_layers=1)
YARN = RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64)
# Its linears and experts are FP8.
RING = dataclasses.replace(
    ONE_LAYER, use_sliding_window=True, sliding_window=64, rope=YARN, moe_intermediate_size=128,
    quantization_config=fp8_config((0,)),
)  # fmt: skip

C = 64
# Config, tokens in each row, and which rows are valid: the second one of "full" has ended. The
# first row of "ring" has come around twice, and the second is full.
CASES = {"full": (CONFIG, (63, 5), (1, 0)), "ring": (RING, (130, 64), (1, 1))}
BOUND = LAYERS_BACKENDS[KERNELS].rel_error["bfloat16"]


@functools.cache
def inputs(case):
    """bfloat16 weights, and a cache with as many random tokens a row as the case says."""
    config, lengths, _ = CASES[case]
    draw = np.random.default_rng(1).normal
    cache = jax.tree.map(
        lambda held: jnp.asarray(draw(size=held.shape), held.dtype), init_cache(config, 2, C)
    )
    cache = dataclasses.replace(cache, lengths=jnp.array(lengths, jnp.int32))
    plain = random_arrays(dataclasses.replace(config, quantization_config=None), "bfloat16")
    return in_format_of(config, plain), cache


@functools.cache
def step(case, backend, dtype="bfloat16"):
    """What a model returns for one new token of each row; float32 is of the same weights."""
    config, _, valid = CASES[case]

    def wide(array):
        return array.astype(dtype) if array.dtype == jnp.bfloat16 else array

    @jax.jit
    def call(arrays, cache):
        return from_arrays(config, arrays)(
            jnp.array([[1], [2]]),
            attention_mask=jnp.array(valid)[:, None],
            cache=cache,
            layers_backend=backend,
            output_routings=True,
            output_hidden_states=True,
        )

    with record_choices() as choices:
        out = call(*jax.tree.map(wide, inputs(case)))
    assert choices[0][1].backend == backend
    return jax.tree.map(np.asarray, out)


def three(case):
    """By the kernels, by the blocks, and by the blocks in float32."""
    return step(case, KERNELS), step(case, "blocks"), step(case, "blocks", "float32")


def relative_error(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_as_near_to_float32_as_the_blocks(case):
    kernels, blocks, truth = (out.logits for out in three(case))
    assert kernels.dtype == blocks.dtype == jnp.bfloat16
    assert relative_error(kernels, truth) < BOUND
    # The blocks round FP8 weights to bfloat16 once more, as they dequantise them.
    scaled = CASES[case][0].quantization_config is not None
    assert relative_error(blocks, truth) < (2 * BOUND if scaled else BOUND)
    for row in np.flatnonzero(CASES[case][2]):
        chosen, best = np.argmax(kernels[row, 0]), np.argmax(truth[row, 0])
        rounding = np.abs(np.asarray(blocks[row, 0], np.float32) - truth[row, 0]).max()
        assert truth[row, 0, best] - truth[row, 0, chosen] <= 2 * rounding  # else it is no tie


@pytest.mark.parametrize("case", CASES)
def test_hidden_states(case):
    kernels, blocks, truth = (out.hidden_states for out in three(case))
    assert len(kernels) == len(blocks)
    chex.assert_trees_all_equal(kernels[0], blocks[0])
    for found, plain, expected in zip(kernels[1:], blocks[1:], truth[1:], strict=True):
        assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
        assert relative_error(found, expected) < BOUND


@pytest.mark.parametrize("case", CASES)
def test_routings_are_those_of_the_blocks(case):
    kernels, blocks, _ = (out.routings for out in three(case))
    valid = np.array(CASES[case][2], bool)
    for found, plain in zip(kernels, blocks, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(found, plain)
        chex.assert_trees_all_equal(found.ids, plain.ids)
        assert np.all((found.ids >= 0) == valid[:, None])
        for name in ("weights", "logits", "probabilities"):
            found_array, expected = getattr(found, name), getattr(plain, name)
            np.testing.assert_allclose(found_array, expected, rtol=0.03, atol=0.03, err_msg=name)
        assert np.all((found.weights > 0) == valid[:, None])


@pytest.mark.parametrize("case", CASES)
def test_caches_hold_the_new_tokens_and_nothing_else_changes(case):
    _, before = inputs(case)
    kernels, blocks, _ = (out.cache for out in three(case))
    chex.assert_trees_all_equal(kernels.lengths, blocks.lengths)
    valid = np.array(CASES[case][2], bool)
    chex.assert_trees_all_equal(kernels.lengths, before.lengths + valid)
    for old, found, plain in zip(*map(leaves, (before, kernels, blocks)), strict=True):
        new = np.arange(C) == before.lengths[:, None] % C
        new &= valid[:, None]
        changed = np.any(found != old, axis=(1, 3))
        np.testing.assert_array_equal(changed, new)
        np.testing.assert_array_equal(np.any(plain != old, axis=(1, 3)), new)
        places = np.broadcast_to(new[:, None, :, None], old.shape)
        assert relative_error(found[places], plain[places]) < BOUND


def leaves(cache: KVCache):
    return [np.asarray(array) for array in (*cache.keys, *cache.values)]


# Who runs what, which is decided in Python, before a layer is traced.


class Stopped(Exception):
    """A backend was chosen, and has begun."""


@pytest.fixture
def chosen(monkeypatch):
    """A function that traces a call of a config, and says which backend its layers have on CUDA."""
    for name in LAYERS_BACKENDS:

        def run(*_):
            raise Stopped

        backend = dataclasses.replace(LAYERS_BACKENDS[name], run=run)
        monkeypatch.setitem(LAYERS_BACKENDS, name, backend)

    def trace(config, *, B=1, capacity=C, dtype="bfloat16", cache=None, S=1, mesh=None,
              platform="cuda", **options) -> BackendChoice:  # fmt: skip
        if cache is None:
            cache = jax.eval_shape(lambda: init_cache(config, B, capacity, jnp.dtype(dtype)))
        shapes = parameter_shapes(config, jnp.dtype(dtype))

        def call(arrays, ids, cache):
            model = from_arrays(config, arrays)
            return model(ids, cache=cache, platform=platform, **options)

        ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
        mesh = mesh or contextlib.nullcontext()
        with record_choices() as choices, mesh, pytest.raises(Stopped):
            jax.eval_shape(call, shapes, ids, cache)
        ((request, choice),) = choices
        assert request.op == "layers"
        return choice

    return trace


def changed(**fields):
    return dataclasses.replace(ONE_LAYER, **fields)


def scaled_but_for(*modules):
    """In FP8 and whole blocks, without some modules."""
    scaled = fp8_config((0,))
    scaled["modules_to_not_convert"] += modules
    return changed(moe_intermediate_size=128, quantization_config=scaled)


def cache_of(dtype="bfloat16"):
    return jax.eval_shape(lambda: init_cache(ONE_LAYER, 1, C, jnp.dtype(dtype)))


def on_mesh(**sizes):
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return Parallelism(mesh=jax.sharding.AbstractMesh(shape, MESH_AXES))


def b200():
    device = jax.sharding.AbstractDevice("NVIDIA B200", 148, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


REPLAY = RoutingTrace(expert_ids=jnp.zeros((1, 1, 2), jnp.int32), expert_weights=None)
ONLY_BLOCKS = {
    "dense layers": {"config": changed(mlp_only_layers=(0,))},
    "latent projections": {"config": changed(moe_latent_size=64)},
    "shared experts": {"config": changed(moe_shared_expert_intermediate_size=64)},
    "biases in attention": {"config": changed(attention_bias=True)},
    "router logits in the model's dtype": {"config": changed(router_dtype="model")},
    "heads of another size than 128": {"config": changed(head_dim=64)},
    "more than 64 query heads for a key": {"config": changed(num_attention_heads=65)},
    "more than 512 experts, or no multiple of 8": {"config": changed(num_experts=12)},
    "more than 32 experts for a token": {
        "config": changed(num_experts=40, num_experts_per_tok=33)
    },
    "more than 64 rows": {"B": 65},
    "a cache of more slots than the window": {
        "config": changed(use_sliding_window=True, sliding_window=32), "cache": cache_of(),
    },
    "H, I, C = (128, 64, 100) (it takes multiples of 64)": {"capacity": 100},
    "H, I, C = (128, 96, 64) (it takes multiples of 64)": {
        "config": changed(moe_intermediate_size=96)
    },
    "activation 'gelu' (it has silu, swish)": {"config": changed(hidden_act="gelu")},
    "dtype float32 (it takes bfloat16)": {"dtype": "float32"},
    "dtype float16 (it takes bfloat16)": {"dtype": "float16"},
    "parameters or a cache of another dtype than its inputs": {"cache": cache_of("float32")},
    "FP8 weights in other blocks than whole ones of 128 x 128": {
        "config": changed(quantization_config=fp8_config((0,)))  # I is 64
    },
    "FP8 in some, not all, of q, k and v, or of gate_up and down": {
        "config": scaled_but_for("k_proj")
    },
    "a replay": {"replay": REPLAY},
    "a backend named for its experts or attention": {"attention_backend": "xla"},
    "parameters split over a mesh's data": {"parallelism": on_mesh(data=2)},
    "more experts for a token than a shard has": {"parallelism": on_mesh(expert=8)},
    "H, I, C = (128, 32, 64) (it takes multiples of 64)": {
        "config": changed(num_key_value_heads=2), "parallelism": on_mesh(tensor=2),
    },
}  # fmt: skip


def test_every_word_has_a_case():
    words = set(LAYERS_BACKENDS["blocks"].features)
    of_kernels = LAYERS_BACKENDS["pallas"].features
    assert words - set(ONLY_BLOCKS) == {"a GPU that is no Hopper", *of_kernels}


@pytest.mark.parametrize("lack", ONLY_BLOCKS)
def test_what_only_the_blocks_take(chosen, lack):
    call = {"config": ONE_LAYER} | ONLY_BLOCKS[lack]
    choice = chosen(**call)
    assert choice.backend == "blocks"
    assert choice.why.startswith(f"pallas does not support {lack}; the blocks of decoder.py")
    message = re.escape(f"layers backend 'pallas' does not do {lack}; blocks can")
    with pytest.raises(NotImplementedError, match=message):
        chosen(**call, layers_backend="pallas")


@pytest.mark.skipif(ON_GPU, reason="names a GPU that is not there")
def test_a_gpu_without_the_instructions_runs_the_blocks(chosen):
    choice = chosen(ONE_LAYER, mesh=b200())
    assert choice.backend == "blocks"
    assert "pallas does not support a GPU that is no Hopper" in choice.why


def test_who_runs_the_rest(chosen, monkeypatch):
    backend = {
        (platform, B, S): chosen(CONFIG, B=B, S=S, platform=platform).backend
        for platform in ("cpu", "cuda", "ascend")
        for B, S in ((1, 1), (64, 1), (1, 5))
    }
    kernels = {("cuda", 1, 1), ("cuda", 64, 1)}
    assert {call for call, name in backend.items() if name == "pallas"} == kernels
    assert set(backend.values()) == {"pallas", "blocks"}
    message = r"does not do phase 'prefill' \(it is for decode\); blocks can"
    with pytest.raises(NotImplementedError, match=message):
        chosen(CONFIG, S=5, layers_backend="pallas")
    monkeypatch.setenv("MOE_JAX_LAYERS_BACKEND", "blocks")
    assert chosen(CONFIG) == ("blocks", "MOE_JAX_LAYERS_BACKEND says so")
    monkeypatch.delenv("MOE_JAX_LAYERS_BACKEND")
    # One named for the experts is the blocks'.
    monkeypatch.setenv("MOE_JAX_EXPERTS_BACKEND", "portable")
    assert chosen(CONFIG).backend == "blocks"
    with pytest.raises(ValueError, match="backend is 'triton'; expected 'auto' or one of"):
        chosen(CONFIG, layers_backend="triton")


@pytest.mark.parametrize("plain", [(), ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("experts",)])
def test_fp8_weights_are_the_kernels(chosen, plain):
    assert chosen(scaled_but_for(*plain)).backend == "pallas"
    assert chosen(scaled_but_for(*plain), B=64).backend == "pallas"


def test_a_decode_backend_named_to_stream_is_the_blocks(monkeypatch):
    def run(*_):
        raise Stopped

    kernels = dataclasses.replace(LAYERS_BACKENDS["pallas"], run=run)
    monkeypatch.setitem(LAYERS_BACKENDS, "pallas", kernels)
    generate = functools.partial(
        stream,
        model_of(ONE_LAYER, "bfloat16"),
        [[1, 2]],
        max_new_tokens=2,
        prefill_backend="portable",
        steps_per_dispatch=1,
        platform="cuda",
    )
    with record_choices() as choices:
        list(generate(decode_backend="portable"))
    ran = [(r.phase, choice.backend) for r, choice in choices if r.op == "layers"]
    assert ran == [("prefill", "blocks"), ("decode", "blocks")]
    with pytest.raises(Stopped):
        list(generate())


# What decode_layers is given.


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each decode_layers; a stub in its place returns arrays of its shapes."""
    recorded = []

    def stub(residual, weights, caches, positions, **options):
        recorded.append(options | {"weights": weights, "positions": positions})
        B, K = len(caches[0][0]), options["K"]
        routing = jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K)), jnp.zeros((B, 8))
        return [LayerStep(Residual(2 * residual.x), *cache, *routing) for cache in caches]

    monkeypatch.setattr(decode_step, "decode_layers", stub)
    return recorded


def traced(config):
    """A step of three rows in the kernels, traced."""

    def call(arrays, ids, cache):
        return from_arrays(config, arrays)(ids, cache=cache, layers_backend=KERNELS).logits

    cache = jax.eval_shape(lambda: init_cache(config, 3, C))
    ids = jax.ShapeDtypeStruct((3, 1), jnp.int32)
    return jax.jit(call).trace(parameter_shapes(config), ids, cache)


@pytest.mark.parametrize(
    ("scope", "launches"),
    [(None, "layer"), ("model", "layer"), ("attention", "blocks"), ("moe", "blocks")],
)
def test_a_scope_of_a_part_cuts_the_layer(calls, scope, launches):
    asked = {} if scope is None else {"enable_superkernel": True, "superkernel_scope": scope}
    text = traced(changed(**asked)).lower().as_text(debug_info=True)
    assert [call["launches"] for call in calls] == [launches]
    assert ("superkernel.decode_layers" in text) == (scope == "model")


def test_all_layers_are_one_call(calls):
    traced(CONFIG)
    (call,) = calls
    assert len(call["weights"]) == CONFIG.num_hidden_layers > 1
    assert call["positions"].cos.shape == (3, 128)
