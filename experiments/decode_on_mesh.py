"""How fast is a decode step on several devices, and does it compute what one device computes?

    python -m experiments.decode_on_mesh --mesh=one --mesh=expert=2 --mesh=tensor=2
    python -m experiments.decode_on_mesh --mesh=expert=2 --batches=1,32 --add
    python -m experiments.decode_on_mesh --preset=tiny --mesh=one --batches=2 --context=17

expert=n splits the experts among n devices, tensor=n every expert's neurons and the heads, and
expert=n,tensor=m both. tensor=n,whole_heads splits the neurons alone. For each mesh and batch:
milliseconds a step in a chain that never waits for the host (experiments/bench/decode_chain.py), of
the same random weights, caches and tokens.

At --check_batch rows the last step's logits are compared with one device's. Rounding sends some
tokens to other experts, so the yardstick is how far two ways of one device are apart: its kernels
and its blocks. More than twice that is reported, and the script exits 1.

Writes a JSONL, row by row; a mesh or batch that fails is reported, and the others go on.
"""

import dataclasses
import functools
import gc
import pathlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from experiments.bench import environment, mesh_flags, mesh_records, records, script, timing
from experiments.bench.decode_chain import DecodeChain
from experiments.bench.mesh_records import ONE, MeshRow
from experiments.bench.script import flag
from moe_jax.config import Qwen3MoeConfig
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.presets import PRESETS

