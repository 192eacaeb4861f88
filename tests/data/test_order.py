"""The keyed permutation: a bijection, its own inverse's inverse, another one in each epoch, even-handed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.data.order import Permutation
from whimbrel.errors import UserError

SEEDS = st.integers(-(2**63), 2**64)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_bijection_and_places_is_its_inverse(n: int, seed: int, epoch: int) -> None:
    order = Permutation(n, seed)
    items = order(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(items), np.arange(n))
    assert np.array_equal(order.places(items, epoch), np.arange(n))


@given(n=st.integers(1, 2**62), seed=SEEDS, place=st.integers(0, 2**62))
def test_large_sets_are_permuted_without_being_stored(n: int, seed: int, place: int) -> None:
    order = Permutation(n, seed)
    index = place % n
    item = order(index)
    assert 0 <= item < n and order.places(item, 0) == index


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    order = Permutation(37, 5)
    assert order(np.arange(200)).tolist() == [int(order(i)) for i in range(200)]
    assert order(np.arange(6).reshape(2, 3)).shape == (2, 3) and order(4).shape == ()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    n = 1000
    orders = [Permutation(n, 1)(np.arange(n)), Permutation(n, 1)(np.arange(n, 2 * n)), Permutation(n, 2)(np.arange(n))]
    for a in range(3):
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 10  # 1 expected
    assert (orders[0] == np.arange(n)).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 5, 16, 50])
def test_every_item_stands_everywhere_equally_often(n: int) -> None:
    trials = 4000
    items = Permutation(n, 11)(np.arange(trials * n)).reshape(trials, n)
    table = np.stack([(items == item).sum(0) for item in range(n)])  # item, place
    expected = trials / n
    deviation = np.abs(table - expected) / np.sqrt(expected * (1 - 1 / n))
    assert deviation.max() < 5  # in standard deviations; 2,500 cells at most


def test_neighbours_do_not_stay_neighbours() -> None:
    steps = np.diff(Permutation(10_000, 3)(np.arange(10_000)))
    assert (np.abs(steps) == 1).sum() < 15  # 2 expected


def test_the_order_does_not_change_from_version_to_version() -> None:
    assert Permutation(1000, 7)([0, 1, 2, 999, 1000, 1001]).tolist() == [945, 601, 26, 666, 584, 441]


def test_an_empty_set_has_no_order() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Permutation(0, 1)
