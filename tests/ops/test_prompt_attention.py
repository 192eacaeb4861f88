"""Native attention of prompts against float64, in every instruction set: 2e-5 of the largest value."""

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


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 140)), min_size=1, max_size=4),
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
            assert gap(cpu.prompt_attention(q, k, v, queries, keys), expected) < 2e-5, isa


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
            found.append(cpu.prompt_attention(q, k, v, queries, keys))
    finally:
        torch.set_num_threads(threads)
    assert gap(found[0], expected) < 2e-5
    assert all(torch.equal(found[0], other) for other in found)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads are no neighbours
    assert torch.equal(cpu.prompt_attention(turned, k, v, queries, keys), found[0])


def test_nan_and_infinity_reach_those_who_see_them_and_nobody_else():
    segments = Segments.of([100, 3])
    for spoil in (float("nan"), float("inf")):
        q, k, v = (normal(103, 2, 16, seed=seed) for seed in (5, 6, 7))
        clean = cpu.prompt_attention(q, k, v, segments, segments)
        k[70, 1] = spoil
        for isa in ISAS:
            with instruction_set(isa):
                y = cpu.prompt_attention(q, k, v, segments, segments)
            assert not torch.isfinite(y[70:100, 1]).all(-1).any(), isa
            assert gap(y[:70], clean[:70]) < 2e-5 and gap(y[:, 0], clean[:, 0]) < 2e-5, isa
            assert gap(y[100:], clean[100:]) < 2e-5, isa


def test_gradients_and_other_dtypes_are_left_to_torch():
    segments = Segments.of([9])
    leaves = [normal(9, 2, 4, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    mine, theirs = (form(*leaves, segments, segments) for form in (cpu.prompt_attention, vectorised.attention))
    assert mine.requires_grad
    assert torch.equal(mine, theirs)
    double = [leaf.detach().double() for leaf in leaves]
    assert cpu.prompt_attention(*double, segments, segments).dtype == torch.float64
    assert cpu.prompt_attention(*(leaf[:0] for leaf in leaves), Segments.of([0]), Segments.of([0])).shape == (0, 2, 4)
