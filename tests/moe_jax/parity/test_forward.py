"""One pass without a cache: logits, hidden states, router logits and losses of every case."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe_jax.goldens.cases import CASES
from tests.moe_jax.parity.golden import assert_logits_differ, assert_matches, golden, model_of

FORWARD = [name for name, case in CASES.items() if not case.new_tokens and not case.fp8]


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    assert_matches(model_of(name), golden(name))


def test_positions_are_used():
    name = "position_ids_jumps"
    assert_logits_differ(model_of(name), golden(name), position_ids=None)


def test_positions_that_restart_begin_sequences_unless_there_is_a_mask():
    found = golden("packed")
    mask = jnp.asarray(found.valid.astype(np.int32))
    assert_logits_differ(model_of("packed"), found, attention_mask=mask)
    # Segments say the same of a row with a mask, and the positions follow from them.
    segments = jnp.asarray(np.cumsum(found.inputs["position_ids"] == 0, axis=1))
    said = {"attention_mask": mask, "segment_ids": segments, "position_ids": None}
    assert_matches(model_of("packed"), found, **said)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("name", ["base", "padding_both", "hidden_act"])
def test_other_backends(name, backend):
    assert_matches(model_of(name), golden(name), experts_backend=backend)


@pytest.mark.parametrize("name", ["base", "padding_both"])
def test_moe_chunks(name):
    # 22 tokens, at most 5 at once
    assert_matches(model_of(name, moe_chunk_max_len=5), golden(name))