_LONGEST_ERROR = 400

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes; the weights are random.", of=PRESETS)
    layers: int = flag(0, "Only the model's first ones; 0 for all.", least=0)
    mesh: tuple[str, ...] = flag(
        (),
        "one, or axes and sizes as in expert=2,tensor=2, with whole_heads where attention is not "
        "to be split; may be given several times. By default one, and all devices along expert, "
        "along tensor, and along tensor with whole heads.",
        repeated=True,
    )
    batches: tuple[int, ...] = flag(
        (1, 8, 32, 64), "Rows in the batch.", least=1, needs="as in 1,8"
    )
    context: int = flag(512, "Tokens in each row's cache.", least=1)
    check_batch: int = flag(8, "Of --batches, where outputs are compared; 0 for none.", least=0)
    steps: int = flag(16, "Of a chain, which are issued at once.", least=1)
    repeats: int = flag(7, "Samples of each time, at most; the median counts.", least=1)
    seed: int = flag(0, "Of weights, caches and tokens.", least=0)
    compile_threads: int = flag(
        1, "A mesh's chains compiled at once; with more than 1 no compile time is taken.", least=1
    )
    budget_s: float = flag(190, "After which no further mesh and batch begins.", least=0)
    add: bool = flag(False, "Keep the rows of --out's record that this run does not measure.")
    out: pathlib.Path = flag(
        pathlib.Path("out/decode_on_mesh"), "The folder for the JSONL.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        for name in self.mesh:
            if name != ONE:
                mesh_flags.sizes_of([p for p in name.split(",") if p != mesh_flags.WHOLE_HEADS])
        most = PRESETS[self.preset].num_hidden_layers
        if self.layers > most:
            raise ValueError(f"--layers is {self.layers}; expected 0 to {most}")
        script.writable_folder("out", self.out)

    @property
    def config(self) -> Qwen3MoeConfig:
        """The preset's, with as many layers as asked for."""
        config = PRESETS[self.preset]
        return dataclasses.replace(
            config, num_hidden_layers=self.layers or config.num_hidden_layers
        )


def main(settings: Settings) -> str | None:
    """Measures every mesh; returns what failed."""
    logging.set_verbosity(logging.WARNING)
    console = script.make_console(width=190)
    begun, count = time.perf_counter(), len(jax.devices())
    names = settings.mesh or (
        ONE, f"expert={count}", f"tensor={count}", f"tensor={count},{mesh_flags.WHOLE_HEADS}"
    )  # fmt: skip
    run = environment.describe(
        seed=settings.seed, repeats=settings.repeats, commit=settings.commit, read_ceiling_tbps=None
    )
    path = settings.out / f"{run.device}_{settings.preset}.jsonl"
    before = records.begin_record(path, settings.preset, mesh_records.KINDS, add=settings.add)
    rows: list[MeshRow] = []

    def late() -> str | None:
        if time.perf_counter() - begun > settings.budget_s:
            return f"not begun within --budget_s={settings.budget_s:g}"
        return None

    with script.progress(console) as bar:
        bar.say(f"{count} x {run.device_kind}: {', '.join(names)}")
        model = Qwen3Moe(settings.config, rngs=nnx.Rngs(settings.seed), dtype=jnp.bfloat16)
        trials = _Trials(settings, jax.block_until_ready(to_arrays(model)))
        del model
        bar.say(f"the model is there after {time.perf_counter() - begun:.1f} s")
        bar.start("decode steps", len(names) * len(settings.batches))
        for name in names:
            problem = late() or trials.take(name)
            for B in settings.batches:
                row = MeshRow(
                    run=run,
                    mesh=name,
                    batch=B,
                    context=settings.context,
                    steps=settings.steps,
                    devices=trials.devices,
                )
                rows.append(row)
                bar.advance(f"{name}, batch {B}")
                row.error = problem or late()
                if row.error is None:
                    trials.measure(row)
                bar.say(f"{name}, batch {B}: {row.said}")
                records.write_record(path, before.updated(rows))
                gc.collect()  # an error's frames hold arrays of the device
    console.print(mesh_records.table_of(before.updated(rows).rows))
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return "\n".join(mesh_records.problems(rows)) or None


class _Found:
    """What a chain's last run computed, on the host."""

    def __init__(self, chain: DecodeChain):
        self.tokens = chain.chosen()  # fails if there are NaN
        self.logits, self.expert_ids = chain.logits(), chain.expert_ids()


class _Trials:
    """One model on one mesh after the other."""

    def __init__(self, settings: Settings, whole: Arrays):
        """Whole is the parameters on one device."""
        self._settings, self._whole = settings, whole
        self._arrays, self._parallelism = whole, None
        self._one: tuple[_Found, float] | None = None
        self._made: dict[int, Future] = {}

    @property
    def devices(self) -> int:
        return 1 if self._parallelism is None else self._parallelism.mesh.size

    def take(self, name: str) -> str | None:
        """Puts the parameters where a mesh has them; returns what is wrong, or None.

        With several threads it makes the chains of all batches, too.
        """
        self._arrays, self._parallelism, self._made = self._whole, None, {}
        if name != ONE:
            try:
                parallelism = mesh_flags.parallelism_of(name.split(","), fsdp=False)
                parallelism.check(self._settings.config)
                self._arrays = jax.block_until_ready(parallelism.place(self._whole))
                self._parallelism = parallelism
            except Exception as error:
                return _said(error)
        if self._settings.compile_threads > 1:
            with ThreadPoolExecutor(self._settings.compile_threads) as pool:
                self._made = {B: pool.submit(self._timed_chain, B) for B in self._settings.batches}
        return None

    def _timed_chain(self, B: int) -> DecodeChain:
        return self._chain(
            B, self._arrays, self._parallelism, keep_logits=self._settings.check_batch == B
        )

    def measure(self, row: MeshRow) -> None:
        """Fills in the row, its error too."""
        try:
            checked, made = row.batch == self._settings.check_batch, self._made.pop(row.batch, None)
            chain = made.result() if made else self._timed_chain(row.batch)
            row.compile_s = None if made else chain.compile_s
            row.program_bytes, row.backends = chain.program_bytes, chain.backends
            del made
            taken = timing.measure_step(chain, self._settings.repeats)
            row.ms, row.ms_spread = taken.us / 1e3, taken.spread_us / 1e3
            row.host_bound = taken.host_bound
            if not checked:
                chain.chosen()  # fails if there are NaN
                return
            found = _Found(chain)
            del chain
            self._one = self._one or self._on_one_device(row.batch)
            one, row.blocks_error = self._one
            row.logits_error = median_error(found.logits, one.logits)
            row.same_experts = float(np.mean(found.expert_ids == one.expert_ids))
            row.same_tokens = float(np.mean(found.tokens == one.tokens))
        except Exception as error:
            row.error = _said(error)

    def _on_one_device(self, B: int) -> tuple[_Found, float]:
        """What the tables choose computes there, and how far the blocks are from that."""
        # A backend that is named for attention is one of the blocks'.
        ways = []
        for attention_backend in ("auto", "xla"):
            chain = self._chain(
                B, self._whole, keep_logits=True, attention_backend=attention_backend
            )
            chain.enqueue()
            ways.append(_Found(chain))
            del chain
        return ways[0], median_error(ways[1].logits, ways[0].logits)

    def _chain(
        self, B: int, arrays: Arrays, parallelism: Parallelism | None = None, **options
    ) -> DecodeChain:
        settings = self._settings
        return DecodeChain(
            from_arrays(settings.config, arrays),
            B=B,
            context=settings.context,
            steps=settings.steps,
            seed=settings.seed,
            parallelism=parallelism,
            **options,
        )


def median_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The median over rows [B, V] of ||found - expected|| / ||expected||."""
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.median(off))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


run = functools.partial(script.run, Settings, main, one_line=(ValueError, OSError))

if __name__ == "__main__":
    run()
