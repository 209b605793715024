"""What was asked for on the command line, checked before anything is loaded."""

import dataclasses
import pathlib

from moe_jax.json_files import local_path
from moe_jax.presets import PRESETS
from moe_jax.superkernel import SCOPES

DTYPES = ("bfloat16", "float32")
SUPERKERNEL = ("off", *SCOPES)

# flag -> (value where it is not given, smallest value)
_NUMBERS = {
    "batch": (1, 1),
    "cache_length": (64, 1),
    "prompt_length": (16, 1),
    "steps": (4, 1),
    "seed": (0, 0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of export_ascend, converted.

    Attributes:
      out: the artifact's directory.
      preset: a name in PRESETS, or None.
      checkpoint: a checkpoint's directory, or None. Without either, `out` is checked as it is.
      check: whether to check the artifact when it is written.
      abstract: whether to do without weights.
      batch: rows.
      cache_length: tokens that a row may hold.
      prompt_length: tokens of the prefill.
      steps: decode steps of the sample.
      dtype: None keeps a checkpoint's, and is bfloat16 for a preset.
      superkernel: "off" or a scope's name.
      seed: of random weights and of the sample's prompts.
    """

    out: pathlib.Path
    preset: str | None
    checkpoint: pathlib.Path | None
    check: bool
    abstract: bool
    batch: int
    cache_length: int
    prompt_length: int
    steps: int
    dtype: str | None
    superkernel: str
    seed: int

    @property
    def exports(self) -> bool:
        """Whether there is something to export, before a check."""
        return bool(self.preset or self.checkpoint)


def parse(
    *, out: str, preset: str, checkpoint: str, check: bool, abstract: bool, **optional
) -> Settings:
    """Checks the flags' values.

    Args:
      optional: the other flags, None where they were not given.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    if not out:
        raise ValueError("--out is empty; expected a directory")
    _check_model(preset, checkpoint, check, abstract)
    if not preset and not checkpoint:
        for flag, value in optional.items():
            if value is not None:
                raise ValueError(
                    f"--{flag} is {value!r} without --preset or --checkpoint: what --out holds is "
                    "checked as it is; expected no such flag"
                )
    numbers = {
        flag: optional[flag] if optional[flag] is not None else default
        for flag, (default, _) in _NUMBERS.items()
    }
    for flag, value in numbers.items():
        smallest = _NUMBERS[flag][1]
        if not smallest <= value < 2**31:
            raise ValueError(f"--{flag} is {value}; expected {smallest} to {2**31 - 1}")
    names = {"dtype": (optional["dtype"], DTYPES)}
    names["superkernel"] = (optional["superkernel"] or "off", SUPERKERNEL)
    for flag, (value, accepted) in names.items():
        if value and value not in accepted:
            raise ValueError(f"--{flag} is {value!r}; expected one of {', '.join(accepted)}")
    least = numbers["prompt_length"] + numbers["steps"]
    if numbers["cache_length"] < least:
        raise ValueError(
            f"--cache_length is {numbers['cache_length']}; expected at least {least}, "
            "--prompt_length and --steps together"
        )
    return Settings(
        out=local_path(out, "--out"),
        preset=preset or None,
        checkpoint=local_path(checkpoint, "--checkpoint") if checkpoint else None,
        check=check,
        abstract=abstract,
        dtype=optional["dtype"] or None,
        superkernel=names["superkernel"][0],
        **numbers,
    )


def _check_model(preset: str, checkpoint: str, check: bool, abstract: bool) -> None:
    if preset and checkpoint:
        raise ValueError(f"--preset is {preset!r} with --checkpoint; expected one of the two")
    if not preset and not checkpoint and not check:
        raise ValueError(
            "--preset and --checkpoint are empty; expected one of the two, or --check for what "
            "--out holds"
        )
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    if abstract and check:
        raise ValueError(
            "--abstract is given with --check, which runs what is exported; expected weights"
        )
