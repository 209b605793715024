"""What every layout must do: its test file subclasses LayoutSuite and inherits every case.

RoutingSuite is the part whose cases depend on how a batch of `usual` tokens is tiled.
"""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from pallas_kernels.decode_experts import LAYOUTS, Layout, decode_experts
from tests.pallas_kernels.decode_experts.cases import (
    BFLOAT16_BOUND,
    INT32_MAX,
    INT32_MIN,
    Case,
    Size,
    assert_right,
    assert_same_bits,
    bits,
    jitted_reference,
    make_case,
    size_of_terms,
)
from tests.pallas_kernels.machine import (
    INTERPRET,
    ON_GPU,
    calls_with_poisoned_output,
    examples,
)
from tests.pallas_kernels.races import run_and_assert_no_races

# Most cases run at this size. On a GPU, skewed routing gives an expert more than a tile of 8 rows.
USUAL = Size(T=48, E=12, K=4, H=256, I=192) if ON_GPU else Size(T=4, E=5, K=3, H=64, I=64)
# At this size every tile of 64 columns makes 2 stages come round again.
DEEP = Size(T=9, E=6, K=3, H=512, I=448) if ON_GPU else Size(T=3, E=4, K=3, H=192, I=192)

SIZES = [
    Size(T=1, E=1, K=1, H=64, I=64),
    Size(T=1, E=4, K=4, H=64, I=128),
    Size(T=USUAL.T, E=3, K=1, H=192, I=64),  # test_bfloat16_is_float32_rounded_once's too
    Size(T=2, E=4, K=2, H=64, I=192),
    USUAL,
    Size(T=5, E=2, K=2, H=192, I=128),
]
if ON_GPU:
    SIZES += [
        Size(T=7, E=7, K=7, H=320, I=448),
        Size(T=33, E=12, K=5, H=384, I=128),
        Size(T=97, E=3, K=2, H=128, I=64),
        Size(T=128, E=16, K=8, H=512, I=192),
        Size(T=1, E=128, K=8, H=2048, I=768),
        Size(T=64, E=128, K=8, H=2048, I=768),
    ]

# Up to how many T, E, K, H / 64 and I / 64 shapes are generated; each one compiles.
GENERATED = Size(T=100, E=9, K=4, H=5, I=5)

# Batches whose tokens are those of the largest.
BATCHES = [1, 2, 8, 9, 33, 97] if ON_GPU else [1, 3]
LARGEST_BATCH = USUAL._replace(T=128) if ON_GPU else USUAL


def _all_on_one(ids, E):
    return jnp.full_like(ids, E - 1)


def _repeated_within_a_token(ids, E):
    return ids.at[:, -1].set(ids[:, 0])


def _crowd_on_the_first_of_two(ids, E):
    # More than a tile of rows on one expert, and another expert after it.
    return jnp.ones_like(ids).at[::2, 0].set(E - 1)


def _pad_some_entries(ids, E):
    return jnp.where(jnp.arange(ids.size).reshape(ids.shape) % 3 == 1, -1, ids)


def _pad_with_every_kind_of_id(ids, E):
    kinds = jnp.array([-1, E, E + 7, INT32_MAX, INT32_MIN, -E], jnp.int32)
    return ids.at[:, 1].set(kinds[jnp.arange(len(ids)) % len(kinds)])


def _pad_whole_rows(ids, E):
    return ids.at[0].set(-1).at[-1].set(E).at[1, 0].set(-1)


def _pad_everything(ids, E):
    return jnp.full_like(ids, -1).at[0].set(E)


@st.composite
def generated_sizes(draw) -> Size:
    """Sizes up to GENERATED. A CPU keeps to one: each takes seconds to compile, and SIZES vary."""
    if not ON_GPU:
        return USUAL
    E = draw(st.integers(1, GENERATED.E))
    return Size(
        T=draw(st.integers(1, GENERATED.T)),
        E=E,
        K=draw(st.integers(1, min(E, GENERATED.K))),
        H=64 * draw(st.integers(1, GENERATED.H)),
        I=64 * draw(st.integers(1, GENERATED.I)),
    )


def other_value(layout: Layout, field: str, shapes) -> Any:
    """Another value of this field than the default config's, one that the layout's check takes."""
    default = layout.default_config(shapes, 1)
    value = getattr(default, field)
    candidates = {type(None): [True, 16], bool: [not value]}.get(type(value)) or [
        value // 2, value - 1, 2 * value, value - 64, value + 64, value + 1,
    ]  # fmt: skip
    for candidate in candidates:
        try:
            layout.check(dataclasses.replace(default, **{field: candidate}), shapes)
        except ValueError:
            continue
        if candidate != value:
            return candidate
    raise AssertionError(f"no other value found for {field} = {value!r}: teach other_value one")


