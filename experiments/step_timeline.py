"""Where does the time of a layer's decode step go, task by task?

    python -m experiments.step_timeline --preset=qwen3_30b_a3b --batch=1 --context=512
    python -m experiments.step_timeline --weights=fp8

Each thread block of the layer's grids writes the time as it begins, has waited for the last time,
and ends. The table has these times by kind of task, in microseconds after the grid's first block
began. Stamps cost a little: a layer takes 1 to 3% longer with them. A stamp says nothing about
other tasks' loads, which may be what a block waited for: compare two configs.

Weights, cache and residual are random. Three layers run one after the other, so that the weights of
the one that is shown come from memory. It needs a GPU, because the interpreter has no clock.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench import environment, script
from experiments.bench.script import flag
from moe_jax.config import Qwen3MoeConfig
from moe_jax.presets import PRESETS
from moe_jax.rope import rope_tables
from pallas_kernels.block_scaled_fp8 import quantise
from pallas_kernels.decode_experts.shapes import WEIGHT_FORMATS
from pallas_kernels.decode_step import LayerWeights, Residual, RowPositions, stamp_layers
from pallas_kernels.decode_step.api import LAUNCHES
from pallas_kernels.decode_step.grids import grids
from pallas_kernels.decode_step.layer import PRODUCTS, LayerShapes, default_config
from pallas_kernels.mosaic.stamps import BEGIN, CORE, END, WAITED

_LAYERS = 3
_SHOWN = 1
_LONGEST_US = 100_000  # a stamp beyond this was never written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes.", of=PRESETS)
    weights: str = flag("bf16", "Of its linear layers and experts.", of=WEIGHT_FORMATS)
    batch: int = flag(1, "Rows.", least=1, most=64)
    context: int = flag(512, "Tokens in each row's cache.", least=1)
    launches: str = flag("layer", "How a layer is cut into grids.", of=LAUNCHES)
    seed: int = flag(0, "Of all arrays.", least=0)


def main(settings: Settings) -> str | None:
    """Prints one table a grid."""
    if jax.default_backend() != "gpu":
        return "step_timeline needs a GPU: interpreted, a kernel has no clock"
    console = script.make_console(width=130)
    read = bytes_read(settings)
    for grid, kinds in measure(settings).items():
        title = f"{grid}, {settings.weights}, batch {settings.batch}, context {settings.context}"
        show(console, title, kinds, read)
    seen = environment.describe(seed=settings.seed, repeats=1, commit="", read_ceiling_tbps=None)
    console.print(f"{seen.device_kind}, jax {seen.jax}, commit {seen.commit}", highlight=False)
    return None


def measure(settings: Settings) -> dict[str, dict[str, np.ndarray]]:
    """For each grid and kind of task the [blocks, 4] stamps of the second of three layers."""
    config = PRESETS[settings.preset]
    layers = [
        draw_layer(config, settings.weights, settings.seed + index) for index in range(_LAYERS)
    ]
    shape = (
        settings.batch, config.num_key_value_heads, slots(settings.context), config.head_dim,
    )  # fmt: skip
    caches = [
        tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(key))
        for key in jax.random.split(jax.random.key(settings.seed + 100), _LAYERS)
    ]
    x = jax.random.normal(jax.random.key(settings.seed), (settings.batch, config.hidden_size))
    positions = draw_positions(config, settings.batch, settings.context)

    @jax.jit
    def run(layers, caches, x, positions):
        steps, stamps = stamp_layers(
            Residual.of(x.astype(jnp.bfloat16)),
            layers,
            caches,
            positions,
            K=config.num_experts_per_tok,
            eps=config.rms_norm_eps,
            launches=settings.launches,
        )
        return steps[-1].residual, stamps

    for _ in range(3):  # the first runs load the program
        _, stamps = jax.block_until_ready(run(layers, caches, x, positions))
    return jax.tree.map(np.asarray, stamps[_SHOWN])


def bytes_read(settings: Settings) -> dict[str, int]:
    """What each kind of task reads of weights and cache, at most: every expert but once."""
    config = PRESETS[settings.preset]
    shapes = LayerShapes(
        B=settings.batch,
        H=config.hidden_size,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        D=config.head_dim,
        C=slots(settings.context),
        E=config.num_experts,
        K=config.num_experts_per_tok,
        I=config.moe_intermediate_size,
        eps=config.rms_norm_eps,
        norm_topk_prob=config.norm_topk_prob,
        fp8=tuple(PRODUCTS) if settings.weights == "fp8" else (),
    )
    default = default_config(shapes.B, settings.weights == "fp8")
    lists = grids(shapes, default, settings.launches, 1).values()
    return {task.kind: task.work.bytes_read for tasks in lists for task in tasks}


def slots(context: int) -> int:
    """Of a cache's row that holds these tokens and a new one."""
    return -(-(context + 1) // 64) * 64


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_layer(config: Qwen3MoeConfig, weights: str, seed: int) -> LayerWeights:
    """Random weights of one layer, of the size that keeps activations near 1.

    Args:
      config: the model's.
      weights: of WEIGHT_FORMATS, of what is not a norm or the router.
      seed: of all.
    """
    H, D, E, I = (
        config.hidden_size, config.head_dim, config.num_experts, config.moe_intermediate_size,
    )  # fmt: skip
    heads, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape):
        scale = jnp.bfloat16(shape[-1] ** -0.5)
        return jax.random.normal(next(keys), shape, jnp.bfloat16) * scale

    def weight(*shape):
        return quantise(normal(*shape)) if weights == "fp8" else normal(*shape)

    return LayerWeights(
        input_layernorm=jnp.ones(H, jnp.bfloat16),
        q_proj=weight(heads, H),
        k_proj=weight(kv, H),
        v_proj=weight(kv, H),
        q_norm=jnp.ones(D, jnp.bfloat16),
        k_norm=jnp.ones(D, jnp.bfloat16),
        o_proj=weight(H, heads),
        post_attention_layernorm=jnp.ones(H, jnp.bfloat16),
        gate=normal(E, H),
        gate_up=weight(E, 2, I, H),
        down=weight(E, H, I),
    )


