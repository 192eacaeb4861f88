"""The chunked scan against the recurrence, in float64 at 1e-10 and in float32 at 1e-5 of the largest value."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.ops import reference, vectorised
from whimbrel.ops.segments import Segments

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 0)


def scan_inputs(tokens, heads, width, groups, size, sequences, *, dtype=torch.float64, seed=0):
    """x, dt, a, b, c, d and initial states, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    dt = torch.nn.functional.softplus(normal(tokens, heads) - 1)
    a = -(1 + 15 * torch.rand(heads, dtype=torch.float64, generator=g))
    row = [
        normal(tokens, heads, width),
        dt,
        a,
        normal(tokens, groups, size),
        normal(tokens, groups, size),
        normal(heads),
    ]
    return [v.to(dtype) for v in row], normal(sequences, heads, width, size).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    size=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 16, 64]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_chunked_scan_equals_the_recurrence(lengths, shared, groups, width, size, chunk, seed, data):
    tokens = sum(lengths)
    keep = data.draw(st.lists(st.integers(0, tokens - 1), max_size=4, unique=True))
    row, initial = scan_inputs(tokens, shared * groups, width, groups, size, len(lengths), seed=seed)
    segments = Segments.of(lengths)
    true = reference.ssd(*row, segments, initial, keep)
    fast = vectorised.ssd(*row, segments, initial, keep, chunk=chunk)
    for expected, got in zip(true, fast, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[7], [3, 0, 18], [1, 1, 33]])
def test_gradients_equal_those_of_the_recurrence(lengths):
    row, initial = scan_inputs(sum(lengths), 4, 3, 2, 5, len(lengths), seed=1)
    leaves = [v.requires_grad_() for v in (*row, initial)]
    segments, keep = Segments.of(lengths), (2, sum(lengths) - 1)
    gradients = []
    for form in (reference, vectorised):
        outputs = form.ssd(*row, segments, initial, keep)
        weights = [torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y) for y in outputs]
        total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(total, leaves))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    row, initial = scan_inputs(21, 4, 2, 2, 3, 2, seed=2)
    leaves = [v.requires_grad_() for v in (*row, initial)]
    segments = Segments.of([4, 17])
    assert torch.autograd.gradcheck(lambda *v: vectorised.ssd(*v[:6], segments, v[6], (8,), chunk=16), leaves)


def test_float32_stays_close_over_a_long_sequence():
    row, initial = scan_inputs(700, 8, 16, 2, 16, 1)
    segments = Segments.of([700])
    true = reference.ssd(*row, segments, initial)[0]
    fast = vectorised.ssd(*(v.float() for v in row), segments, initial.float())[0]
    assert (fast - true).abs().max() < 1e-5 * true.abs().max()


def test_large_decays_do_not_overflow():
    row, _ = scan_inputs(130, 2, 4, 1, 4, 1, dtype=torch.float32)
    row[1] = row[1] * 200
    row[0].requires_grad_()
    y = vectorised.ssd(*row, Segments.of([130]))[0]
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(row[0].grad).all()


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_equals_separate(lengths, seed):
    row, _ = scan_inputs(sum(lengths), 4, 3, 2, 5, 1, seed=seed)
    packed = vectorised.ssd(*row, Segments.of(lengths))[0]
    offsets = Segments.of(lengths).offsets
    for start, end in itertools.pairwise(offsets):
        cut = [v if v.shape[0] == 4 and v.dim() == 1 else v[start:end] for v in row]
        alone = vectorised.ssd(*cut, Segments.of([end - start]))[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=3), seed=st.integers(0, 99))
def test_state_handed_over_equals_one_pass(cuts, seed):
    row, initial = scan_inputs(50, 4, 3, 2, 5, 1, seed=seed)
    whole, final, _ = vectorised.ssd(*row, Segments.of([50]), initial)
    edges = [0, *sorted(cuts), 50]
    state, parts = initial, []
    for start, end in itertools.pairwise(edges):
        cut = [v if v.shape[0] == 4 and v.dim() == 1 else v[start:end] for v in row]
        y, state, _ = vectorised.ssd(*cut, Segments.of([end - start]), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_step_equals_scan_and_touches_only_its_slots():
    row, _ = scan_inputs(6, 6, 3, 2, 5, 1, dtype=torch.float32)
    x, dt, a, b, c, d = row
    slots = torch.tensor([3, 1])
    states = {}
    for form in (reference, vectorised):
        state = torch.randn(5, 6, 3, 5, generator=torch.Generator().manual_seed(3))
        before = state.clone()
        outputs = [
            form.ssd_step(x[t : t + 2], dt[t : t + 2], a, b[t : t + 2], c[t : t + 2], d, state, slots)
            for t in (0, 2, 4)
        ]
        assert torch.equal(state[[0, 2, 4]], before[[0, 2, 4]])
        states[form] = (torch.stack(outputs), state)
    for expected, got in zip(states[reference], states[vectorised], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for s, slot in enumerate(slots.tolist()):
        start = torch.randn(5, 6, 3, 5, generator=torch.Generator().manual_seed(3))[slot][None]
        own = [x[s::2], dt[s::2], a, b[s::2], c[s::2], d]
        y, final, _ = vectorised.ssd(*own, Segments.of([3]), start)
        torch.testing.assert_close(states[vectorised][0][:, s], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[vectorised][1][slot], final[0], rtol=1e-5, atol=1e-5)


def saved_bytes(tokens):
    """Bytes that the scan keeps for its backward pass."""
    row, _ = scan_inputs(tokens, 4, 8, 2, 8, 1, dtype=torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
        vectorised.ssd(*[v.requires_grad_() for v in row], Segments.of([tokens]))
    return sum(held)


def test_memory_is_linear_in_the_length():
    assert saved_bytes(4096) < 2.1 * saved_bytes(2048)


def test_bfloat16_in_bfloat16_out_computed_in_float32():
    row, initial = scan_inputs(90, 4, 8, 2, 8, 1, dtype=torch.float32)
    half = [v.bfloat16() for v in row]
    y, final, _ = vectorised.ssd(half[0], row[1], row[2], half[3], half[4], row[5], Segments.of([90]), initial)
    exact, _, _ = reference.ssd(
        half[0].double(),
        row[1].double(),
        row[2].double(),
        half[3].double(),
        half[4].double(),
        row[5].double(),
        Segments.of([90]),
        initial.double(),
    )
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


def test_a_float16_state_is_rounded_in_proportion_in_torchs_form_too():
    """An update of a tenth of float16's step above 1, four times: kept on average, lost by rounding to the nearest."""
    heads, size, add = 4, 64, 1e-4
    state = torch.ones(1, heads, 16, size, dtype=torch.float16)
    one, vector, still = torch.ones(1, heads, 16), torch.ones(1, 1, size), torch.zeros(heads)
    row = (one, torch.full((1, heads), add), still, vector, vector, still)
    for count in range(1, 5):
        vectorised.ssd_step(*row, state, torch.zeros(1, dtype=torch.int64), torch.tensor([count]))
    assert set(state.double().unique().tolist()) <= {1 + k * 2**-10 for k in range(5)}
    mean, spread = state.double().mean().item() - 1, (4 * add * 2**-10 / state.numel()) ** 0.5
    assert abs(mean - 4 * add) < 5 * spread
