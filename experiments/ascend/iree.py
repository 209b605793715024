"""The independent StableHLO compiler: IREE compiles a shipped .mlir file for this CPU and runs it.

iree-base-compiler and iree-base-runtime are the optional extra `ascend`.
"""

import concurrent.futures
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.ascend.folder import ArtifactError
from experiments.ascend.sample import Named, Runner

# local-sync runs in the calling thread: nothing to wait for, nothing to hang.
_DRIVER = "local-sync"
# Not the host's CPU, so that the same file gives the same bits on another machine.
_OPTIONS = ("--iree-llvmcpu-target-cpu=generic",)


def expect_installed() -> str:
    """The compiler's version.

    Raises:
      ArtifactError: IREE is not installed; names the extra.
    """
    try:
        import iree.compiler.tools
        import iree.runtime  # noqa: F401
    except ImportError as error:
        raise ArtifactError(
            f"--check runs IREE, which is not installed ({error}); expected the extra 'ascend': "
            "iree-base-compiler and iree-base-runtime"
        ) from None
    return importlib.metadata.version("iree-base-compiler")


def iree_runner(folder: pathlib.Path, functions: Mapping[str, Mapping[str, Any]]) -> Runner:
    """Compiles each phase's StableHLO text.

    Args:
      folder: an artifact's.
      functions: phase -> its description in the manifest.

    Raises:
      ArtifactError: IREE does not compile one; names the file.
    """
    import iree.runtime

    paths = [folder / function["stablehlo"] for function in functions.values()]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each waits for a process of its own
        compiled = dict(zip(functions, pool.map(_compiled, paths), strict=True))
    modules = {
        phase: iree.runtime.load_vm_flatbuffer(module, driver=_DRIVER)
        for phase, module in compiled.items()
    }

    def runner(phase: str, named: Mapping[str, np.ndarray]) -> Named:
        names = {
            kind: [each["name"] for each in functions[phase][kind]]
            for kind in ("arguments", "results")
        }
        made = modules[phase].main(*(np.asarray(named[name]) for name in names["arguments"]))
        arrays = [array.to_host() for array in made]
        return dict(zip(names["results"], arrays, strict=True))

    return runner


def _compiled(path: pathlib.Path) -> bytes:
    import iree.compiler.tools

    try:
        return iree.compiler.tools.compile_file(
            str(path), target_backends=["llvm-cpu"], input_type="stablehlo", extra_args=_OPTIONS
        )
    except iree.compiler.tools.CompilerToolError as error:
        raise ArtifactError(f"IREE does not compile {path}: {error}") from None
