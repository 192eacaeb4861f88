"""Matrices of few bits: what is laid out means what was given, and rounding loses no more than half a step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel import ops
from whimbrel.ops import packed

SHAPES = {
    "outputs": st.integers(1, 40),
    "groups": st.integers(1, 4),
    "group": st.sampled_from(packed.GROUPS),
    "bits": st.sampled_from([8, 4]),
}


def matrix(outputs, inputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g) * torch.rand(outputs, 1, generator=g)


@given(**SHAPES, seed=st.integers(0, 99))
def test_codes_and_scales_come_back_and_mean_their_product(outputs, groups, group, bits, seed):
    g = torch.Generator().manual_seed(seed)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    q = torch.randint(low, high + 1, (outputs, groups * group), generator=g).to(torch.int8)
    scale = torch.randn(outputs, groups, generator=g).half().float()
    weight = packed.pack(q, scale, bits)
    got_q, got_scale = packed.integers(weight)
    assert torch.equal(got_q, q) and torch.equal(got_scale, scale)
    expected = q.float() * scale.repeat_interleave(group, dim=1)
    assert torch.equal(packed.unpack(weight), expected)
    ids = torch.randint(0, outputs, (5,), generator=g)
    assert torch.equal(packed.rows(weight, ids), expected[ids])


@settings(deadline=None)
@given(outputs=st.integers(1, 20), inputs=st.sampled_from([32, 64, 96]))
def test_the_layout_is_that_of_the_page(outputs, inputs):
    """Byte by byte, as native kernels and files have it."""
    q = torch.randint(-8, 8, (outputs, inputs), generator=torch.Generator().manual_seed(inputs))
    scale = torch.rand(outputs, inputs // 32).half()
    eight, four = packed.pack(q, scale, 8), packed.pack(q, scale, 4)
    for o in range(outputs):
        p, r = divmod(o, 8)
        for i in range(inputs):
            assert eight.codes[p, i // 4, 4 * r + i % 4] == q[o, i]
            byte = int(four.codes[p, i // 8, 4 * r + i % 4])
            assert (byte >> 4 if i % 8 >= 4 else byte & 15) == q[o, i] + 8
            assert eight.scales[p, i // 32, r] == four.scales[p, i // 32, r] == scale[o, i // 32]
    padding = eight.scales.transpose(1, 2).flatten(0, 1)[outputs:]
    assert not padding.any()


@given(**SHAPES, seed=st.integers(0, 99))
def test_rounding_errs_by_half_a_step(outputs, groups, group, bits, seed):
    weight = matrix(outputs, groups * group, seed)
    weight[0] = 0
    rounded = packed.round_to_nearest(weight, bits, group)
    step = packed.integers(rounded)[1].abs().repeat_interleave(group, dim=1)
    # 4 bits: a weight beyond 7 steps on the side that ends there errs by a whole step. Scales are float16:
    # 1e-3 of the weight, and 127 times half of the smallest step that float16 has.
    error = (packed.unpack(rounded) - weight).abs()
    assert (error <= step * (1 if bits == 4 else 0.5) + 1e-3 * weight.abs() + 127 * 3e-8).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("form", ["torch", "reference", "cpu"])
def test_linear_takes_a_packed_matrix_in_every_form(bits, form):
    weight, x = packed.round_to_nearest(matrix(21, 96), bits, 32), matrix(40, 96, 1)
    with ops.using(form):
        got = ops.linear(x, weight, torch.ones(21))
    torch.testing.assert_close(got, x @ packed.unpack(weight).T + 1, rtol=1e-5, atol=1e-5)
