"""How far from the floor is each entry of a tuned table? Prints the table as Markdown.

python -m experiments.render_tuned pallas_kernels/decode_experts/data/h100.json
"""

import pathlib
import sys

import jax
from absl import app

from experiments.tuning import floors
from pallas_kernels.decode_experts.tuned_tables import parse


def main(argv: list[str]) -> None:
    """Prints the table of the file named on the command line."""
    if len(argv) != 2:
        sys.exit("render_tuned takes one argument, a tuned table's JSON file")
    path = pathlib.Path(argv[1])
    try:
        table = parse(path.read_text(encoding="utf-8"), jax.__version__)
        print(floors.to_markdown(table))
    except (OSError, ValueError) as error:  # a TableError, or text that is not UTF-8, is one
        sys.exit(f"render_tuned: {path}: {error}")


if __name__ == "__main__":
    app.run(main)
