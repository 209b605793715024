"""Makes this process quick at tests; importing it does.

The tests import it before anything else, and the notebooks' tests run it in the notebooks' kernels.
"""

import gc
import os

import jax
import numpy as np
from jax._src import callback, tree_util
from jax._src.pallas import fuser  # noqa: F401
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

# A third of the suite's time went into XLA's newer code generator for CPUs, because it sets up MLIR
# for each fusion; the older one emits LLVM's code at once. One module is cheaper than the parts
# that parallel compilation makes. XLA reads this when the first client is made, and the processes
# that tests start inherit it.
XLA_FLAGS = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".lstrip()

# Each warpgroup of an interpreted kernel blocks a thread of the CPU client while it waits for
# another. The client makes as many as there are cores, or as this says: of two, all could wait.
os.environ.setdefault("NPROC", "16")

# Interpreting a first kernel imports `fuser`, which adds to the keys of JAX's caches. All that had
# been traced before would be traced and compiled again, so it is imported above.

# Kernels in interpret mode call back into Python, and those callbacks run JAX operations: with
# asynchronous dispatch they and the main thread's next operation wait for each other now and then.
# Must be set before the CPU client is made.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def _call_back(*arguments, callback, **_):
    return tree_util.tree_map(np.asarray, callback(*map(np.array, arguments)))


def _to_int(x):
    return x if isinstance(x, jax.core.Tracer) else int(x)


if jax.default_backend() == "cpu":
    # Most of the suite's time there goes into compiling what runs once. XLA's own passes stay as
    # they are, LLVM's are left out; in the processes that tests start too.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    # In interpret mode a kernel calls back for each memory operation, and JAX puts the arguments of
    # every such call on a device first, which was 40% of those tests. NumPy's arrays do as well;
    # copies, because XLA takes the memory back.
    callback.io_callback_impl = _call_back
    shared_memory._to_int = _to_int

# A tenth of the suite's time went into looking for cycles among JAX's many small objects.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
