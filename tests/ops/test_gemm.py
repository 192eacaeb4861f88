"""The native product of many rows, with norm, bias, activation and residual, against float64, in every instruction set.

Weights of floats, and all weights where no AVX2 is: 2e-5 of the largest value. Weights of 8 and 4 bits on AVX2 meet
activations that are rounded to whole numbers, at most half a step of each off; a step is at most a 63rd of the mean
size of four (8 bits) or a 127th of the largest (4 bits) of 32 inputs.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, gap, instruction_set

from whimbrel.ops import cpu, packed
from whimbrel.ops.cpu import Matrix, Projection
from whimbrel.ops.cpu.library import address, call

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")
ACTS = {0: lambda v, y: v, 1: lambda v, y: v.clamp(min=0).square(), 2: lambda v, y: F.silu(v) * y}


class Gemm(ctypes.Structure):
    """As in native/src/whimbrel.h."""

    _fields_ = (
        ("weight", Projection),
        *((name, ctypes.c_void_p) for name in ("x", "norm", "norm_bias", "gate", "residual", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "x_stride", "gate_stride", "groups", "act")),
        ("eps", ctypes.c_float),
    )


def native(case, isa):
    y = case["y"].clone()
    pointers = [address(case[name]) for name in ("x", "norm", "norm_bias", "gate", "residual")]
    strides = [case["x"].stride(0), case["gate"].stride(0) if case["gate"] is not None else 0]
    weight = Projection(Matrix.of(case["weight"]), address(case["bias"]))
    with instruction_set(isa):
        call("gemm", Gemm(weight, *pointers, address(y), len(y), *strides, case["groups"], case["act"], 1e-5))
    return y


def double(tensor):
    return None if tensor is None else tensor.double()


def prepared(case):
    """Rows after the norm, in float64."""
    x, norm = case["x"].double(), double(case["norm"])
    if norm is None:
        return x
    if case["gate"] is not None:
        x = (x * F.silu(case["gate"].double())).unflatten(1, (case["groups"], -1))
        return F.rms_norm(x, x.shape[-1:], eps=1e-5).flatten(1) * norm
    if case["norm_bias"] is not None:
        return F.layer_norm(x, x.shape[-1:], 1 + norm, case["norm_bias"].double(), 1e-5)
    return F.rms_norm(x, x.shape[-1:], norm, 1e-5)


def problem(rows, inputs, outputs, weight, kind, biased, residual, act, groups, seed):
    """`kind`: how the rows are prepared. x and gate are slices of wider rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    x, gate, _ = normal(rows, 2 * inputs + 3).split([inputs, inputs, 3], dim=1)
    return {
        "weight": weight,
        "x": x,
        "norm": None if kind == "none" else normal(inputs),
        "norm_bias": normal(inputs) if kind == "layernorm1p" else None,
        "gate": gate if kind == "gated" else None,
        "groups": groups,
        "bias": normal(outputs) if biased else None,
        "residual": normal(rows, outputs) if residual else None,
        "y": normal(rows, outputs),
        "act": act,
    }


FORM = {
    "rows": st.integers(1, 40) | st.sampled_from([504, 505]),
    "kind": st.sampled_from(["none", "rmsnorm", "layernorm1p", "gated"]),
    "biased": st.booleans(),
    "residual": st.booleans(),
    "act": st.sampled_from([0, 1, 2]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 150), groups=st.integers(1, 3), outputs=st.integers(1, 70), **FORM)
@pytest.mark.parametrize("bits", [32, 16])
def test_rows_of_floats(bits, width, groups, outputs, **form):
    inputs = width * groups
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(form["seed"]))
    weight = packed.round_to_nearest(weight, 16) if bits == 16 else weight
    case = problem(inputs=inputs, outputs=outputs, weight=weight, groups=groups, **form)
    expected = _expected(case, packed.unpack(weight) if bits == 16 else weight)
    for isa in ISAS:
        assert gap(native(case, isa), expected) < 2e-5, isa


@settings(max_examples=15, deadline=None)
@given(
    blocks=st.integers(1, 4),
    group=st.sampled_from(packed.GROUPS),
    groups=st.sampled_from([1, 2, 4]),
    outputs=st.integers(1, 70),
    **FORM,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_panels_of_whole_numbers(bits, blocks, group, groups, outputs, **form):
    inputs = blocks * group
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(form["seed"]))
    held = packed.round_to_nearest(weight, bits, group)
    form["act"] = 0  # the bound of the error is that of a product
    case = problem(inputs=inputs, outputs=outputs, weight=held, groups=groups, **form)
    values, x = packed.unpack(held), prepared(case)
    expected = _expected(case, values)
    size = x.abs().unflatten(1, (-1, 32))
    if bits == 8:  # inputs 0, 1, 4, 5 and 2, 3, 6, 7 of eight share a lane
        pairs = size.unflatten(2, (4, 2, 2, 2)).sum((3, 5)).flatten(2)
        step = pairs.amax(-1) / 126
    else:
        step = size.amax(-1) / 127
    bound = 0.501 * step.repeat_interleave(32, dim=1) @ values.double().T.abs() + 1e-4 * (1 + expected.abs().max())
    for isa in ISAS:
        got = native(case, isa)
        if isa == "baseline":
            assert gap(got, expected) < 2e-5
        else:
            assert ((got - expected).abs() <= bound).all(), isa


def _expected(case, values):
    product = F.linear(prepared(case), values.double(), double(case["bias"]))
    y = ACTS[case["act"]](product, case["y"].double())
    return y if case["residual"] is None else y + case["residual"].double()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_threads_and_repeats_change_no_bit_and_rows_do_not_see_each_other(bits):
    weight = torch.randn(83, 160)
    held = weight if bits == 32 else packed.round_to_nearest(weight, bits, 32)
    case = problem(67, 160, 83, held, "rmsnorm", True, True, 1, 1, 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(case, cpu.isa()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])
    rows = slice(11, 12)
    alone = native({**case, **{name: case[name][rows] for name in ("x", "residual", "y")}}, cpu.isa())
    if hasattr(ctypes.CDLL(None), "__asan_init"):  # at -O1 products and sums of one row are fused otherwise
        assert gap(alone, results[0][rows]) < 1e-6
    else:
        assert torch.equal(alone, results[0][rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_codes_do_not_overflow(bits):
    weight = torch.full((16, 256), 1.0)
    weight[1::2] *= -1
    high = packed.pack(weight * (127 if bits == 8 else 7), torch.ones(16, 2), bits)
    low = packed.pack(weight.clamp(max=0) * (127 if bits == 8 else 8), torch.ones(16, 2), bits)
    for isa in ISAS:
        for held in (high, low):
            for sign in (1, -1):
                case = problem(5, 256, 16, held, "none", False, False, 0, 1, 0) | {
                    "x": torch.full((5, 256), 5.0 * sign)
                }
                expected = case["x"] @ packed.unpack(held).T
                torch.testing.assert_close(native(case, isa), expected, rtol=2e-2 if bits == 8 else 1e-3, atol=1e-2)
