"""The parts of `python -m experiments.tune`."""
