"""The native product of a few rows with weights in every form, against float64, in every instruction set.

Float kinds: 2e-5 of the largest value. Whole numbers: the same integer arithmetic written in torch within 2e-5; beside
it, what rounding the activations to 255 steps costs: at most half a step of each, summed over the sizes of the weights.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, gap, instruction_set

from whimbrel.ops import cpu, packed

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")


def rounded(x_TD):
    """Activations as the kernels of 8 and 4 bits see them: 127 steps up to the largest of a row and 32 channels."""
    x = x_TD.unflatten(-1, (-1, 32))
    largest = x.abs().amax(-1, keepdim=True)
    codes = (x * torch.where(largest > 0, 127 / largest, 0)).round()
    return (codes.double() * (largest / 127).double()).flatten(-2)


def problem(rows, inputs, outputs, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) * torch.randn(inputs, generator=g)
    x[rows // 2] *= 0
    return x, torch.randn(outputs, inputs, generator=g), torch.randn(outputs, generator=g)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 16), inputs=st.integers(1, 150), outputs=st.integers(1, 70), biased=st.booleans())
@pytest.mark.parametrize("bits", [32, 16])
def test_rows_of_floats(bits, rows, inputs, outputs, biased):
    x, weight, bias = problem(rows, inputs, outputs, rows)
    bias = bias if biased else None
    held = packed.round_to_nearest(weight, 16) if bits == 16 else weight
    expected = x.double() @ (packed.unpack(held) if bits == 16 else weight).double().T + (0 if bias is None else bias)
    for isa in ISAS:
        with instruction_set(isa), torch.no_grad():
            assert gap(cpu.linear(x, held, bias), expected) < 2e-5, isa


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 16),
    groups=st.integers(1, 3),
    group=st.sampled_from(packed.GROUPS),
    outputs=st.integers(1, 70),
    biased=st.booleans(),
)
@pytest.mark.parametrize("bits", [8, 4])
def test_panels_of_whole_numbers(bits, rows, groups, group, outputs, biased):
    x, weight, bias = problem(rows, groups * group, outputs, rows)
    held, bias = packed.round_to_nearest(weight, bits, group), bias if biased else None
    values = packed.unpack(held).double()
    added = 0 if bias is None else bias.double()
    step = (x.unflatten(1, (-1, 32)).abs().amax(-1) / 127).repeat_interleave(32, dim=1).double()
    for isa in ISAS:
        with instruction_set(isa), torch.no_grad():
            got = cpu.linear(x, held, bias)
        assert gap(got, rounded(x) @ values.T + added) < 2e-5, isa
        error = (got - (x.double() @ values.T + added)).abs()
        assert (error <= 0.501 * step @ values.T.abs() + 1e-4).all(), isa


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(17, 90),
    groups=st.integers(1, 20),
    group=st.sampled_from(packed.GROUPS),
    outputs=st.integers(1, 70),
    biased=st.booleans(),
)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_many_rows_with_packed_weights(bits, rows, groups, group, outputs, biased):
    """16 bits: 2e-5 of the largest value. Fewer: half a step of each activation, over the sizes of the weights.

    A step is 1/127 of the largest of 32; on AVX2 with 8 bits 1/126 of the largest sum of the four that share a lane.
    """
    x, weight, bias = problem(rows, groups * group, outputs, rows)
    held, bias = packed.round_to_nearest(weight, bits, group), bias if biased else None
    values = packed.unpack(held).double()
    expected = x.double() @ values.T + (0 if bias is None else bias.double())
    for isa in ISAS:
        with instruction_set(isa), torch.no_grad():
            got = cpu.linear(x, held, bias)
        size = x.abs().unflatten(1, (-1, 4, 2, 2, 2))  # [row, block, eights, fours, pair, in pair]
        narrow = isa in ("avx2", "avx512") and bits == 8
        most = size.sum((3, 5)).flatten(2).amax(-1) / 126 if narrow else size.flatten(2).amax(-1) / 127
        step = most.repeat_interleave(32, dim=1).double()
        error = (got - expected).abs()
        bound = (0 if bits == 16 else 0.501) * step @ values.T.abs()
        assert (error <= bound + 2e-5 * expected.abs().max() + 1e-5).all(), isa


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_extreme_codes_do_not_overflow(bits):
    """All of one sign at the largest size: what sums of 16 bits would lose."""
    weight = torch.full((8, 256), 1.0)
    weight[1::2] *= -1
    held = packed.pack(weight * (127 if bits == 8 else 7), torch.ones(8, 2), bits)
    held_low = packed.pack(weight.clamp(max=0) * (127 if bits == 8 else 8), torch.ones(8, 2), bits)
    for isa in ISAS:
        for matrix in (held, held_low):
            with instruction_set(isa), torch.no_grad():
                for sign in (1, -1):
                    x = torch.full((3, 256), 5.0 * sign)
                    torch.testing.assert_close(cpu.linear(x, matrix), x @ packed.unpack(matrix).T)


@pytest.mark.parametrize("rows", [13, 41])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_threads_and_repeats_change_no_bit_and_rows_do_not_see_each_other(bits, rows):
    x, weight, bias = problem(rows, 256, 203, 0)
    held = weight if bits == 32 else packed.round_to_nearest(weight, bits, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(cpu.linear(x, held, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])
    if rows > cpu.FEW:  # another kernel
        return
    with torch.no_grad():
        alone = torch.cat([cpu.linear(row[None], held, bias) for row in x])
    assert torch.equal(alone, results[0]) if bits < 16 else gap(alone, results[0]) < 1e-6


def test_gradients_and_other_dtypes_are_left_to_torch():
    x, weight, _ = problem(2, 64, 8, 0)
    assert cpu.linear(x, weight.requires_grad_()).requires_grad
    with torch.no_grad():
        assert cpu.linear(x.double(), weight.double()).dtype == torch.float64
