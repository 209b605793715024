"""Each wrong input raises the documented error, which names field, value and what is accepted."""

import jax.numpy as jnp
import pytest

from pallas_kernels.router import route_tokens


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


GOOD = {"x": zeros(2, 64), "gate": zeros(16, 64), "K": 2}

# What is changed, the error, and what its message must say.
CASES = {
    "x 1-D": ({"x": zeros(64)}, ValueError, "x", "(64,)", "[T, H]"),
    "x float32": (
        {"x": zeros(2, 64, dtype=jnp.float32)},
        NotImplementedError,
        "x",
        "float32",
        "bfloat16",
        "reference_route_tokens",
    ),
    "x integers": ({"x": zeros(2, 64, dtype=jnp.int32)}, TypeError, "x", "int32", "bfloat16"),
    "x a list": ({"x": [[1.0]]}, TypeError, "x", "list", "[T, H]"),
    "gate 3-D": ({"gate": zeros(1, 16, 64)}, ValueError, "gate", "(1, 16, 64)", "[E, H]"),
    "gate's H": ({"gate": zeros(16, 128)}, ValueError, "gate", "(16, 128)", "H = 64"),
    "T": ({"x": zeros(129, 64)}, NotImplementedError, "T is 129", "1 to 128"),
    "E": ({"gate": zeros(20, 64)}, NotImplementedError, "E is 20", "multiples of 8 up to 512"),
    "E large": ({"gate": zeros(520, 64)}, NotImplementedError, "E is 520", "up to 512"),
    "H": (
        {"x": zeros(2, 96), "gate": zeros(16, 96)},
        ValueError,
        "H is 96",
        "multiple of 64",
    ),
    "K zero": ({"K": 0}, ValueError, "K is 0", "1 to 16"),
    "K of a float": ({"K": 2.0}, ValueError, "K is 2.0", "1 to 16"),
    "K beyond E": ({"K": 17}, ValueError, "K is 17", "E = 16"),
    "K beyond 32": ({"gate": zeros(64, 64), "K": 33}, ValueError, "K is 33", "1 to 32"),
    "norm_weight": (
        {"norm_weight": zeros(32)},
        ValueError,
        "norm_weight",
        "(32,)",
        "(64,)",
    ),
    "norm_eps": (
        {"norm_weight": zeros(64), "norm_eps": -1.0},
        ValueError,
        "norm_eps is -1.0",
        "not negative",
    ),
    "norm_eps of text": (
        {"norm_weight": zeros(64), "norm_eps": "small"},
        ValueError,
        "norm_eps is 'small'",
        "a number",
    ),
    "K of a bool": ({"K": True}, ValueError, "K is True", "1 to 16"),
    "interpret": ({"interpret": "yes"}, TypeError, "interpret", "'yes'", "InterpretGPUParams"),
    "shared memory": (
        {"x": zeros(128, 32768), "gate": zeros(512, 32768)},
        NotImplementedError,
        "H = 32768",
        "bytes of shared memory",
        "reference_route_tokens",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    changes, error, *says = CASES[name]
    with pytest.raises(error) as raised:
        route_tokens(**(GOOD | changes))
    for words in says:
        assert words in str(raised.value)
