"""How fast is a training step, on one device or on a mesh, and what part of the peak is that?

    python -m experiments.train_speed --layers=4 --routing=model,balanced --profile
    python -m experiments.train_speed --layers=8 --mesh=one --mesh=data=2 --mesh=expert=2
    python -m experiments.train_speed --layers=16 --mesh=data=2 --batch=8 --remat
    python -m experiments.train_speed --preset=tiny --mesh=one --batch=2 --context=32

For each mesh and routing: the first layers of a preset with random weights take steps on random
tokens, as experiments.train does, and the seconds of a step are the median over --steps.

--routing=model leaves the choice of experts to the routers. Those of a new model are far from even
in deep layers. balanced and the others of experiments.bench.routings are drawn before and come with
the batch, each layer's own. Then the routers' logits, weights and losses are computed as ever, with
their gradients; only their top-k is not. The imbalance printed is that of the last step.

Model FLOPs are 6 for each parameter that a token uses, the embedding's look-up excepted, and
12 * heads * D for each key that a query sees. MFU is their part of --peak_tflops of all devices:
recomputed products count for nothing.

Writes a JSONL, row by row; a row that fails is reported, and the others go on.
"""

import dataclasses
import functools
import gc
import itertools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from experiments.bench import (
    environment,
    kernel_profile,
    mesh_flags,
    routings,
    script,
    speed_records,
)
from experiments.bench.mesh_records import ONE
from experiments.bench.records import Record, begin_record, write_record
from experiments.bench.script import flag
from experiments.bench.speed_records import TrainSpeedRow
from moe_jax.config import Qwen3MoeConfig
from moe_jax.dispatch import record_choices
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import EXCHANGES, Parallelism
from moe_jax.parameters import active_parameter_count, parameter_count, to_arrays
from moe_jax.presets import PRESETS
from moe_jax.traces import RoutingTrace
from moe_jax.training import PackedDocuments, TrainOptions, init_state, train_step
from pallas_kernels.decode_experts import ExpertShapes

