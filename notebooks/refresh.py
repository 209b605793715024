"""Runs the notebooks of this folder and stores them with their pictures and nothing else.

    python -m notebooks.refresh                              # every notebook
    python -m notebooks.refresh notebooks/kernel_layouts.ipynb

Text that a cell prints, execution counts and editors' metadata stay out of the file, so that a diff
shows what was written or drawn anew. `clean` does that part; the tests check that it was done.
"""

import asyncio
import copy
import os
import pathlib
import sys
import tempfile

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

_SECONDS_A_CELL = 240


class _ThisPython(AsyncKernelManager):
    """Starts the interpreter that runs this file, whatever kernels the machine has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3", language="python")


def paths() -> list[pathlib.Path]:
    """The notebooks of this folder."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: pathlib.Path) -> NotebookNode:
    """A notebook in format 4, as it is stored."""
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode, before: str = "") -> NotebookNode:
    """Returns the notebook run in a fresh kernel on the CPU, with all outputs.

    Args:
      notebook: it is left as it is.
      before: code that the kernel runs first; it is not in the result.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    executed = copy.deepcopy(notebook)
    executed.cells.insert(0, nbformat.v4.new_code_cell(before))
    client = NotebookClient(
        executed,
        kernel_manager_class=_ThisPython,
        timeout=_SECONDS_A_CELL,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    with tempfile.TemporaryDirectory() as ipython_folder:
        search_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        # The user's own IPython start-up files and plotting backend stay out of it.
        settings = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
            "IPYTHONDIR": ipython_folder,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        asyncio.run(client.async_execute(env={**os.environ, **settings}))
    executed.cells.pop(0)
    return executed


def clean(notebook: NotebookNode) -> NotebookNode:
    """Returns the notebook with its PNG pictures as the only outputs and with fixed metadata."""
    cleaned = copy.deepcopy(notebook)
    cleaned.metadata = nbformat.from_dict(METADATA)
    for cell in cleaned.cells:
        cell.metadata = NotebookNode()
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [
                nbformat.v4.new_output("display_data", data={"image/png": output.data["image/png"]})
                for output in cell.outputs
                if "image/png" in output.get("data", {})
            ]
    return cleaned


def main(names: list[str]) -> None:
    for path in map(pathlib.Path, names) if names else paths():
        notebook = clean(execute(read(path)))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
