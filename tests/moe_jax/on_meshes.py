"""What test_meshes.py checks, in a process of its own that has four CPU devices.

    python -m tests.moe_jax.on_meshes gradients step generation

with XLA_FLAGS=--xla_force_host_platform_device_count=4 and JAX_PLATFORMS=cpu. On GPUs it runs with
as many as there are, and leaves out what needs more.
"""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AxisType

import tests.quick_process  # noqa: F401  before JAX makes its devices
from moe_jax.cache import init_cache
from moe_jax.generation import decode, generate
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays
from moe_jax.quantization import fp8_config
from moe_jax.sharding import make_mesh
from moe_jax.traces import RoutingTrace
from moe_jax.training import (
    OptimizerOptions,
    TrainOptions,
    gradients_of,
    init_state,
    train_step,
)
from tests.moe_jax import test_decode_step
from tests.moe_jax.scaled_weights import in_format_of
from tests.moe_jax.tiny import TINY, random_arrays
from tests.moe_jax.training import test_train_step
from tests.pallas_kernels.machine import ON_GPU

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

BOUND = 1e-4 if ON_GPU else 3e-6  # a GPU adds each product in its own order

gradients = jax.jit(gradients_of, static_argnames="options")


def there(**sizes) -> bool:
    """Whether there are devices for a mesh; says what is left out."""
    enough = math.prod(sizes.values()) <= len(jax.devices())
    if not enough:
        print(f"left out, for want of devices: {sizes}")
    return enough


def on_mesh(exchange="auto", mesh=None, **sizes) -> TrainOptions:
    mesh = make_mesh(**sizes) if mesh is None else mesh
    return dataclasses.replace(OPTIONS, parallelism=Parallelism(mesh=mesh, exchange=exchange))


def expect_same(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        a, b = np.asarray(found[name], np.float64), np.asarray(value, np.float64)
        assert np.linalg.norm(a - b) <= BOUND * np.linalg.norm(b), f"{what}: {name}"


def run(options: TrainOptions) -> tuple[dict, dict]:
    parallelism = options.parallelism
    batch = jax.device_put(ROWS, parallelism.sharding(None, ("data", "expert")))
    return gradients(parallelism.place(PARAMS), batch, options=options)


@functools.cache
def on_one() -> tuple[dict, dict]:
    return gradients(PARAMS, ROWS, options=OPTIONS)


def check_gradients() -> None:
    """Loss, balance loss and every gradient are those of one device."""
    explicit = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    assert explicit.axis_types == (AxisType.Explicit,)
    sizes = ({"data": 2}, {"tensor": 2}, {"expert": 4}, {"data": 2, "tensor": 2})
    expect_one_device_s([
        on_mesh(), on_mesh(mesh=explicit), *(on_mesh(**each) for each in sizes if there(**each))
    ])  # fmt: skip


def check_exchanges() -> None:
    """The same by the other ways for tokens to get to other shards, with and without remat."""
    gather = on_mesh(expert=2, exchange="gather")
    expect_one_device_s([
        gather, dataclasses.replace(gather, remat=True), on_mesh(expert=2, exchange="padded")
    ])  # fmt: skip


def expect_one_device_s(meshes: list[TrainOptions]) -> None:
    one = on_one()
    for options in meshes:
        what = f"{dict(options.parallelism.mesh.shape)}, {options.parallelism.exchange}"
        found, metrics = run(options)
        expect_same(found, one[0], what)
        expect_same(metrics, one[1], what)


def check_replays() -> None:
    """A batch's own experts go to the devices that have its rows."""
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(CONFIG.num_experts), (40, 1)), axis=1)
    replay = RoutingTrace(expert_ids=jnp.asarray(ids[None, None, :, : CONFIG.num_experts_per_tok]))
    batch = dataclasses.replace(ROWS, replay=replay)
    one = gradients(PARAMS, batch, options=OPTIONS)
    options = on_mesh(expert=2)
    found = gradients(options.parallelism.place(PARAMS), batch, options=options)
    for on_two, on_one in zip(found, one, strict=True):
        expect_same(on_two, on_one, "replay")


def check_a_step() -> None:
    """A step over two micro-batches, one of them padding: the losses are the global batch's.

    The state stays where it lies, a part on each device, and its first moments are the gradients.
    """
    if not there(data=2, expert=2):
        return
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
    one = on_one()
    expect_same({name: mu / (1 - optimizer.b1) for name, mu in moments.mu.items()}, one[0], "step")
    for name, expected in one[1].items():
        found = getattr(metrics, name)
        np.testing.assert_allclose(found, expected, rtol=max(BOUND, 1e-5), err_msg=name)
        assert found.is_fully_replicated
    for tree in (state.params, moments.mu, moments.nu):
        parts = tree["layers.0.mlp.experts.down"].addressable_shards
        assert [part.data.shape for part in parts] == [(2, 8, 8)] * 4