_OWN_ROUTING = "model"
_LONGEST_ERROR = 600
_SHOWN_KERNELS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes; the weights are random.", of=PRESETS)
    layers: int = flag(4, "The model's first ones.", least=1)
    mesh: tuple[str, ...] = flag(
        (ONE,), "one, or axes and sizes as in data=2,expert=2; may be given several times.",
        repeated=True,
    )  # fmt: skip
    routing: tuple[str, ...] = flag(
        (_OWN_ROUTING,), f"Who chooses experts, a row each: {_OWN_ROUTING}, {routings.ACCEPTED}."
    )
    batch: int = flag(4, "Rows of a micro-batch, of all devices.", least=1)
    accumulate: int = flag(1, "Micro-batches of a step.", least=1)
    context: int = flag(2048, "Tokens of a row.", least=2)
    remat: bool = flag(False, "Whether the backward pass computes each layer anew.")
    logit_columns: int | None = flag(
        256, "Positions of a row whose logits are in memory at once; empty for all.", least=1
    )
    experts_backend: str = flag("auto", "What computes experts.", of=("auto", *EXPERTS_BACKENDS))
    expert_exchange: str = flag("auto", "How tokens get to other shards.", of=EXCHANGES)
    steps: int = flag(5, "That are timed, after two that are not.", least=1)
    profile: bool = flag(False, "Take each row's kernels too, of one step more.")
    peak_tflops: float = flag(989.0, "Of one device, for bfloat16 products.", least=1e-3)
    budget_s: float = flag(190, "After which no further row begins.", least=0)
    seed: int = flag(0, "Of weights and tokens.", least=0)
    out: pathlib.Path = flag(
        pathlib.Path("out/train_speed"), "The folder for the JSONL.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        for name in self.mesh:
            if name != ONE:
                mesh_flags.sizes_of(name.split(","))
        most = PRESETS[self.preset].num_hidden_layers
        if self.layers > most:
            raise ValueError(f"--layers is {self.layers}; expected 1 to {most}")
        for routing in self.routing:  # so that a trace that does not fit fails before the work
            if routing != _OWN_ROUTING:
                routings.make_routings(routing, self.shapes, T=1, count=1, seed=self.seed)
        script.writable_folder("out", self.out)

    @property
    def config(self) -> Qwen3MoeConfig:
        """The preset's, with as many layers as asked for."""
        return dataclasses.replace(PRESETS[self.preset], num_hidden_layers=self.layers)

    @property
    def shapes(self) -> ExpertShapes:
        """An MoE layer's."""
        config = self.config
        return ExpertShapes(
            E=config.num_experts,
            K=config.num_experts_per_tok,
            H=config.hidden_size,
            I=config.moe_intermediate_size,
        )


def main(settings: Settings) -> str | None:
    """Measures every mesh and routing; returns what failed."""
    logging.set_verbosity(logging.WARNING)
    console, begun = script.make_console(width=160), time.perf_counter()
    run = environment.describe(
        seed=settings.seed, repeats=settings.steps, commit=settings.commit, read_ceiling_tbps=None
    )
    path = settings.out / f"{run.device}_{settings.preset}.jsonl"
    begin_record(path, settings.preset, speed_records.KINDS)
    config, rows = settings.config, []
    with script.progress(console) as bar:
        pairs = list(itertools.product(settings.mesh, settings.routing))
        bar.start("training steps", len(pairs))
        for name, routing in pairs:
            row = TrainSpeedRow(
                run=run,
                mesh=name,
                routing=routings.short_name(routing),
                layers=settings.layers,
                batch=settings.batch,
                accumulate=settings.accumulate,
                context=settings.context,
                parameters=parameter_count(config),
                active_parameters=active_parameter_count(config),
            )
            rows.append(row)
            bar.advance(f"{name}, {row.routing}")
            longest: list[str] = []
            if time.perf_counter() - begun > settings.budget_s:
                row.error = f"not begun within --budget_s={settings.budget_s:g}"
            else:
                try:
                    longest = _measure(settings, row, routing)
                except Exception as error:
                    row.error = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
            gc.collect()  # an error's frames hold arrays of the device
            bar.say("\n".join([row.said, *row.kernel_lines, *longest]))
            write_record(path, Record(preset=settings.preset, rows=rows))
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    failed = [f"{row.mesh}, {row.routing} failed: {row.error}" for row in rows if row.error]
    return "\n".join(failed) or None


def _measure(settings: Settings, row: TrainSpeedRow, routing: str) -> list[str]:
    """Fills in the row; returns lines about its longest kernels, where they are asked for."""
    config, parallelism = settings.config, None
    if row.mesh != ONE:
        parts = row.mesh.split(",")
        parallelism = mesh_flags.parallelism_of(parts, exchange=settings.expert_exchange)
        parallelism.check(config)
        row.devices = parallelism.mesh.size
    options = TrainOptions(
        config=config,
        remat=settings.remat,
        logit_columns=settings.logit_columns,
        experts_backend=settings.experts_backend,
        parallelism=parallelism,
    )
    state = _first_state(settings, options, parallelism)
    rows = settings.accumulate * settings.batch
    tokens = np.random.default_rng(settings.seed).integers(
        config.vocab_size, size=(rows, settings.context)
    )
    packed = PackedDocuments(tokens.tolist(), settings.context, seed=settings.seed)
    batch = packed.batch_on_mesh(
        0, A=settings.accumulate, B=settings.batch, parallelism=parallelism
    )
    if routing != _OWN_ROUTING:
        replay = _draw_replay(settings, routing, parallelism)
        batch = dataclasses.replace(batch, replay=replay)
    jitted = jax.jit(train_step, static_argnames="options", donate_argnames="state")
    begun = time.perf_counter()
    with record_choices() as choices:
        lowered = jitted.lower(state, batch, options=options)
    row.backends = {request.op: choice.backend for request, choice in choices}
    compiled = lowered.compile()
    row.compile_s = time.perf_counter() - begun
    taken = []
    for number in range(2 + settings.steps):
        begun = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics.loss)
        if number >= 2:
            taken.append(time.perf_counter() - begun)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; expected a finite number")
    row.loss, row.imbalance = loss, np.asarray(metrics.imbalance).tolist()
    row.step_s = statistics.median(taken)
    row.tokens_per_s = rows * settings.context / row.step_s
    flops = model_flops_per_token(config, settings.context)
    row.model_tflops = flops * row.tokens_per_s / 1e12
    row.mfu = row.model_tflops / (settings.peak_tflops * row.devices)
    stats = jax.local_devices()[0].memory_stats()
    row.peak_bytes = stats and stats.get("peak_bytes_in_use")
    if not settings.profile:
        return []

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    try:
        kernels = kernel_profile.profile_kernels(step)
    except Exception as error:  # the row's time stands
        row.profile_error = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        return []
    profile = kernel_profile.Profile(
        kernels, compiled.as_text(), kernel_profile.TRAIN_STEP, row.devices
    )
    row.kernels = profile.record()
    return profile.kernel_lines(_SHOWN_KERNELS)


def _draw_replay(settings: Settings, routing: str, parallelism: Parallelism | None) -> RoutingTrace:
    """Experts of every layer and micro-batch, without weights, which are the routers'."""
    A, layers = settings.accumulate, len(settings.config.moe_layers)
    T = settings.batch * settings.context
    drawn = routings.make_routings(routing, settings.shapes, T, A * layers, settings.seed)
    ids = np.stack([each.expert_ids for each in drawn]).reshape(A, layers, T, -1)
    if parallelism is not None:
        rows = parallelism.rows("training", settings.batch)
        ids = jax.device_put(ids, parallelism.sharding(None, None, rows))
    return RoutingTrace(expert_ids=ids)


def _first_state(settings: Settings, options: TrainOptions, parallelism: Parallelism | None):
    place = None if parallelism is None else parallelism.place
    model = Qwen3Moe(options.config, rngs=nnx.Rngs(settings.seed), dtype=jnp.float32, place=place)
    return init_state(to_arrays(model), options.optimizer, parallelism=parallelism)


def model_flops_per_token(config: Qwen3MoeConfig, context: int) -> float:
    """Of a forward and a backward pass: 6 a parameter in use, and attention's two products.

    Attention's are 4 * heads * D for each query and key, three times; a query sees half of its row.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    products = 6 * (active_parameter_count(config) - embedding)
    heads = config.num_attention_heads * config.head_dim
    return products + config.num_hidden_layers * 12 * heads * (context + 1) / 2


run = functools.partial(script.run, Settings, main, one_line=(ValueError, OSError))

if __name__ == "__main__":
    run()
