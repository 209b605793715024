"""What does a result file of compare_layouts say? Prints it as Markdown and redraws its picture.

python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl
"""

import pathlib
import sys

from absl import app, flags

from experiments.compare import plot, records, report

_METRICS = flags.DEFINE_list(
    "metrics", ",".join(report.METRICS), f"The table's sections: {', '.join(report.METRICS)}."
)
_PLOT = flags.DEFINE_bool("plot", True, "Redraw the PNG beside the file.")


def main(argv: list[str]) -> None:
    """Prints the table of the file named on the command line."""
    if len(argv) != 2:
        sys.exit("render_results takes one argument, the JSONL file")
    if unknown := set(_METRICS.value) - set(report.METRICS):
        accepted = ", ".join(report.METRICS)
        sys.exit(f"render_results: --metrics has {sorted(unknown)}; expected of {accepted}")
    path = pathlib.Path(argv[1])
    try:
        environment, measurements = records.read(path)
    except (OSError, ValueError) as error:
        sys.exit(f"render_results: {error}")
    if not measurements:
        sys.exit(f"render_results: {path} holds no measurement")
    print(report.to_markdown(environment, measurements, _METRICS.value))
    if _PLOT.value:
        plot.draw(path.with_suffix(".png"), environment, measurements)


if __name__ == "__main__":
    app.run(main)
