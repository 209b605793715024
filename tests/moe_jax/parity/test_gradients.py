"""The loss's gradients to routers and experts, with padding and without, normalised and not."""

import jax
import numpy as np

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


HARDEST = "gradients_padding_left_norm_topk_prob_false"
RUNS = [(case.name, "grouped") for case in GRADIENT_CASES]
RUNS += [(HARDEST, "portable"), (HARDEST, "reference")]


def test_gradients():
    """Every run in one program, because each would take as long to compile."""

    def loss(chosen, name, backend):
        found = golden(name)
        model = from_arrays(found.config, to_arrays(model_of(name)) | chosen)
        return call(model, found, experts_backend=backend).loss

    def total(every):
        return sum(loss(chosen, *run) for run, chosen in every.items())

    expected = {run: expected_gradients(golden(run[0])) for run in RUNS}
    arrays = {run: to_arrays(model_of(run[0])) for run in RUNS}
    found = jax.jit(jax.grad(total))(
        {run: {key: arrays[run][key] for key in expected[run]} for run in RUNS}
    )
    for run in RUNS:
        assert len(expected[run]) == 3 * golden(run[0]).config.num_hidden_layers
        # Their sizes differ by far: each is measured against its own largest element.
        for key, value in expected[run].items():
            scale = np.abs(value).max()
            assert scale > 1e-5, (run, key)
            assert_close(found[run][key] / scale, value / scale)