def draw_positions(config: Qwen3MoeConfig, B: int, context: int) -> RowPositions:
    """B rows with `context` tokens each, all valid."""
    at = jnp.full((B, 1), context, jnp.int32)
    cos, sin = rope_tables(
        config.rope, config.head_dim, config.max_position_embeddings, at, jnp.float32
    )
    return RowPositions(cos[:, 0], sin[:, 0], at[:, 0], jnp.ones(B, jnp.int32))


def show(console: Console, title: str, kinds: dict[str, np.ndarray], read: dict[str, int]) -> None:
    """Prints a grid's table: least and most of each time, and the median of two of them."""
    table = Table(
        "task", "blocks", "cores", "MB at most", "begin", "waited: first", "median", "last",
        "end: first", "median", "last", title=f"{title}: us",
    )  # fmt: skip
    for kind, *cells in rows(kinds):
        blocks, cores, *times = cells
        table.add_row(kind, blocks, cores, f"{read[kind] / 1e6:.1f}", *times)
    console.print(table)


def rows(kinds: dict[str, np.ndarray]) -> list[list[str]]:
    """A table's cells, by the end of the last block; a task that never waits has none for that."""
    stamps = {kind: array.astype(np.int64) for kind, array in kinds.items()}
    start = min(int(array[:, BEGIN].min()) for array in stamps.values())
    cells = []
    # JAX gives dicts back in the order of their keys, which says nothing.
    for kind, array in sorted(stamps.items(), key=lambda item: item[1][:, END].max()):
        begin, waited, end = ((array[:, place] - start) / 1e3 for place in (BEGIN, WAITED, END))
        cores = len(np.unique(array[:, CORE]))
        has_waited = np.all(np.abs(waited) < _LONGEST_US)
        times = [begin.min(), *(_spread(waited) if has_waited else [None] * 3), *_spread(end)]
        shown = ["" if time is None else f"{time:.1f}" for time in times]
        cells.append([kind, str(len(array)), str(cores), *shown])
    return cells


def _spread(times: np.ndarray) -> list[float]:
    return [float(times.min()), float(np.median(times)), float(times.max())]


run = functools.partial(script.run, Settings, main)

if __name__ == "__main__":
    run()
