"""Scripts that each answer one question; run one by `python -m experiments.NAME`."""
