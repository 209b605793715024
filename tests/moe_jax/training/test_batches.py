"""Packed documents: the rows of the module's example, and batches that depend on the step alone."""

import numpy as np
import pytest

from moe_jax.training import PackedDocuments
from moe_jax.training.objective import targets_of

A0, B0 = [10, 11, 12, 13], [20, 21, 22, 23, 24]


def test_the_example_of_the_module():
    packed = PackedDocuments([A0, [], B0], 6)
    assert packed.rows == 2
    batch = packed.batch(0, A=1, B=2)
    first = int(np.argmax(batch.input_ids[0, :, 0] == 10))
    order = [first, 1 - first]
    np.testing.assert_array_equal(batch.input_ids[0, order, :3], [[10, 11, 12], [22, 23, 24]])
    np.testing.assert_array_equal(
        batch.segment_ids[0, order], [[0, 0, 0, 0, 2, 2], [2, 2, 2, -1, -1, -1]]
    )
    none = -100
    np.testing.assert_array_equal(
        targets_of(batch)[0, order],
        [[11, 12, 13, none, 21, none], [23, 24, none, none, none, none]],
    )


def test_each_epoch_has_every_row_in_another_order():
    packed = PackedDocuments([range(100)], 4, seed=3)  # 25 rows, whose first tokens tell them apart
    firsts = [packed.batch(step, A=2, B=5).input_ids[:, :, 0] for step in range(5)]
    dealt = np.concatenate(firsts).ravel() // 4
    epochs = dealt[:25], dealt[25:]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    again = PackedDocuments([range(100)], 4, seed=3).batch(4, A=2, B=5)
    np.testing.assert_array_equal(again.input_ids[:, :, 0], firsts[4])
    other = PackedDocuments([range(100)], 4, seed=4).batch(0, A=2, B=5)
    assert not np.array_equal(other.input_ids[:, :, 0], firsts[0])


def test_what_is_refused():
    with pytest.raises(ValueError, match="S is 1; expected at least 2"):
        PackedDocuments([A0], 1)
    with pytest.raises(ValueError, match="documents have 1 tokens together; expected at least 2"):
        PackedDocuments([[3], []], 4)
    with pytest.raises(ValueError, match="step is -1; expected at least 0"):
        PackedDocuments([A0], 4).batch(-1, A=1, B=1)
