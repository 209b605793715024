"""The parts of experiments.export_ascend."""
