"""What was asked for on the command line, checked."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from experiments.compare import routings
from experiments.tuning.work import Layer, layers_of
from pallas_kernels.decode_experts import LAYOUTS, tuned_tables
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.tuned_tables import BUCKETS

INTERPRETED_PRESET = "tiny"
_INTERPRETED_TOKENS = 8  # the interpreter takes long for more
DEFAULT_RECORDS = "out/tune"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of tune, converted.

    Attributes:
      layers: what to tune, the most useful first.
      most_configs: of each layout; None for all of its candidates.
      budget_s: seconds of wall time from the start; None for no limit.
      out: the folder of the table.
      records: the folder of the lines about every measurement.
    """

    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    layouts: tuple[str, ...]
    most_configs: int | None
    routing: str
    rounds: int
    repeats: int
    seed: int
    budget_s: float | None
    compile_threads: int
    again: bool
    interpret: bool
    out: pathlib.Path
    records: pathlib.Path
    commit: str


def parse(
    *,
    preset: Sequence[str],
    tokens: Sequence[str],
    layouts: Sequence[str],
    expert_shards: Sequence[str],
    tensor_shards: Sequence[str],
    most_configs: int,
    routing: str,
    rounds: int,
    repeats: int,
    seed: int,
    budget_s: float,
    compile_threads: int,
    again: bool,
    interpret: bool,
    out: str,
    records: str,
    commit: str,
) -> Settings:
    """Checks the flags' values; most_configs and budget_s are None where they are 0.

    With interpret only the tiny preset and few tokens are left.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    for flag, names, accepted in (("preset", preset, SHAPES), ("layouts", layouts, LAYOUTS)):
        if not names:
            raise ValueError(f"--{flag} is empty; expected some of {', '.join(accepted)}")
        for name in names:
            if name not in accepted:
                raise ValueError(f"--{flag} has {name!r}; expected one of {', '.join(accepted)}")
    counts = _numbers("tokens", tokens, BUCKETS, "the table's buckets")
    if not counts:
        raise ValueError(f"--tokens is empty; expected some of {', '.join(map(str, BUCKETS))}")
    for flag, value, least in (
        ("most_configs", most_configs, 0),
        ("rounds", rounds, 1),
        ("repeats", repeats, 1),
        ("seed", seed, 0),
        ("budget_s", budget_s, 0),
        ("compile_threads", compile_threads, 1),
    ):
        if not least <= value < 2**31:
            raise ValueError(f"--{flag} is {value}; expected {least} to {2**31 - 1}")
    presets = tuple(dict.fromkeys(preset))
    if interpret:
        presets = (INTERPRETED_PRESET,)
        counts = [T for T in counts if T <= _INTERPRETED_TOKENS] or [1]
    for name in presets:  # so that a trace file that does not fit fails before anything is built
        routings.make_routings(routing, SHAPES[name], T=1, count=1, seed=seed)
    shards = range(2, 1 + max(SHAPES[name].E for name in presets))
    return Settings(
        layers=tuple(
            layers_of(
                presets,
                tuple(_numbers("expert_shards", expert_shards, shards, "whole numbers from 2 up")),
                tuple(_numbers("tensor_shards", tensor_shards, shards, "whole numbers from 2 up")),
            )
        ),
        tokens=tuple(counts),
        layouts=tuple(dict.fromkeys(layouts)),
        most_configs=most_configs or None,
        routing=routing,
        rounds=rounds,
        repeats=repeats,
        seed=seed,
        budget_s=budget_s or None,
        compile_threads=compile_threads,
        again=again,
        interpret=interpret,
        out=_folder("out", out or _default_out(interpret), interpret),
        records=_folder("records", records, interpret),
        commit=commit,
    )


def _default_out(interpret: bool) -> str:
    return DEFAULT_RECORDS if interpret else str(tuned_tables.FOLDER)


def _numbers(flag: str, texts: Sequence[str], accepted, words: str) -> list[int]:
    numbers = []
    for text in texts:
        if not text.strip().isdecimal() or int(text) not in accepted:
            some = ", ".join(map(str, accepted[:8]))
            raise ValueError(f"--{flag} has {text!r}; expected {words}: {some} ...")
        numbers.append(int(text))
    return list(dict.fromkeys(numbers))


def _folder(flag: str, name: str, interpret: bool) -> pathlib.Path:
    folder = pathlib.Path(name)
    if not name:
        raise ValueError(f"--{flag} is empty; expected a folder")
    if interpret and folder.resolve().is_relative_to(tuned_tables.FOLDER.resolve()):
        raise ValueError(
            f"--{flag} is {name!r}; expected another folder than the shipped tables' with "
            "--interpret, whose times mean nothing"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--{flag} is {name!r}; expected a folder to write to: {error}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--{flag} is {name!r}; expected a folder to write to: it is read-only")
    return folder
