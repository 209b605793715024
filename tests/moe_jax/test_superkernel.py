"""Superkernel scopes: what they mark on each platform, and that they change no bit."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import init_cache
from moe_jax.config_checks import ConfigError
from moe_jax.parameters import from_arrays
from moe_jax.superkernel import SCOPES, VERSION, superkernel_scope
from tests.moe_jax.tiny import TINY, random_arrays, random_ids

B, S, CAPACITY = 2, 5, 16
HERE = "cpu" if jax.default_backend() == "cpu" else "cuda"
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)


def with_scope(config, scope):
    if scope is None:
        return config
    return dataclasses.replace(config, enable_superkernel=True, superkernel_scope=scope)


def call(config, scope, platform):
    """(arrays, ids, cache) -> what a model with this scope returns on this platform."""

    def run(arrays, ids, cache):
        model = from_arrays(with_scope(config, scope), arrays)
        output = model(ids, cache=cache, platform=platform, output_routings=True)
        return output.logits, output.cache, output.routings

    return jax.jit(run)


# XLA may leave out a rounding to bfloat16 where it sees both sides of it: on a CPU it does so, or
# not, by where a composite was. This asks it to round whenever the program says so.
EVERY_ROUNDING = {"xla_allow_excess_precision": False}


@functools.cache
def inputs(config, dtype, S=1):
    """Random arrays, S tokens of each row, and a cache that already holds some."""
    prompt = random_ids(4, (B, S))
    empty = init_cache(config, B, CAPACITY, dtype)
    draw = np.random.default_rng(5).normal
    cache = dataclasses.replace(
        jax.tree.map(lambda held: jnp.asarray(draw(size=held.shape), held.dtype), empty),
        lengths=jnp.array([7, 3], jnp.int32),
    )
    return random_arrays(config, dtype), prompt, cache


@functools.cache
def compiled(scope, platform, dtype):
    options = EVERY_ROUNDING if dtype == jnp.bfloat16 else None
    return call(ONE_LAYER, scope, platform).lower(*inputs(ONE_LAYER, dtype)).compile(options)


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [(HERE, jnp.bfloat16), ("ascend", jnp.bfloat16), ("ascend", jnp.float32)],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_bits_are_the_same_on_and_off(scope, platform, dtype):
    arrays, ids, cache = inputs(ONE_LAYER, dtype)
    on, off = cache, cache
    for _ in range(2):
        with_it = compiled(scope, platform, dtype)(arrays, ids, on)
        without = compiled(None, platform, dtype)(arrays, ids, off)
        chex.assert_trees_all_equal(with_it, without)
        (logits, on, _), (_, off, _) = with_it, without
        ids = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)


@pytest.mark.parametrize("scope", SCOPES)
def test_on_ascend_a_decode_step_has_composites(scope):
    text = call(TINY, scope, "ascend").lower(*inputs(TINY, jnp.float32)).as_text()
    composites = 1 if scope == "model" else TINY.num_hidden_layers
    assert text.count(f'stablehlo.composite "superkernel.{SCOPES[scope]}"') == composites
    assert text.count("stablehlo.composite") == composites
    assert "composite_attributes = {stream_fusion = false}" in text
    assert f"version = {VERSION}" in text


@pytest.mark.parametrize("scope", ["attention", "model"])
def test_a_region_takes_its_arrays_in_the_models_dtype(scope):
    """RoPE's tables too, which the kernels' decode step takes in float32."""
    text = call(ONE_LAYER, scope, "ascend").lower(*inputs(ONE_LAYER, jnp.bfloat16)).as_text()
    (region,) = re.findall(r"stablehlo\.composite .*: \((.*)\) ->", text)
    assert "xbf16>" in region
    assert "xf32>" not in region


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_elsewhere_it_is_a_named_scope(scope, platform):
    traced = call(ONE_LAYER, scope, platform).trace(*inputs(ONE_LAYER, jnp.float32))
    lowered = traced.lower(lowering_platforms=("cpu",))
    assert "stablehlo.composite" not in lowered.as_text()
    assert f"superkernel.{SCOPES[scope]}" in lowered.as_text(debug_info=True)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("platform", ["cpu", "ascend"])
def test_in_prefill_it_does_nothing(scope, platform):
    arguments = inputs(ONE_LAYER, jnp.float32, S)
    marked, plain = (call(ONE_LAYER, s, platform).lower(*arguments) for s in (scope, None))
    assert f"superkernel.{SCOPES[scope]}" not in marked.as_text(debug_info=True)
    assert marked.as_text() == plain.as_text()


def double(x):
    return 2 * x


def test_options_are_attributes():
    scope = superkernel_scope(True, "attention", stream_fusion=True, platform="npu")
    assert "stream_fusion = true" in jax.jit(scope(double)).lower(jnp.ones(3)).as_text()


def test_not_enabled_returns_the_function_itself():
    assert superkernel_scope(False, "attention", platform="ascend")(double) is double


@pytest.mark.parametrize("platform", ["cpu", "ascend"])
def test_nesting_is_an_error_that_names_both(platform):
    inner = superkernel_scope(True, "attention", platform=platform)(double)
    outer = superkernel_scope(True, "decode_layers", platform=platform)(lambda x: inner(x) + 1)
    with pytest.raises(RuntimeError, match="'attention' is inside 'decode_layers'"):
        outer(jnp.ones(3))
    # and is forgotten: each by itself works afterwards
    chex.assert_trees_all_equal(inner(jnp.ones(3)), 2 * jnp.ones(3))


def test_a_region_is_a_function_of_all_its_arrays():
    captured = jnp.arange(3.0)
    scope = superkernel_scope(True, "attention", platform="ascend")
    with pytest.raises(Exception, match=r"(?i)captur|clos|const"):
        jax.jit(lambda c, x: scope(lambda x: x + c)(x))(captured, captured)


def test_unknown_names():
    with pytest.raises(ValueError, match="label is 'moe'; expected one of"):
        superkernel_scope(True, "moe")
    with pytest.raises(ConfigError, match="superkernel_scope is 'experts'; expected one of"):
        dataclasses.replace(TINY, superkernel_scope="experts")
