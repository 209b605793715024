import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_experts import StreamedConfig, streamed
from pallas_kernels.decode_experts.streamed_columns import _nth_set_bits
from tests.pallas_kernels.decode_experts.cases import (
    Size,
    assert_right,
    assert_same_bits,
    make_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import USUAL, LayoutSuite
from tests.pallas_kernels.decode_experts.test_expert_major import assert_waits_before_refill
from tests.pallas_kernels.machine import INTERPRET, ON_GPU


class TestStreamed(LayoutSuite):
    layout = "streamed"
    small_rings = StreamedConfig(columns=64, slots=4)
    launches = 1

    def check_kernels(self, modules):
        super().check_kernels(modules)
        for module in modules:
            assert_waits_before_refill(module)


@pytest.fixture
def compact_always(monkeypatch):
    """Tokens are compacted in small batches too, which otherwise happens beyond 8 tokens only."""
    monkeypatch.setattr(streamed, "EVERY_TOKEN_UP_TO", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("compact_always")
class TestRoutedTokens:
    """What a small batch's own way of filling tiles hides of the other one."""

    layout = TestStreamed.layout
    small_rings = TestStreamed.small_rings
    run = LayoutSuite.run
    test_odd_routing = LayoutSuite.test_odd_routing
    test_padding = LayoutSuite.test_padding
    test_rings_that_come_round_again = LayoutSuite.test_rings_that_come_round_again
    test_every_element_is_written = LayoutSuite.test_every_element_is_written
    test_bits_do_not_depend_on_neighbours = LayoutSuite.test_bits_do_not_depend_on_neighbours
    test_no_races = LayoutSuite.test_no_races


@pytest.mark.parametrize("up_to", [0, 8])
def test_more_tokens_than_one_kernel_takes(up_to, seed, monkeypatch):
    monkeypatch.setattr(streamed, "MOST_TOKENS", 3)
    monkeypatch.setattr(streamed, "EVERY_TOKEN_UP_TO", up_to)
    jax.clear_caches()
    case = make_case(Size(T=7, E=4, K=2, H=64, I=64), seed)
    assert_right(TestStreamed().run(case), case)
    jax.clear_caches()


def test_partial_sums_are_what_run_adds(seed):
    case = make_case(USUAL, seed)
    config = streamed.default_config(USUAL.shapes, USUAL.T)
    partials = streamed.partial_sums(*case, config, interpret=INTERPRET)
    chex.assert_shape(partials, (USUAL.I // config.columns, USUAL.T, USUAL.H))
    assert_same_bits(streamed.add_partial_sums(partials), TestStreamed().run(case))


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
def test_an_expert_changes_no_token_that_is_not_routed_there(value, seed):
    size = Size(T=48 if ON_GPU else 4, E=4, K=1, H=128, I=128)
    case = make_case(size, seed)
    case = case._replace(expert_ids=(jnp.arange(size.T, dtype=jnp.int32) % 4)[:, None])
    weights = jax.tree.map(lambda w: w.at[2].set(value), case.weights)
    others = np.arange(size.T) % 4 != 2
    layout = TestStreamed()
    out = layout.run(case._replace(weights=weights))
    assert_same_bits(out[others], layout.run(case)[others])


def test_nth_set_bits():
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = rng.integers(-(2**31), 2**31, 3).astype(np.int32)
        words[rng.integers(3)] = rng.choice([0, -1, -(2**31), 1])
        bits = np.flatnonzero([(int(word) >> bit) & 1 for word in words for bit in range(32)])
        found, count = _nth_set_bits([jnp.int32(word) for word in words], jnp.arange(128))
        assert count == len(bits)
        chex.assert_trees_all_equal(found[: len(bits)], jnp.asarray(bits, jnp.int32))
