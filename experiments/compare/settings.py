"""What was asked for on the command line, checked: the flags' values and where results go."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp

from experiments.compare import candidates, routings
from pallas_kernels.decode_experts import LAYOUTS, MODES, ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of compare_layouts, converted."""

    preset: str
    tokens: tuple[int, ...]
    layouts: tuple[str, ...]
    routing: str
    baselines: tuple[str, ...]
    dtype: str
    repeats: int
    seed: int
    device_times: bool
    out: pathlib.Path
    commit: str

    @property
    def shapes(self) -> ExpertShapes:
        return SHAPES[self.preset]

    @property
    def out_dtype(self):
        return DTYPES[self.dtype]

    def result_path(self, device: str, preset: str, routing: str, suffix: str) -> pathlib.Path:
        """out/<device>_<preset>.jsonl; the name has dtype and routing if not bf16 and uniform."""
        parts = [device, preset]
        if self.dtype != "bf16":
            parts.append(self.dtype)
        if routing != "uniform":
            parts.append(routings.slug(routing))
        return self.out / ("_".join(parts) + suffix)


def parse(
    *,
    preset: str,
    tokens: Sequence[str],
    layouts: Sequence[str],
    routing: str,
    baselines: Sequence[str],
    dtype: str,
    repeats: int,
    seed: int,
    device_times: bool,
    out: str,
    commit: str,
) -> Settings:
    """Checks the flags' values.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    _expect("preset", preset, SHAPES)
    _expect("dtype", dtype, DTYPES)
    for name in layouts:
        _expect("layouts", name, (*LAYOUTS, *MODES))
    for name in baselines:
        _expect("baselines", name, candidates.BASELINES)
    if not layouts and not baselines:
        raise ValueError("--layouts and --baselines are both empty; expected at least one name")
    counts = []
    for text in tokens:
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(
                f"--tokens has {text!r}; expected whole numbers from 1 up, as in 1,2,4"
            )
        counts.append(int(text))
    if not counts:
        raise ValueError("--tokens is empty; expected whole numbers from 1 up, as in 1,2,4")
    for flag, value, least in (("repeats", repeats, 1), ("seed", seed, 0)):
        if not least <= value < 2**31:
            raise ValueError(f"--{flag} is {value}; expected {least} to {2**31 - 1}")
    if not out:
        raise ValueError("--out is empty; expected a folder")
    try:
        pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {out!r}; expected a folder to write to: {error}") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out is {out!r}; expected a folder to write to: it is read-only")
    # Draws one routing, so that a trace file that does not fit fails before anything is built.
    routings.make_routings(routing, SHAPES[preset], T=1, count=1, seed=seed)
    return Settings(
        preset=preset,
        tokens=tuple(sorted(set(counts))),
        layouts=tuple(dict.fromkeys(layouts)),
        routing=routing,
        baselines=tuple(dict.fromkeys(baselines)),
        dtype=dtype,
        repeats=repeats,
        seed=seed,
        device_times=device_times,
        out=pathlib.Path(out),
        commit=commit,
    )


def _expect(flag: str, value: str, accepted) -> None:
    if value not in accepted:
        raise ValueError(f"--{flag} has {value!r}; expected one of {', '.join(accepted)}")
