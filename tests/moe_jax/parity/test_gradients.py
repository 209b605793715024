"""The loss's gradients to routers and experts, with padding and without, normalised and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parameters import from_arrays, to_arrays
from tests.moe_jax.goldens.cases import GRADIENT_CASES
from tests.moe_jax.parity.golden import assert_close, call, golden, model_of


def expected_gradients(found) -> dict[str, np.ndarray]:
    """Gradients under our names; in the oracle gate and up projections share an axis."""
    config, gradients = found.config, {}
    for name, value in found.outputs.items():
        layer, _, rest = name.removeprefix("gradients.model.").partition(".mlp.")
        if not name.startswith("gradients."):
            continue
        if rest == "experts.gate_up_proj":
            I, H = config.moe_intermediate_size, config.hidden_size
            gradients[f"{layer}.mlp.experts.gate_up"] = value.reshape(-1, 2, I, H)
        elif rest == "experts.down_proj":
            gradients[f"{layer}.mlp.experts.down"] = value
        else:
            gradients[f"{layer}.mlp.{rest}"] = value
    return gradients


NAMES = [case.name for case in GRADIENT_CASES]
HARDEST = "gradients_padding_left_norm_topk_prob_false"


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "grouped") for name in NAMES] + [(HARDEST, "portable"), (HARDEST, "reference")],
)
def test_gradients(name, backend):
    found = golden(name)
    expected = expected_gradients(found)
    assert len(expected) == 3 * found.config.num_hidden_layers
    arrays = to_arrays(model_of(name))

    @jax.grad
    def gradients_of(chosen):
        model = from_arrays(found.config, arrays | chosen)
        return call(model, found, experts_backend=backend).loss

    gradients = gradients_of({key: jnp.asarray(arrays[key]) for key in expected})
    # Their sizes differ by far: each is measured against its own largest element.
    for key, value in expected.items():
        scale = np.abs(value).max()
        assert scale > 1e-5, key
        assert_close(gradients[key] / scale, value / scale)
