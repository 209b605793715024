"""Kernels of a decode step by class, as a profile of a chain shows them.

A kernel's class is where in the model its HLO instruction was written: the named scopes of
moe_jax are part of an instruction's op_name, and the profile names each kernel's instruction.
In a CUDA graph it does not; there XLA's kernels have their instruction's name, and ours their own.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import jax

from experiments.bench.decode_chain import DecodeChain

# Scope in the model -> class. A kernel fused over two scopes counts where its root is.
CLASSES = {
    "experts": "experts",
    "router": "router",
    "attention": "attention",
    "mlp": "dense mlp",
    "lm_head": "head",
    "choose": "head",
}
REST = "rest"
# Our kernels' names -> class, for CUDA graphs.
_OUR_KERNELS = {
    "decode_layer": "layer",
    "decode_attention": "attention",
    "decode_moe": "experts",
    "gather_rows": "experts",
    "expert_major": "experts",
    "output_major": "experts",
}
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*op_name="(?P<scopes>[^"]*)"', re.MULTILINE
)


class Kernel(NamedTuple):
    """One launch: its name, the HLO instruction that launched it, and its microseconds."""

    name: str
    instruction: str
    us: float


@dataclasses.dataclass(kw_only=True)
class KernelTotal:
    """Launches a step and microseconds a step of one kernel or class."""

    launches: float = 0.0
    us: float = 0.0


def profile_chain(chain: DecodeChain) -> list[Kernel]:
    """Every kernel of one run.

    Raises:
      RuntimeError: the profile has no kernel of a GPU in it.
    """
    chain.enqueue()
    chain.wait()
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1  # what names the instructions
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            chain.enqueue()
            chain.wait()
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        kernels = [kernel for file in files for kernel in _read_kernels(file)]
    if not kernels:
        raise RuntimeError("the profile has no GPU kernel")
    return kernels


def _read_kernels(file: pathlib.Path) -> Iterable[Kernel]:
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # other lines sum the streams' up
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "memcpy_details" in stats or "memset_details" in stats:
                    name = f"{event.name} (copy)"
                else:
                    name = event.name
                yield Kernel(name, str(stats.get("hlo_op", "")), event.duration_ns / 1e3)


def classes_of(hlo: str) -> dict[str, str]:
    """Instruction name -> class, from a compiled program's text."""
    found = {}
    for match in _INSTRUCTION.finditer(hlo):
        scopes = re.split(r"[/.]", match["scopes"])
        named = [CLASSES[scope] for scope in scopes if scope in CLASSES]
        found[match["name"]] = named[-1] if named else REST
    return found


def totals_by_class(
    kernels: Iterable[Kernel], classes: dict[str, str], steps: int
) -> dict[str, KernelTotal]:
    """Each class's total of a step, the longest first."""
    return _totals(((_class_of(kernel, classes), kernel) for kernel in kernels), steps)


def _class_of(kernel: Kernel, classes: dict[str, str]) -> str:
    own = kernel.name.removesuffix("_mosaic_gpu_kernel")
    if own in _OUR_KERNELS:
        return _OUR_KERNELS[own]
    of_kernel = re.sub(r"_(\d+)$", r".\1", kernel.name)  # loop_add_fusion_3 is loop_add_fusion.3
    return classes.get(kernel.instruction, classes.get(of_kernel, REST))


def totals_by_kernel(
    kernels: Iterable[Kernel], classes: dict[str, str], steps: int
) -> dict[str, KernelTotal]:
    """The same of "class: instruction: kernel", without the numbers that tell layers apart."""

    def named(kernel: Kernel) -> str:
        instruction = re.sub(r"[._]\d+", "", kernel.instruction) or "?"
        name = re.sub(r"_\d+", "", kernel.name)
        shown = instruction if name == instruction else f"{instruction}: {name[:60]}"
        return f"{_class_of(kernel, classes)}: {shown}"

    return _totals(((named(kernel), kernel) for kernel in kernels), steps)


def _totals(named: Iterable[tuple[str, Kernel]], steps: int) -> dict[str, KernelTotal]:
    totals: dict[str, KernelTotal] = collections.defaultdict(KernelTotal)
    for name, kernel in named:
        totals[name].launches += 1 / steps
        totals[name].us += kernel.us / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1].us))