class RoutingSuite:
    """Set `layout`, and `usual`, the size of each case."""

    layout: ClassVar[str]
    usual: ClassVar[Size] = USUAL

    def config(self, size: Size) -> Any:
        """What cases run with where they name no config; None for what the layout chooses."""
        return None

    def run(self, case: Case, **keywords) -> jax.Array:
        (T, K), (E, H, I) = case.expert_ids.shape, case.weights.down.shape
        size = Size(T=T, E=E, K=K, H=H, I=I)
        keywords = {"interpret": INTERPRET, "out_dtype": jnp.float32} | keywords
        if keywords.get("config") is None:
            keywords["config"] = self.config(size)
        return decode_experts(*case, layout=self.layout, **keywords)

    @pytest.mark.parametrize(
        "routing", [_all_on_one, _repeated_within_a_token, _crowd_on_the_first_of_two]
    )
    def test_odd_routing(self, routing, seed):
        case = make_case(self.usual, seed)
        case = case._replace(expert_ids=routing(case.expert_ids, self.usual.E))
        assert_right(self.run(case), case)

    @pytest.mark.parametrize(
        "pad",
        [_pad_some_entries, _pad_with_every_kind_of_id, _pad_whole_rows, _pad_everything],
    )
    def test_padding(self, pad, seed):
        clean = make_case(self.usual, seed)
        clean = clean._replace(expert_ids=pad(clean.expert_ids, self.usual.E))
        padding = (clean.expert_ids < 0) | (clean.expert_ids >= self.usual.E)  # [T, K]
        assert padding.any()
        full_rows = padding.all(axis=1)
        dirty = clean._replace(
            x=jnp.where(full_rows[:, None], jnp.nan, clean.x),
            expert_weights=jnp.where(padding, jnp.nan, clean.expert_weights),
        )
        out = self.run(dirty)
        chex.assert_trees_all_equal(out[full_rows], jnp.zeros_like(out[full_rows]))
        assert_right(out, clean)

    @pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
    def test_unused_expert_changes_no_bit(self, value, seed):
        case = make_case(self.usual, seed)
        unused = jnp.array([0, self.usual.E - 1])
        ids = jnp.where(jnp.isin(case.expert_ids, unused), 2, case.expert_ids)
        # Padding's ids must not reach an expert either: clipped, they would be these two.
        case = case._replace(expert_ids=ids.at[0, 0].set(-1).at[1, 0].set(self.usual.E))
        weights = dataclasses.replace(
            case.weights,
            gate_up=case.weights.gate_up.at[unused].set(value),
            down=case.weights.down.at[unused].set(value),
        )
        out = self.run(case)
        assert_right(out, case)
        assert_same_bits(self.run(case._replace(weights=weights)), out)

    @pytest.mark.parametrize("pad", [lambda ids, E: ids, _pad_whole_rows], ids=["full", "padded"])
    def test_every_element_is_written(self, pad, seed):
        case = make_case(self.usual, seed)
        case = case._replace(expert_ids=pad(case.expert_ids, self.usual.E))
        expected = self.run(case)

        def run(*case, interpret):
            return self.run(Case(*case), interpret=interpret)

        for out in calls_with_poisoned_output(run, *case):
            assert_same_bits(out, expected)
        assert_right(expected, case)


