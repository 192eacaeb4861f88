"""The convolution against its definition, float64 at 1e-12."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.ops import reference, vectorised
from whimbrel.ops.segments import Segments


def conv_inputs(tokens, channels, width, sequences, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=g)
        for shape in [(tokens, channels), (channels, width), (channels,), (sequences, channels, width - 1)]
    ]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    channels=st.integers(1, 6),
    width=st.integers(1, 5),
    biased=st.booleans(),
    fresh=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_with_gradients(lengths, channels, width, biased, fresh, seed):
    x, weight, bias, initial = conv_inputs(sum(lengths), channels, width, len(lengths), seed)
    leaves = [x, weight] + ([bias] if biased else []) + ([] if fresh else [initial])
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for form in (reference, vectorised):
        y, tail = form.conv(x, weight, bias if biased else None, Segments.of(lengths), None if fresh else initial)
        total = (y * torch.sin(torch.arange(y.numel()).view_as(y) + 1.0)).sum() + (tail * tail).sum()
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True) if sum(lengths) else ()
        results.append((y, tail, *gradients))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight, bias, initial = (v.requires_grad_() for v in conv_inputs(9, 3, 4, 2))
    assert torch.autograd.gradcheck(
        lambda *v: vectorised.conv(v[0], v[1], v[2], Segments.of([2, 7]), v[3]), (x, weight, bias, initial)
    )


def test_a_document_does_not_see_the_one_before():
    x, weight, bias, _ = conv_inputs(10, 3, 4, 2)
    y = vectorised.conv(x, weight, bias, Segments.of([4, 6]))[0]
    x[:4] += 1.0
    again = vectorised.conv(x, weight, bias, Segments.of([4, 6]))[0]
    assert torch.equal(y[4:], again[4:]) and not torch.equal(y[:4], again[:4])


@pytest.mark.parametrize("form", [reference, vectorised])
def test_steps_equal_one_pass_and_touch_only_their_slots(form):
    x, weight, bias, _ = conv_inputs(10, 3, 4, 1)
    tail = torch.zeros(4, 3, 3, dtype=torch.float64)
    tail[[0, 1, 3]] = 7.0
    steps = [form.conv_step(x[t : t + 1], weight, bias, tail, torch.tensor([2])) for t in range(10)]
    whole, last = vectorised.conv(x, weight, bias, Segments.of([10]))
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail[2], last[0]) and (tail[[0, 1, 3]] == 7.0).all()
