import os

import jax
import pytest

# Before any folder's tests import it: the model's use it too.
pytest.register_assert_rewrite("tests.pallas_kernels.machine")

# Kernels in interpret mode call back into Python, and those callbacks run JAX operations: with
# asynchronous dispatch they and the main thread's next operation wait for each other now and then.
# Must be set before the CPU client is made.
jax.config.update("jax_cpu_enable_async_dispatch", False)

if jax.default_backend() == "cpu":
    # Most of the suite's time there goes into compiling what runs once. XLA's own passes stay as
    # they are, LLVM's are left out; in the processes that tests start too.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
