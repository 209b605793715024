"""What the kernels share of Mosaic GPU: all that a JAX release or the interpreter may change.

Start at `pipeline.py`, the loop that every kernel runs. No module above this package asks whether
it is interpreted: `device.launch` tells the primitives here, and each has both forms.
"""
