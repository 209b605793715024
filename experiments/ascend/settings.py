"""What was asked for on the command line, checked before anything is loaded."""

import dataclasses
import pathlib

from experiments.bench.script import flag
from moe_jax.json_files import local_path
from moe_jax.presets import PRESETS
from moe_jax.superkernel import SCOPES

DTYPES = ("bfloat16", "float32")
WEIGHTS = ("plain", "fp8")
SUPERKERNEL = ("off", *SCOPES)

# What an export takes where the flag is not given; a check of what lies there takes none of these.
_DEFAULTS = {
    "batch": 1,
    "cache_length": 64,
    "prompt_length": 16,
    "steps": 4,
    "superkernel": "off",
    "seed": 0,
    "weights": "plain",
    "dequantize": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of export_ascend; _DEFAULTS are filled in."""

    out: pathlib.Path = flag("", "The artifact's directory.", needs="a directory")
    preset: str | None = flag(None, "Random weights of these sizes.", of=PRESETS)
    checkpoint: pathlib.Path | None = flag(None, "A checkpoint directory of either format.")
    check: bool = flag(False, "Whether to check what is then in --out.")
    abstract: bool = flag(
        False, "Without weights and sample, for what does not fit into memory here."
    )
    batch: int | None = flag(None, "Rows; 1 if not given.", least=1)
    cache_length: int | None = flag(None, "Tokens that a row may hold; 64 if not given.", least=1)
    prompt_length: int | None = flag(None, "Tokens of the prefill; 16 if not given.", least=1)
    steps: int | None = flag(None, "Decode steps of the sample; 4 if not given.", least=1)
    dtype: str | None = flag(None, "As stored if not given, a preset's is bfloat16.", of=DTYPES)
    weights: str | None = flag(
        None, "Of a preset's linear layers and experts; plain if not given.", of=WEIGHTS
    )
    dequantize: bool | None = flag(None, "Whether an FP8 checkpoint becomes --dtype.")
    superkernel: str | None = flag(
        None, "The scope that the decode step marks; off if not given.", of=SUPERKERNEL
    )
    seed: int | None = flag(None, "Of random weights and prompts; 0 if not given.", least=0)

    def __post_init__(self):
        self._check_model()
        if not self.exports:
            for name in (*_DEFAULTS, "dtype"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"--{name} is {value!r} without --preset or --checkpoint: what --out holds "
                        "is checked as it is; expected no such flag"
                    )
        filled = {"out": local_path(self.out, "--out")}
        if self.checkpoint is not None:
            filled["checkpoint"] = local_path(self.checkpoint, "--checkpoint")
        filled |= {n: value for n, value in _DEFAULTS.items() if getattr(self, n) is None}
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        least = self.prompt_length + self.steps
        if self.cache_length < least:
            raise ValueError(
                f"--cache_length is {self.cache_length}; expected at least {least}, "
                "--prompt_length and --steps together"
            )

    @property
    def exports(self) -> bool:
        """Whether there is something to export, before a check."""
        return self.preset is not None or self.checkpoint is not None

    def _check_model(self) -> None:
        for name, needed in (("weights", "preset"), ("dequantize", "checkpoint")):
            value = getattr(self, name)
            if value is not None and getattr(self, needed) is None:
                raise ValueError(f"--{name} is {value!r} without --{needed}; expected both")
        if self.preset and self.checkpoint:
            raise ValueError(
                f"--preset is {self.preset!r} with --checkpoint; expected one of the two"
            )
        if not self.exports and not self.check:
            raise ValueError(
                "--preset and --checkpoint are empty; expected one of the two, or --check for what "
                "--out holds"
            )
        if self.abstract and self.check:
            raise ValueError(
                "--abstract is given with --check, which runs what is exported; expected weights"
            )
