"""Native attention and its gradients against float64, in every instruction set: 2e-5 and 5e-5 of the largest value."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, gap, instruction_set

from whimbrel.ops import cpu, reference, vectorised
from whimbrel.ops.segments import Segments

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PAIRS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 140)), min_size=1, max_size=4)
"""Queries of each sequence, and tokens before them."""


@settings(max_examples=25, deadline=None)
@given(
    pairs=PAIRS,
    kv=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 5]),
    width=st.sampled_from([1, 8, 20, 64]),
    large=st.sampled_from([1.0, 12.0]),
)
@example(pairs=[(64, 64), (1, 127), (128, 0)], kv=2, shared=4, width=16, large=1.0)  # blocks that are just full
@example(pairs=[(3, 70)], kv=1, shared=300, width=4, large=1.0)  # a token has more rows than a task
@example(pairs=[(500, 0), (0, 9)], kv=1, shared=1, width=8, large=12.0)  # several tasks of one sequence
def test_equals_the_truth(pairs, kv, shared, width, large):
    queries, keys = Segments.of([n for n, _ in pairs]), Segments.of([n + past * (n > 0) for n, past in pairs])
    if not queries.tokens:
        return
    q, k, v = (
        large * normal(queries.tokens, kv * shared, width, seed=0),
        *(normal(keys.tokens, kv, width, seed=seed) for seed in (1, 2)),
    )
    expected = reference.attention(q.double(), k.double(), v.double(), queries, keys)
    for isa in ISAS:
        with instruction_set(isa):
            assert gap(cpu.attention(q, k, v, queries, keys), expected) < 2e-5, isa


def test_slices_of_wider_rows_threads_and_runs():
    queries, keys = Segments.of([200, 31]), Segments.of([260, 31])
    rows = normal(231, 3, 8, 32, seed=3)
    q = rows[:, 0]
    wide = normal(291, 2, 2, 32, seed=4)
    k, v = wide.unbind(1)
    expected = reference.attention(q.double(), k.double(), v.double(), queries, keys)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(cpu.attention(q, k, v, queries, keys))
    finally:
        torch.set_num_threads(threads)
    assert gap(found[0], expected) < 2e-5
    assert all(torch.equal(found[0], other) for other in found)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads are no neighbours
    assert torch.equal(cpu.attention(turned, k, v, queries, keys), found[0])


def test_nan_and_infinity_reach_those_who_see_them_and_nobody_else():
    segments = Segments.of([100, 3])
    for spoil in (float("nan"), float("inf")):
        q, k, v = (normal(103, 2, 16, seed=seed) for seed in (5, 6, 7))
        clean = cpu.attention(q, k, v, segments, segments)
        k[70, 1] = spoil
        for isa in ISAS:
            with instruction_set(isa):
                y = cpu.attention(q, k, v, segments, segments)
            assert not torch.isfinite(y[70:100, 1]).all(-1).any(), isa
            assert gap(y[:70], clean[:70]) < 2e-5 and gap(y[:, 0], clean[:, 0]) < 2e-5, isa
            assert gap(y[100:], clean[100:]) < 2e-5, isa


def with_gradients(form, inputs, dy, queries, keys):
    leaves = [x.clone().to(dy.dtype).requires_grad_() for x in inputs]
    y = form(*leaves, queries, keys)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@settings(max_examples=20, deadline=None)
@given(pairs=PAIRS, kv=st.integers(1, 3), shared=st.sampled_from([1, 2, 5]), width=st.sampled_from([1, 8, 20, 64]))
@example(pairs=[(64, 64), (1, 127), (128, 0)], kv=2, shared=4, width=16)  # blocks that are just full
@example(pairs=[(3, 70)], kv=1, shared=300, width=4)  # a token has more rows than a task
@example(pairs=[(700, 150), (0, 9), (300, 0)], kv=2, shared=4, width=8)  # several parts of one sequence
def test_gradients_equal_the_truth(pairs, kv, shared, width):
    queries, keys = Segments.of([n for n, _ in pairs]), Segments.of([n + past for n, past in pairs])
    if not queries.tokens:
        return
    q, dy = (normal(queries.tokens, kv * shared, width, seed=seed) for seed in (0, 3))
    k, v = (normal(keys.tokens, kv, width, seed=seed) for seed in (1, 2))
    expected = with_gradients(reference.attention, (q, k, v), dy.double(), queries, keys)
    for isa in ISAS:
        with instruction_set(isa):
            for mine, truth in zip(with_gradients(cpu.attention, (q, k, v), dy, queries, keys), expected, strict=True):
                assert gap(mine, truth) < 5e-5, isa


def test_gradients_do_not_depend_on_threads_runs_or_how_the_inputs_lie():
    segments = Segments.of([900, 31])
    rows = normal(931, 3, 8, 32, seed=3)
    q, k, v, dy = rows[:, 0], rows[:, 1, :2], rows[:, 2, :2], normal(931, 8, 32, seed=4)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(with_gradients(cpu.attention, (q, k, v), dy, segments, segments))
    finally:
        torch.set_num_threads(threads)
    leaf = rows.clone().requires_grad_()
    y = cpu.attention(leaf[:, 0], leaf[:, 1, :2], leaf[:, 2, :2], segments, segments)
    (whole,) = torch.autograd.grad(y, leaf, dy)
    found.append([y.detach(), whole[:, 0], whole[:, 1, :2], whole[:, 2, :2]])
    with torch.no_grad():
        assert torch.equal(cpu.attention(q, k, v, segments, segments), y)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_dtypes_are_left_to_torch():
    segments = Segments.of([9])
    double = [normal(9, 2, 4, seed=seed).double() for seed in (1, 2, 3)]
    assert torch.equal(cpu.attention(*double, segments, segments), vectorised.attention(*double, segments, segments))
    assert cpu.attention(*(x[:0] for x in double), Segments.of([0]), Segments.of([0])).shape == (0, 2, 4)
