"""Exports a model's prefill and decode step for Ascend, where no Ascend device is.

    python -m experiments.export_ascend --preset=tiny --out=out/tiny_ascend --check
    python -m experiments.export_ascend --checkpoint=Qwen3-30B-A3B --out=out/30b --superkernel=moe
    python -m experiments.export_ascend --preset=qwen3_30b_a3b --abstract --out=out/30b_no_weights
    python -m experiments.export_ascend --out=out/tiny_ascend --check

The directory then holds, for each of prefill and decode, a serialised jax.export artifact
(.jax_export) and the same as StableHLO text (.mlir); manifest.json with every argument and result
in calling order; a sample of inputs and outputs to compare with on the target; the weights if they
are small. An export whose StableHLO has an operation that a young backend may lack is refused.

--check reads the directory again, compares the sample and an artifact for CPU and Ascend with
jax.jit, and runs the StableHLO text in an independent compiler, IREE (the extra `ascend`).

Needs no accelerator; JAX_PLATFORMS=cpu keeps JAX from taking hold of one.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from rich.console import Console
from rich.table import Table

from experiments.ascend import artifact, iree
from experiments.ascend.check import check
from experiments.ascend.comparison import Comparison
from experiments.ascend.folder import expect_replaceable
from experiments.ascend.load import load
from experiments.ascend.settings import Settings
from experiments.bench import script


def main(settings: Settings) -> str | None:
    """Exports and checks; returns a line if the check failed.

    Raises:
      ValueError, OSError, NotImplementedError: it cannot be done; the message says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        passed = _run(settings, script.make_console())
    return None if passed else "export_ascend: --check failed"


def _run(asked: Settings, console: Console) -> bool:
    """Whether the check passed, if there was one."""
    if asked.check:
        iree.expect_installed()  # a missing package should not take minutes to come out
    if asked.exports:
        expect_replaceable(asked.out)
        manifest = artifact.write_artifact(asked, load(asked))
        console.print(_contents(asked.out, manifest))
    if not asked.check:
        return True
    comparisons = check(asked.out)
    console.print(_comparisons(comparisons))
    return all(comparison.passed for comparison in comparisons)


def _contents(out: pathlib.Path, manifest: Mapping[str, Any]) -> Table:
    table = Table(title=f"{out}: for {manifest['platform']}, {manifest['dtype']}")
    for column in ("function", "arguments", "results", "operations", "composites"):
        table.add_column(column)
    for phase, function in manifest["functions"].items():
        names = [composite["name"] for composite in function["composites"]]
        counted = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        sizes = (
            len(function["arguments"]),
            len(function["results"]),
            sum(function["ops"].values()),
        )
        table.add_row(phase, *map(str, sizes), counted or "none")
    return table


def _comparisons(comparisons: list[Comparison]) -> Table:
    table = Table(title="compared with jax.jit: relative errors, the median and the worst")
    table.add_column("what", no_wrap=True)
    for column in ("logits", "cache", "bound", "tokens", "argmax", "result"):
        table.add_column(column)
    for each in comparisons:
        table.add_row(
            each.what,
            *(
                f"{errors.median:.2g}, {errors.worst:.2g}" if any(errors) else "equal bits"
                for errors in (each.logits, each.cache, each.bound)
            ),
            f"{each.same_tokens} of {each.tokens}",
            "right" if each.own_argmax else "WRONG",
            "passed" if each.passed else "FAILED",
        )
    return table


run = functools.partial(
    script.run, Settings, main, one_line=(ValueError, OSError, NotImplementedError)
)

if __name__ == "__main__":
    run()
