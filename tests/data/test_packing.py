# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.rows import one_per_row, pack

ROW = 32
LENGTHS = st.lists(st.integers(1, ROW), max_size=200).map(lambda x: np.array(x, np.int64))


@given(LENGTHS)
def test_every_example_is_in_exactly_one_row_and_no_row_overflows(lengths):
    plan = pack(lengths, ROW)
    assert sorted(plan.examples.tolist()) == list(range(len(lengths)))
    assert plan.starts[0] == 0 and plan.starts[-1] == len(lengths)
    for row in range(len(plan)):
        assert len(plan[row]) > 0
        assert lengths[plan[row]].sum() <= ROW
        assert (np.diff(plan[row]) > 0).all()


@given(LENGTHS)
def test_rows_are_those_of_plain_best_fit_decreasing(lengths):
    free: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [(space, row) for row, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting)[1]] -= length
        else:
            free.append(ROW - length)
    plan = pack(lengths, ROW)
    packed = [ROW - int(lengths[plan[row]].sum()) for row in range(len(plan))]
    assert sorted(packed) == sorted(free)


@given(LENGTHS)
def test_same_lengths_give_the_same_plan(lengths):
    first, second = pack(lengths, ROW), pack(lengths.tolist(), ROW)
    np.testing.assert_array_equal(first.examples, second.examples)
    np.testing.assert_array_equal(first.starts, second.starts)


@pytest.mark.parametrize("lengths", [[5, ROW + 1], [0, 4]])
def test_lengths_that_fit_no_row_are_refused_not_dropped(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 32"):
        pack(np.array(lengths), ROW)


def test_no_examples_give_no_rows():
    assert len(pack(np.zeros(0, int), ROW)) == 0


def test_unpacked_plan_has_one_example_a_row():
    plan = one_per_row(3)
    assert [plan[row].tolist() for row in range(len(plan))] == [[0], [1], [2]]
