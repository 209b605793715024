"""What the tests do differently with a GPU: kernels compiled, larger shapes, more repeats."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from hypothesis import HealthCheck, settings
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir

ON_GPU = jax.default_backend() == "gpu"
INTERPRET = not ON_GPU


def examples(on_cpu: int, on_gpu: int) -> settings:
    """Hypothesis settings; on a CPU, where CI runs, the same examples each time."""
    return settings(
        max_examples=on_gpu if ON_GPU else on_cpu,
        derandomize=not ON_GPU,
        database=None,
        deadline=None,
        # A suite's test runs in several subclasses, and kernels in interpret mode are slow.
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )


def calls_with_poisoned_output(function, *arguments) -> Iterator[jax.Array]:
    """function(*arguments, interpret=...) where memory that no kernel has written yet holds NaN.

    In interpret mode that is an option. On a GPU the output takes over a donated buffer of NaN, and
    temporaries fall into memory that was full of NaN when it was freed: several calls, since the
    allocator may still pick other memory.
    """
    if INTERPRET:
        interpret = plgpu.InterpretGPUParams(uninitialized_memory="nan")
        yield function(*arguments, interpret=interpret)
        return
    out = jax.eval_shape(lambda *arguments: function(*arguments, interpret=False), *arguments)
    poisoned = jax.jit(
        lambda poison, *arguments: function(*arguments, interpret=False),
        donate_argnums=0,
        keep_unused=True,
    )
    for _ in range(20):
        jax.block_until_ready(
            [jnp.full((4**n,), jnp.nan, jnp.float32) for n in range(4, 13) for _ in range(4)]
        )
        poison = jnp.full(out.shape, jnp.nan, out.dtype)
        yield poisoned(poison, *arguments)
        assert poison.is_deleted(), "the output did not take over the donated buffer"


def lower_for_cuda(function, *arguments, kind: str = "NVIDIA H100 80GB HBM3") -> str:
    """StableHLO of jit(function) for a kind of GPU; needs neither a GPU nor the CUDA plugin."""
    device = AbstractDevice(kind, 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def mosaic_modules(stablehlo: str) -> list[str]:
    """The MLIR text of each Mosaic GPU kernel in a lowered program."""
    modules = re.findall(r'custom_call @mosaic_gpu_v2\(.*?module = "((?:[^"\\]|\\.)*)"', stablehlo)
    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context:
        return [str(ir.Module.parse(_unescape(module))) for module in modules]


def kernels_of(stablehlo: str) -> list[str]:
    """Their names, in the program's order."""
    return [re.search(r"module @(\w+)", module)[1] for module in mosaic_modules(stablehlo)]


def _unescape(text: str) -> bytes:
    def byte(match):
        return bytes([int(match[1], 16)]) if match[1] else match[2]

    return re.sub(rb"\\(?:([0-9A-Fa-f]{2})|(.))", byte, text.encode("latin1"))
