"""Attention against the one-query-at-a-time truth, float64 at 1e-12."""

import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.ops import reference, vectorised
from whimbrel.ops.segments import Segments


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=8),
    kv=st.integers(1, 3),
    shared=st.integers(1, 3),
    width=st.integers(1, 5),
    history=st.booleans(),
)
def test_equals_the_truth(pairs, kv, shared, width, history):
    queries = Segments.of([n for n, _ in pairs])
    keys = Segments.of([n + past * history * (n > 0) for n, past in pairs])
    q, k, v = (
        normal(queries.tokens, kv * shared, width),
        normal(keys.tokens, kv, width, seed=1),
        normal(keys.tokens, kv, width, seed=2),
    )
    expected = reference.attention(q, k, v, queries, keys)
    torch.testing.assert_close(vectorised.attention(q, k, v, queries, keys), expected, rtol=1e-12, atol=1e-12)


def test_a_long_history_is_attended_to_in_pieces(monkeypatch):
    queries, keys = Segments.of([7, 1, 4]), Segments.of([20, 9, 4])
    q, k, v = normal(12, 4, 3), normal(33, 2, 3, seed=1), normal(33, 2, 3, seed=2)
    expected = reference.attention(q, k, v, queries, keys)
    for pairs in (1, 45, 60):
        monkeypatch.setattr(sys.modules["whimbrel.ops.torch.attention"], "MASKED", pairs)
        torch.testing.assert_close(vectorised.attention(q, k, v, queries, keys), expected, rtol=1e-12, atol=1e-12)


def test_gradients_in_both_forms_of_packing():
    for lengths in ([3, 5], [3, 1, 5, 2, 0, 4]):
        segments = Segments.of(lengths)
        leaves = [normal(segments.tokens, heads, 4, seed=heads).requires_grad_() for heads in (4, 2, 2)]
        gradients = [
            torch.autograd.grad(form.attention(*leaves, segments, segments).pow(2).sum(), leaves)
            for form in (reference, vectorised)
        ]
        for expected, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    segments = Segments.of([2, 3, 1, 2, 1])
    leaves = [normal(9, heads, 3, seed=heads).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: vectorised.attention(q, k, v, segments, segments), leaves)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4), neighbours=st.booleans(), seed=st.integers(0, 9))
def test_paged_equals_flat(lengths, neighbours, seed):
    q, k, v = normal(len(lengths), 4, 3), normal(20, 4, 2, 3, seed=1), normal(20, 4, 2, 3, seed=2)
    order = torch.arange(20) if neighbours else torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    table = order.view(5, 4)[: len(lengths)]
    expected = reference.paged_attention(q, k, v, table, lengths)
    torch.testing.assert_close(vectorised.paged_attention(q, k, v, table, lengths), expected, rtol=1e-12, atol=1e-12)


def test_rotary_turns_pairs_and_leaves_the_rest():
    x, angles = normal(5, 3, 10), normal(5, 3, seed=1)
    turned = vectorised.rotary(x, angles.cos(), angles.sin())
    expected = reference.rotary(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
