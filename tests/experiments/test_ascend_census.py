"""Each rule of the census catches what is planted for it, and plain code passes."""

import jax
import jax.numpy as jnp
import pytest

from experiments.ascend.census import Composite, census, violations

X = jnp.ones((4, 8))
I = jnp.zeros(4, jnp.int32)
W = jnp.ones((2, 8, 3))
ONE = jnp.int32(1)


def text_of(function, *arguments) -> str:
    return jax.export.export(jax.jit(function), platforms=["ascend"])(*arguments).mlir_module()


def broken_by(function, *arguments) -> str:
    return "\n".join(violations(census(text_of(function, *arguments))))


def running_sum(x):
    return jax.lax.scan(lambda total, row: (total + row, total), x[0], x)


PLANTED = {
    "top_k": (lambda x: jax.lax.top_k(x, 2), (X,), "composite chlo.top_k"),
    "the sort inside top_k": (lambda x: jax.lax.top_k(x, 2), (X,), "stablehlo.sort is not"),
    "sort": (jnp.sort, (X,), "stablehlo.sort is not"),
    "argsort": (jnp.argsort, (X,), "stablehlo.sort is not"),
    "set": (lambda x, i: x.at[i].set(1.0), (X, I), "stablehlo.scatter is not"),
    "add": (lambda x, i: x.at[i].add(1.0), (X, I), "stablehlo.scatter is not"),
    "scan": (running_sum, (X,), "stablehlo.while is not"),
    "fori_loop": (
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y + 1, x),
        (X, ONE),
        "stablehlo.while is not",
    ),
    "cond": (lambda x, n: jax.lax.cond(n > 1, jnp.sin, jnp.cos, x), (X, ONE), ".case is not"),
    "cumsum": (lambda x: jnp.cumsum(x, axis=1), (X,), "stablehlo.reduce_window is not"),
    "argmax": (lambda x: jnp.argmax(x, axis=1), (X,), "stablehlo.reduce has 2 operands"),
    "two indices": (lambda x, i: x[i, i], (X, I), "is not along one axis"),
    "take_along_axis": (
        lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1, mode="clip"),
        (X, I),
        "is not along one axis",
    ),
    "dynamic_slice": (
        lambda x, n: jax.lax.dynamic_slice(x, (n, 0), (1, 8)),
        (X, ONE),
        "stablehlo.dynamic_slice is not",
    ),
    "dynamic_update_slice": (
        lambda x, n: jax.lax.dynamic_update_slice(x, x[:1], (n, 0)),
        (X, ONE),
        "stablehlo.dynamic_update_slice is not",
    ),
    "symbolic shape": (
        lambda x: x + 1,
        (jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8"), jnp.float32),),
        "func.func has the type tensor<?x8xf32>; expected a static shape",
    ),
    "shape assertion": (
        lambda x: x + 1,
        (jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8"), jnp.float32),),
        "stablehlo.custom_call of shape_assertion",
    ),
    "ragged_dot": (
        lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([2, 2])),
        (X, W),
        "stablehlo.reduce_window is not",
    ),
    "random bits": (lambda k: jax.random.bits(k, (3,)), (jax.random.key(0),), "stablehlo.xor is"),
    "fft": (lambda x: jnp.fft.fft(x).real, (X,), "stablehlo.fft is not"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_each_rule_catches_its_plant(planted):
    function, arguments, message = PLANTED[planted]
    assert message in broken_by(function, *arguments)


def test_custom_calls_are_named():
    """In an artifact for cpu, since none of JAX's custom calls lowers for ascend at all."""
    exported = jax.export.export(
        jax.jit(jnp.linalg.cholesky),
        platforms=["cpu"],
    )(jnp.eye(3))
    assert "stablehlo.custom_call of lapack_spotrf_ffi: a plain backend" in "\n".join(
        violations(census(exported.mlir_module()))
    )


def test_a_kernel_cannot_be_exported_at_all_or_is_caught():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    def call(interpret):
        return pallas.pallas_call(double, jax.eval_shape(lambda: X), interpret=interpret)

    with pytest.raises((ValueError, NotImplementedError)):
        text_of(call(interpret=False), X)
    assert "stablehlo.while is not" in broken_by(call(interpret=True), X)


def test_a_plant_inside_a_composite_is_caught():
    hidden = jax.lax.composite(lambda x: jnp.cumsum(x, axis=1), name="superkernel.hidden")
    assert broken_by(hidden, X).startswith("stablehlo.reduce_window is not")


def test_violations_are_counted_and_placed():
    [line] = violations(census(text_of(lambda x, i: x.at[i].set(0).at[i].set(1), X, I)))
    assert "(2 times, first in " in line
    assert "test_ascend_census.py:" in line


def plain(x, w, i):
    gathered = jnp.take(w, i, axis=0, mode="clip")  # [4, 8, 3]
    y = jnp.einsum("th,thn->tn", x, gathered)
    highest = jnp.max(y, axis=-1, keepdims=True)
    place = jax.lax.broadcasted_iota(jnp.int32, y.shape, 1)
    return jax.nn.softmax(y), jnp.min(jnp.where(y == highest, place, y.shape[1]), axis=-1)


def test_plain_code_passes():
    assert violations(census(text_of(plain, X, W, I))) == []


def test_composites_are_listed_with_their_attributes():
    scoped = jax.lax.composite(
        lambda *arrays, **_: plain(*arrays), name="superkernel.toy", version=3
    )

    def function(x, w, i):
        return scoped(x, w, i, fast=True, label="a", width=2)

    found = census(text_of(function, X, W, I))
    attributes = {"fast": True, "label": "a", "width": 2}
    assert found.composites == (
        Composite(name="superkernel.toy", version=3, attributes=attributes),
    )
    # What is in the decomposition counts as it does without the composite.
    bare = census(text_of(plain, X, W, I)).ops
    assert {name: found.ops[name] for name in bare if name.startswith("stablehlo.")} == {
        name: count for name, count in bare.items() if name.startswith("stablehlo.")
    }


@pytest.mark.parametrize("text", ["", "module {}", "module {", "func.func @f() { nonsense }"])
def test_what_is_no_module_gives_a_value_error(text):
    with pytest.raises(ValueError, match="no StableHLO module that "):
        census(text)
