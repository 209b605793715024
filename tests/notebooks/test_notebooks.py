"""Every notebook runs from top to bottom, and is stored with pictures as its only outputs."""

import base64

import pytest

pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
pytest.importorskip("ipykernel", reason="the notebooks extra is not installed")

import nbformat
from nbclient.exceptions import CellExecutionError

from notebooks import refresh

REFRESH = "run `python -m notebooks.refresh`"
LARGEST_PICTURE, LARGEST_NOTEBOOK = 100_000, 600_000  # bytes

QUICK = "import tests.quick_process"

# The balance loss as it is, but without a gradient.
NO_GRADIENT = """
import jax
from moe_jax.training import objective

whole = objective.balance_of_sums
objective.balance_of_sums = lambda *sums: jax.lax.stop_gradient(whole(*sums))
"""

each_notebook = pytest.mark.parametrize("path", refresh.paths(), ids=lambda path: path.stem)


def pictures(notebook):
    return [
        base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def test_there_is_a_notebook():
    assert refresh.paths()


@each_notebook
def test_runs(path):
    # A cell that raises is a CellExecutionError that shows the cell.
    executed = refresh.execute(refresh.read(path), before=QUICK)
    assert pictures(executed), f"{path.name} drew nothing"


@pytest.mark.slow
def test_training_and_balance_needs_the_gradient_of_the_balance_loss():
    notebook = refresh.read(refresh.FOLDER / "training_and_balance.ipynb")
    with pytest.raises(CellExecutionError, match=r"(?s)assert late\[.*AssertionError"):
        refresh.execute(notebook, before=QUICK + NO_GRADIENT)


@each_notebook
def test_stores_only_pictures(path):
    notebook = refresh.read(path)
    nbformat.validate(notebook)
    assert notebook == refresh.clean(notebook), f"{path.name} holds more than pictures: {REFRESH}"
    stored = pictures(notebook)
    assert stored, f"{path.name} is stored without its pictures: {REFRESH}"
    assert max(map(len, stored)) < LARGEST_PICTURE
    assert path.stat().st_size < LARGEST_NOTEBOOK


def test_a_cell_that_raises_is_an_error():
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="1 == 2"):
        refresh.execute(failing)


def test_clean_keeps_pictures_and_drops_the_rest():
    v4 = nbformat.v4
    picture = v4.new_output(
        "display_data",
        data={"image/png": "AAAA", "text/plain": "<Figure>"},
        metadata={"image/png": {"width": 1}},
    )
    cell = v4.new_code_cell(
        "plt.show()",
        execution_count=7,
        metadata={"editor": "some"},
        outputs=[v4.new_output("stream", text="printed"), picture],
    )
    notebook = v4.new_notebook(cells=[cell], metadata={"author": "somebody"})

    cleaned = refresh.clean(notebook)

    assert cleaned.metadata == refresh.METADATA
    (cleaned_cell,) = cleaned.cells
    assert cleaned_cell.source == cell.source
    assert (cleaned_cell.execution_count, cleaned_cell.metadata) == (None, {})
    (output,) = cleaned_cell.outputs
    assert (output.data, output.metadata) == ({"image/png": "AAAA"}, {})
    assert notebook.cells[0].execution_count == 7, "the argument is left as it was"