# What each device has of everything beside attention and experts is covered here, too.
GENERATES = dataclasses.replace(
    TINY,
    mlp_only_layers=(0,),
    attention_bias=True,
    moe_latent_size=16,
    moe_shared_expert_intermediate_size=24,
)


def check_generation(*meshes: dict) -> None:
    """Token for token what one device generates, and no step is compiled twice."""
    params = random_arrays(GENERATES)

    def tokens(arrays) -> list:
        model = from_arrays(GENERATES, arrays)
        return generate(model, [[5, 1, 7], [2]], max_new_tokens=6).tokens

    expected = tokens(params)
    for sizes in meshes:
        if not there(**sizes):
            continue
        whole_heads = sizes == {"tensor": 4}
        placing = Parallelism(mesh=make_mesh(**sizes), split_heads=not whole_heads)
        arrays = placing.place(params)
        before = decode.decode._cache_size()
        assert tokens(arrays) == expected, sizes
        assert decode.decode._cache_size() == before + 1, sizes


def check_kernels() -> None:
    """A decode step by the kernels, heads and experts split, is within rounding of one device's.

    Of two layers, the second of which has a sum to add. Their routers are sure of themselves, so
    that rounding sends no token to another expert.
    """
    # The interpreter asks whether any device still has barriers, when one of them is done.
    gpu_callbacks.call_assert_no_barriers_allocated = lambda token: token
    config = dataclasses.replace(
        test_decode_step.CONFIG, num_key_value_heads=2, moe_intermediate_size=128
    )
    params = {
        name: 32 * array if name.endswith(".mlp.gate.weight") else array
        for name, array in random_arrays(config, "bfloat16").items()
    }
    draw = np.random.default_rng(1).normal
    cache = jax.tree.map(
        lambda held: jnp.asarray(draw(size=held.shape), held.dtype), init_cache(config, 2, 64)
    )
    cache = dataclasses.replace(cache, lengths=jnp.array([5, 63], jnp.int32))

    @functools.partial(jax.jit, static_argnames=("parallelism", "options"))
    def step(arrays, cache, parallelism, options):
        model = from_arrays(config, arrays)
        ids = jnp.array([[1], [2]])
        return model(ids, cache=cache, parallelism=parallelism, **dict(options))

    def run(parallelism=None, **options):
        arrays = params if parallelism is None else parallelism.place(params)
        out = step(arrays, cache, parallelism, tuple(options.items()))
        return [np.asarray(out.logits, np.float32), *map(np.float32, out.cache.keys)]

    kernels = test_decode_step.KERNELS
    ways = [{"layers_backend": kernels}, {"experts_backend": kernels}]
    meshes = [{"expert": 2}, {"tensor": 2}, {"expert": 2, "tensor": 2}]
    meshes = [(sizes, True) for sizes in meshes] + [({"tensor": 2}, False)]
    for options in ways:
        expected = run(**options)
        for sizes, split_heads in [(sizes, split) for sizes, split in meshes if there(**sizes)]:
            parallelism = Parallelism(mesh=make_mesh(**sizes), split_heads=split_heads)
            for found, wanted in zip(run(parallelism, **options), expected, strict=True):
                error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                assert error < 2e-2, (sizes, options, error)  # each is within half of float32


def check_fp8() -> None:
    """Values and scales are split alike; in whole blocks, and along experts in any."""
    whole = {"num_hidden_layers": 1, "hidden_size": 128, "moe_intermediate_size": 256}
    whole |= {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    for sizes, config in (
        ({"tensor": 2}, dataclasses.replace(TINY, **whole, quantization_config=fp8_config((0,)))),
        ({"expert": 2}, dataclasses.replace(TINY, quantization_config=fp8_config((0, 1)))),
    ):
        if not there(**sizes):
            continue
        parallelism = Parallelism(mesh=make_mesh(**sizes), fsdp=False)
        plain = dataclasses.replace(config, quantization_config=None)
        params = in_format_of(config, random_arrays(plain))

        @functools.partial(jax.jit, static_argnames=("config", "parallelism"))
        def logits(arrays, config, parallelism=None):
            model = from_arrays(config, arrays)
            return model(jnp.array([[1, 2, 3]]), parallelism=parallelism).logits

        found = logits(parallelism.place(params), config, parallelism)
        np.testing.assert_allclose(found, logits(params, config), rtol=1e-4, atol=1e-4)


CHECKS = {
    "gradients": check_gradients,
    "step": check_a_step,
    "generation": lambda: check_generation({"expert": 2, "tensor": 2}),
    "generation on other meshes": lambda: check_generation(
        {"expert": 2}, {"expert": 4}, {"tensor": 2}, {"data": 2, "expert": 2}, {"tensor": 4}
    ),
    "exchanges": check_exchanges,
    "replays": check_replays,
    "fp8": check_fp8,
    "kernels": check_kernels,
}


def main(names: list[str]) -> None:
    assert ON_GPU or len(jax.devices()) == 4
    for name in names:
        CHECKS[name]()
        print(f"{name}: right")
    print("all good")


if __name__ == "__main__":
    main(sys.argv[1:])
