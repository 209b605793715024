"""What test_meshes.py checks, in a process of its own that has four CPU devices.

    python -m tests.moe_jax.training.on_four_devices

with XLA_FLAGS=--xla_force_host_platform_device_count=4 and JAX_PLATFORMS=cpu.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType

from moe_jax.sharding import Parallelism, make_mesh
from moe_jax.training import (
    OptimizerOptions,
    TrainOptions,
    gradients_of,
    init_state,
    train_step,
)
from tests.moe_jax.tiny import random_arrays
from tests.moe_jax.training import test_train_step

CONFIG = dataclasses.replace(
    test_train_step.CONFIG,
    num_key_value_heads=2,
    attention_bias=True,
    num_hidden_layers=1,
)
OPTIONS = TrainOptions(config=CONFIG, compute_dtype="float32")
PARAMS = random_arrays(CONFIG)
ROWS = test_train_step.make_batch(1, 4)
# Two micro-batches; the second is padding alone.
ACCUMULATED = test_train_step.make_batch(2, 4, masked=(4, 5, 6, 7))

gradients = jax.jit(gradients_of, static_argnames="options")


def on_mesh(exchange="auto", mesh=None, **sizes) -> TrainOptions:
    mesh = make_mesh(**sizes) if mesh is None else mesh
    return dataclasses.replace(OPTIONS, parallelism=Parallelism(mesh=mesh, exchange=exchange))


def expect_same(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        a, b = np.asarray(found[name], np.float64), np.asarray(value, np.float64)
        assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b), f"{what}: {name}"


def run(options: TrainOptions) -> tuple[dict, dict]:
    parallelism = options.parallelism
    batch = jax.device_put(ROWS, parallelism.sharding(None, ("data", "expert")))
    return gradients(parallelism.place(PARAMS), batch, options=options)


def check_gradients(one: tuple[dict, dict]) -> None:
    """Loss, balance loss and every gradient are those of one device."""
    explicit = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    assert explicit.axis_types == (AxisType.Explicit,)
    for options in (
        on_mesh(),
        on_mesh(data=2),
        on_mesh(mesh=explicit),
        on_mesh(expert=2, exchange="gather"),
        on_mesh(tensor=2),
        on_mesh(expert=4),
        on_mesh(data=2, tensor=2),
    ):
        what = f"{dict(options.parallelism.mesh.shape)}, {options.parallelism.exchange}"
        found, metrics = run(options)
        expect_same(found, one[0], what)
        expect_same(metrics, one[1], what)


def check_a_step(one: tuple[dict, dict]) -> None:
    """A step over two micro-batches, one of them padding: the losses are the global batch's.

    The state stays where it lies, a part on each device, and its first moments are the gradients.
    """
    optimizer = OptimizerOptions(clip_norm=None)
    options = dataclasses.replace(on_mesh(data=2, expert=2), optimizer=optimizer)
    parallelism = options.parallelism
    state = init_state(PARAMS, optimizer, parallelism=parallelism)
    shardings = parallelism.shardings_of(state)
    step = jax.jit(train_step, static_argnames="options", donate_argnames="state")
    batch = jax.device_put(ACCUMULATED, parallelism.sharding(None, ("data", "expert")))
    state, metrics = step(state, batch, options=options)
    for array, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    moments = state.optimizer_state[1][0]
    expect_same({name: mu / (1 - optimizer.b1) for name, mu in moments.mu.items()}, one[0], "step")
    for name, expected in one[1].items():
        found = getattr(metrics, name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
        assert found.is_fully_replicated
    for tree in (state.params, moments.mu, moments.nu):
        parts = tree["layers.0.mlp.experts.down"].addressable_shards
        assert [part.data.shape for part in parts] == [(2, 8, 8)] * 4


def main() -> None:
    assert len(jax.devices()) == 4
    one = gradients(PARAMS, ROWS, options=OPTIONS)
    check_gradients(one)
    check_a_step(one)
    print("all good")


if __name__ == "__main__":
    main()