class LayoutSuite(RoutingSuite):
    """Set `small_rings` too, a Config whose stages come round again at the size DEEP."""

    small_rings: ClassVar[Any]
    # The same with one launch a product, because the race detector takes all blocks of a grid for
    # concurrent: it does not see the counters that order them.
    race_config: ClassVar[Any]
    # What cases of other configs run at.
    size_of_config: ClassVar[Size] = Size(T=2, E=3, K=2, H=128, I=128)

    # --- right on fresh inputs

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_matches_reference(self, size, seed):
        case = make_case(size, seed)
        assert_right(self.run(case), case)

    def test_bfloat16_is_float32_rounded_once(self, seed):
        # Enough outputs for the error to be near its mean, which is bfloat16's own 0.00165.
        case = make_case(SIZES[2], seed)
        out = self.run(case, out_dtype=None)
        chex.assert_type(out, jnp.bfloat16)
        assert_same_bits(out, self.run(case).astype(jnp.bfloat16))
        expected = jitted_reference(*case)
        error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        chex.assert_trees_all_close(error, 0.0, rtol=0, atol=BFLOAT16_BOUND)

    @examples(on_cpu=6, on_gpu=25)
    @given(data=st.data())
    def test_generated_shape_and_routing(self, data):
        size = data.draw(generated_sizes(), label="size")
        count = size.T * size.K
        an_id = st.integers(-2, size.E + 1) | st.sampled_from([0, size.E - 1, -1])
        ids = data.draw(st.lists(an_id, min_size=count, max_size=count), label="expert_ids")
        case = make_case(size, data.draw(st.integers(0, 2**20), label="seed"))
        case = case._replace(
            expert_ids=jnp.array(ids, jnp.int32).reshape(size.T, size.K),
            # Negative and zero ones too: a routing weight may be anything finite.
            expert_weights=case.expert_weights - 0.5,
        )
        assert_right(self.run(case), case, size_of_terms(case))

    def test_terms_that_all_but_cancel(self, seed):
        """The test above once met such a case: the error was 1.6e-4 of the sum, 3e-6 of a term."""
        case = make_case(SIZES[1], seed)  # which test_matches_reference compiles anyway
        case = case._replace(
            expert_ids=jnp.array([[0, 0, -1, -1]], jnp.int32),
            expert_weights=jnp.array([[-0.2617, 0.2609, 1, 1]], jnp.float32),
        )
        assert_right(self.run(case), case, size_of_terms(case))

    def test_config(self, config_fields, seed):
        size, layout = self.size_of_config, LAYOUTS[self.layout]
        config = layout.default_config(size.shapes, size.T)
        for field in config_fields:
            config = dataclasses.replace(config, **{field: other_value(layout, field, size.shapes)})
        case = make_case(size, seed)
        assert_right(self.run(case, config=config), case)

    @pytest.mark.parametrize("pad", [lambda ids, E: ids, _pad_some_entries], ids=["full", "padded"])
    def test_rings_that_come_round_again(self, pad, seed):
        case = make_case(DEEP, seed)
        case = case._replace(expert_ids=pad(case.expert_ids, DEEP.E))
        assert_right(self.run(case, config=self.small_rings), case)

    # --- bits

    def test_same_input_same_bits(self, seed):
        # Deep enough for stages to be refilled many times: a refill too early would show here.
        size = Size(T=4, E=128, K=8, H=2048, I=768) if ON_GPU else DEEP._replace(T=2, E=2, K=1)
        config = None if ON_GPU else self.small_rings
        case = make_case(size, seed)
        expected = self.run(case, config=config)

        @jax.jit
        def count_different(case, expected):
            def again(index, count):
                # Tied to the index, or the compiler would compute it once for all rounds.
                this_case, _ = lax.optimization_barrier((case, index))
                out = self.run(this_case, config=config)
                return count + jnp.any(bits(out) != bits(expected))

            return lax.fori_loop(0, 1000 if ON_GPU else 2, again, jnp.int32(0))

        assert_right(expected, case)
        chex.assert_trees_all_equal(count_different(case, expected), jnp.int32(0))

    @pytest.mark.parametrize("T", BATCHES)
    def test_bits_do_not_depend_on_the_batch(self, T, seed):
        case = make_case(LARGEST_BATCH, seed)
        expected = self.run(case)
        which = np.random.default_rng(seed).permutation(LARGEST_BATCH.T)
        for start in range(0, LARGEST_BATCH.T - T + 1, T):
            some = which[start : start + T]
            assert_same_bits(self.run(case.tokens(some)), expected[some])

    def test_bits_do_not_depend_on_the_place(self, seed):
        case = make_case(LARGEST_BATCH, seed)
        expected = self.run(case)
        order = np.roll(np.arange(LARGEST_BATCH.T)[::-1], 1)
        assert_same_bits(self.run(case.tokens(order)), expected[order])

    @pytest.mark.parametrize("x_of_others", [1.0, jnp.nan])
    def test_bits_do_not_depend_on_neighbours(self, x_of_others, seed):
        case = make_case(LARGEST_BATCH, seed)
        expected = self.run(case)
        token = 2
        other = make_case(LARGEST_BATCH, seed + 1)
        # Neighbours that all share this token's first expert, one of them padding.
        ids = jnp.full_like(case.expert_ids, case.expert_ids[token, 0]).at[0].set(-1)
        changed = Case(
            x=(other.x * x_of_others).at[token].set(case.x[token]),
            weights=case.weights,
            expert_ids=ids.at[token].set(case.expert_ids[token]),
            expert_weights=other.expert_weights.at[token].set(case.expert_weights[token]),
        )
        assert_same_bits(self.run(changed)[token], expected[token])

    # --- what no output shows

    @pytest.mark.parametrize("pad", [lambda ids, E: ids, _pad_whole_rows], ids=["full", "padded"])
    @pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")
    def test_no_races(self, pad, seed):
        case = make_case(DEEP, seed)
        case = case._replace(expert_ids=pad(case.expert_ids, DEEP.E))
        out = run_and_assert_no_races(
            lambda *case, interpret: self.run(
                Case(*case), interpret=interpret, config=self.race_config
            ),
            *case,
        )
        assert_right(out, case)
