"""Which backend computes what, where and why? Prints the dispatch; --run and --time try experts'.

    python -m experiments.backends
    python -m experiments.backends --platforms=ascend,cuda --tokens=1,64,65 --latent_size=1024
    python -m experiments.backends --tokens=1,32 --mesh=expert=2
    python -m experiments.backends --run=portable,pallas --layers=4
    python -m experiments.backends --run=portable,auto --layers=4
    python -m experiments.backends --time=portable,grouped,pallas --tokens=64,512,4096

With --mesh the tables say what each of its devices would run of its shard; nothing has to be there.
With --run a random model of the preset generates greedily with both backends from the same weights;
printed are what ran and whether the tokens agree, with float32 as the judge of those that do not. A
backend that is named is the experts' in the blocks; "auto" is what the tables choose, which for a
decode step on a GPU is the kernels of all layers.
It exits 1 if they differ by more than bfloat16's rounding. With --time each backend computes one
layer's experts for that many tokens.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import AbstractMesh
from rich.console import Console

from experiments.bench import dispatch_tables, mesh_flags, script
from experiments.bench.backend_trials import compare_backends, time_backends
from experiments.bench.environment import checked_out_commit
from experiments.bench.script import flag
from experiments.generate import DTYPES
from moe_jax.activations import ACTIVATIONS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import Parallelism
from moe_jax.platforms import resolve_platform
from moe_jax.presets import PRESETS
from moe_jax.sharding import MESH_AXES

_RUNS = collections.ChainMap({"auto": "what the tables choose"}, EXPERTS_BACKENDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes.", of=PRESETS)
    platforms: tuple[str, ...] = flag((), "For which to choose; empty: this one and ascend.")
    tokens: tuple[int, ...] = flag((1, 64, 512), "Tokens of a step.", least=1, needs="as 1,64")
    dtype: str = flag("bfloat16", "Of the model.", of=DTYPES)
    mesh: tuple[str, ...] = flag((), mesh_flags.MESH_HELP)
    activation: str | None = flag(None, "By default the preset's.", of=ACTIVATIONS)
    latent_size: int | None = flag(None, "L, for latent projections.", least=1)
    shared_size: int | None = flag(None, "Width of shared experts.", least=1)
    run: tuple[str, ...] = flag((), "Two backends to compare.", of=_RUNS)
    time: tuple[str, ...] = flag(
        (), "Backends whose prefill is timed, in place of the tables.", of=EXPERTS_BACKENDS
    )
    gradients: bool = flag(False, "With --time: of the gradients.")
    layers: int = flag(4, "With --run: how many of the preset's layers.", least=1)
    rows: int = flag(4, "With --run: rows of the batch.", least=1)
    new_tokens: int = flag(32, "With --run: tokens of each row.", least=1)
    seed: int = flag(0, "With --run and --time: of weights and inputs.", least=0)

    def __post_init__(self):
        if len(self.run) not in (0, 2):
            raise ValueError(f"--run is {','.join(self.run)}; expected two of {', '.join(_RUNS)}")
        if self.parallelism is not None:
            self.parallelism.check(self.config())

    @property
    def parallelism(self) -> Parallelism | None:
        """Of devices that need not be there; None for one device."""
        sizes = mesh_flags.sizes_of(self.mesh)
        shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
        return Parallelism(mesh=AbstractMesh(shape, MESH_AXES), fsdp=False) if sizes else None

    def config(self) -> Qwen3MoeConfig:
        """The preset's, with what the flags put in its place."""
        config = PRESETS[self.preset]
        return dataclasses.replace(
            config,
            hidden_act=self.activation or config.hidden_act,
            moe_latent_size=self.latent_size,
            moe_shared_expert_intermediate_size=self.shared_size,
        )


def main(settings: Settings) -> str | None:
    """Prints what was asked for; returns a line if tokens differ.

    Raises:
      ValueError, NotImplementedError: it cannot be done; the message says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)
    console = script.make_console(width=160)
    if settings.run:
        return _run(settings, console)
    if settings.time:
        _time(settings, console)
    else:
        _print_dispatch(settings, console)
    return None


def _print_dispatch(settings: Settings, console: Console) -> None:
    config = settings.config()
    names = settings.platforms or (resolve_platform(), "ascend")
    platforms = list(dict.fromkeys(map(resolve_platform, names)))
    mesh = settings.parallelism
    request = ExpertsRequest(
        platform=platforms[0],
        phase="decode",
        T=1,
        K=config.num_experts_per_tok,
        E=config.num_experts // (1 if mesh is None else mesh.size("expert")),
        width=config.moe_latent_size or config.hidden_size,
        I=config.moe_intermediate_size // (1 if mesh is None else mesh.size("tensor")),
        dtype=settings.dtype,
        activation=config.hidden_act,
        latent=config.moe_latent_size is not None,
        shared=config.moe_shared_expert_intermediate_size is not None,
    )
    device = jax.devices()[0].device_kind
    console.print(dispatch_tables.declared(), dispatch_tables.rules())
    console.print(
        dispatch_tables.chosen_for_layers(config, platforms, settings.tokens, settings.dtype, mesh)
    )
    console.print(
        dispatch_tables.chosen(request, config.hidden_size, platforms, settings.tokens, device)
    )


def _time(settings: Settings, console: Console) -> None:
    measured = time_backends(
        settings.config(),
        jnp.dtype(settings.dtype),
        settings.time,
        settings.tokens,
        settings.seed,
        gradients=settings.gradients,
    )
    console.print(dispatch_tables.timed(measured))
    what = "gradients" if settings.gradients else "prefill"
    console.print(f"{settings.preset}, {what}, {settings.dtype}, {_environment()}")


def _environment() -> str:
    commit = checked_out_commit() or "unknown"
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit[:12]}"


def _run(settings: Settings, console: Console) -> str | None:
    if "pallas_interpret" in settings.run:
        script.make_interpreter_safe()
    config = settings.config()
    layers = min(settings.layers, config.num_hidden_layers)
    config = dataclasses.replace(config, num_hidden_layers=layers)
    dtype = jnp.dtype(settings.dtype)
    model = Qwen3Moe(config, rngs=nnx.Rngs(settings.seed), dtype=dtype)
    draw = np.random.default_rng(settings.seed)
    prompts = draw.integers(config.vocab_size, size=(settings.rows, 16)).tolist()
    found = compare_backends(model, prompts, settings.run, settings.new_tokens)

    console.print(dispatch_tables.ran(found.record, jax.devices()[0].device_kind))
    console.print(
        f"{settings.preset}, {layers} layers, {settings.dtype}, {_environment()}:\n"
        f"{found.compared} of {settings.rows * settings.new_tokens} tokens compared, "
        f"{len(found.differences)} rows differ"
    )
    for d in found.differences:
        verdict = "a tie" if d.is_tie else "NOT A TIE"
        console.print(
            f"  row {d.row}, token {d.index}: {d.tokens[0]} and {d.tokens[1]}; float32 logits "
            f"{d.gap:.3g} apart, off by {d.error:.3g} in {settings.dtype}: {verdict}"
        )
    if found.holds:
        console.print("the tokens agree")
    return None if found.holds else "backends: the tokens DIFFER"


run = functools.partial(script.run, Settings, main, one_line=(ValueError, NotImplementedError))

if __name__ == "__main__":
    run()
