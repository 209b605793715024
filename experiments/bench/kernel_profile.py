"""Kernels of a program on a GPU by class, as a profile of one run shows them.

A kernel's class is where in the model its HLO instruction was written: the named scopes of
moe_jax are part of an instruction's op_name, and the profile names each kernel's instruction.
In a CUDA graph it does not; there XLA's kernels have their instruction's name, and ours their own.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

REST = "rest"
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*op_name="(?P<scopes>[^"]*)"', re.MULTILINE
)
# A gradient's are as in transpose(jvp(layer_0))/attention. A dot is no end of one, because
# parameters' names have dots: layers.0.mlp.experts.down is in no scope.
_BETWEEN_SCOPES = re.compile(r"[/();]")
_NUMBER = re.compile(r"_\d+$")


class Kernel(NamedTuple):
    """One launch: its name, the HLO instruction that launched it, and its microseconds."""

    name: str
    instruction: str
    us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """How the kernels of a kind of program are told apart.

    Attributes:
      scopes: scope in the model, without a layer's number -> class; the innermost counts. A kernel
        fused over two scopes counts where its root is.
      own: name of a kernel of ours -> class, for CUDA graphs.
      kinds: pattern in a kernel's name -> what follows the class, the first that is found. A class
        without it has its scopes' other kernels.
    """

    scopes: Mapping[str, str]
    own: Mapping[str, str]
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of_instructions(self, hlo: str) -> dict[str, str]:
        """Instruction name -> class, from a compiled program's text."""
        found = {}
        for match in _INSTRUCTION.finditer(hlo):
            scopes = [_NUMBER.sub("", scope) for scope in _BETWEEN_SCOPES.split(match["scopes"])]
            named = [self.scopes[scope] for scope in scopes if scope in self.scopes]
            found[match["name"]] = named[-1] if named else REST
        return found

    def of_kernel(self, kernel: Kernel, instructions: Mapping[str, str]) -> str:
        """A kernel's class, where `of_instructions` found those of its program's instructions."""
        own = kernel.name.removesuffix("_mosaic_gpu_kernel")
        of_name = re.sub(r"_(\d+)$", r".\1", kernel.name)  # loop_add_fusion_3: loop_add_fusion.3
        where = instructions.get(kernel.instruction, instructions.get(of_name, REST))
        where = self.own.get(own, where)
        for pattern, kind in self.kinds.items():
            if re.search(pattern, kernel.name):
                return f"{where} {kind}"
        return where


DECODE_STEP = Classes(
    scopes={
        "experts": "experts",
        "router": "router",
        "attention": "attention",
        "mlp": "dense mlp",
        "lm_head": "head",
        "choose": "head",
    },
    own={
        "decode_layer": "layer",
        "decode_attention": "attention",
        "decode_moe": "experts",
        "gather_rows": "experts",
        "expert_major": "experts",
        "output_major": "experts",
    },
)

TRAIN_STEP = Classes(
    scopes={
        "layer": "norms and sums",
        "experts": "experts",
        "router": "router",
        "attention": "attention",
        "mlp": "dense mlp",
        "embed": "embedding",
        "cross_entropy": "head",
        "cast": "cast",
        "update": "optimiser",
    },
    own={
        "grouped_matmul": "experts",
        "grouped_matmul_transposed": "experts",
        "grouped_matmul_to_weights": "experts",
        "grouped_swiglu": "experts",
    },
    kinds={
        "^nccl": "collectives",
        "cudnn|flash|fmha": "cudnn",
        "^grouped_|nvjet|gemm|cutlass|cublas|splitK": "products",
    },
)


@dataclasses.dataclass(kw_only=True)
class KernelTotal:
    """Launches a step and microseconds a step of one kernel or class."""

    launches: float = 0.0
    us: float = 0.0


def profile_kernels(run: Callable[[], None]) -> list[Kernel]:
    """Every kernel of one run, on all devices of the process.

    Args:
      run: runs the compiled program and waits for it. It is called twice, first without a profile.

    Raises:
      RuntimeError: the profile has no kernel of a GPU in it.
    """
    run()
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1  # what names the instructions
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        kernels = [kernel for file in files for kernel in _read_kernels(file)]
    if not kernels:
        raise RuntimeError(
            f"the profile has no GPU kernel; the platform is {jax.default_backend()}"
        )
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


@dataclasses.dataclass(frozen=True)
class Profile:
    """Kernels of one run, and what tells their classes.

    Attributes:
      kernels: as `profile_kernels` found them.
      hlo: the compiled program's text.
      classes: how they are told apart.
      steps: of the run; a mesh's devices count as steps, for the figures of one device.
    """

    kernels: Sequence[Kernel]
    hlo: str
    classes: Classes
    steps: int

    def by_class(self) -> dict[str, KernelTotal]:
        """Each class's total of a step, the longest first."""
        return _totals(self._classed(), self.steps)

    def by_kernel(self) -> dict[str, KernelTotal]:
        """The same of "class: instruction: kernel", without numbers that tell layers apart."""

        def named(where: str, kernel: Kernel) -> str:
            instruction = re.sub(r"[._]\d+", "", kernel.instruction) or "?"
            name = re.sub(r"_\d+", "", kernel.name)
            shown = instruction if name == instruction else f"{instruction}: {name[:60]}"
            return f"{where}: {shown}"

        return _totals(
            ((named(where, kernel), kernel) for where, kernel in self._classed()), self.steps
        )

    def kernel_lines(self, most: int) -> list[str]:
        """`by_kernel` as lines for a reader, the `most` longest of them."""
        single = self.by_kernel()
        lines = [
            f"  {total.us:9.1f} us in {total.launches:7.2f} launches a step: {name}"
            for name, total in list(single.items())[:most]
        ]
        if len(single) > len(lines):
            lines.append(f"  and {len(single) - len(lines)} more kernels")
        return lines

    def record(self) -> dict[str, list[float]]:
        """`by_class` as a row holds it: class -> [launches a step, us a step]."""
        return {name: [total.launches, total.us] for name, total in self.by_class().items()}

    def _classed(self) -> list[tuple[str, Kernel]]:
        instructions = self.classes.of_instructions(self.hlo)
        return [(self.classes.of_kernel(kernel, instructions), kernel) for kernel in self.kernels]


def _totals(named: Iterable[tuple[str, Kernel]], steps: int) -> dict[str, KernelTotal]:
    totals: dict[str, KernelTotal] = collections.defaultdict(KernelTotal)
    for name, kernel in named:
        totals[name].launches += 1 / steps
        totals[name].us += kernel.us / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1].us))
