"""Decoding with weights in FP8: what is multiplied is what was rounded, whatever the shape; layouts as CUDA asks."""

import pytest
import torch

from whimbrel import ops
from whimbrel.ops import fp8, packed


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, outputs, inputs", [(1, 1, 16), (3, 37, 48), (20, 64, 4480), (5, 16, 144)])
def test_a_product_is_that_of_the_rounded_operands(tokens, outputs, inputs, dtype):
    """In bfloat16 at least (8e-3): rowwise products come in it on every device that has them. 25 dB in all."""
    x, weight, bias = (
        normal(tokens, inputs).to(dtype),
        normal(outputs, inputs, seed=1),
        normal(outputs, seed=2).to(dtype),
    )
    held = fp8.weight(weight)
    assert held.codes.shape[0] % 16 == 0 and held.scales.shape == (held.codes.shape[0], 1)
    assert not held.codes[outputs:].float().any() and held.shape == (outputs, inputs)
    rounded, wide = fp8.quantise(x, "row").wide().double(), packed.unpack(held).double()
    true = rounded @ wide.t() + bias.double()
    got = ops.linear(x, held, bias)
    assert got.shape == (tokens, outputs) and got.dtype == dtype
    assert ((got.double() - true).abs() <= 8e-3 * true.abs() + 8e-3 * true.abs().max()).all()
    if tokens * outputs > 100:
        exact = x.double() @ weight.double().t() + bias.double()
        assert 20 * torch.log10(exact.norm() / (got.double() - exact).norm()) > 25
    columns = ops.linear(normal(inputs, 2).to(dtype).t(), held)
    assert columns.shape == (2, outputs), "rows that lie apart"
    assert ops.linear(x[None], held).shape == (1, tokens, outputs)


def test_inputs_that_cuda_cannot_sum_are_refused_on_every_device():
    held = fp8.weight(normal(32, 40))
    with pytest.raises(AssertionError, match="40 summed numbers are not a multiple of 16"):
        ops.linear(normal(2, 40), held)


def test_every_product_is_laid_out_as_cuda_wants_it(monkeypatch):
    """What reaches the product: [M, K] and [N, K] by rows, N and K multiples of 16, one float32 scale a row."""
    seen = []
    monkeypatch.setattr(fp8, "product", lambda a, b, dtype: seen.append((a, b)) or torch.zeros(3, 48, dtype=dtype))
    ops.linear(normal(64, 3).t(), fp8.weight(normal(33, 64)))
    ((a, b),) = seen
    fp8.check_layout(a, b)
    assert (a.codes.shape, b.codes.shape) == ((3, 64), (48, 64)) and a.codes.dtype == b.codes.dtype == fp8.E4M3
    assert b.codes.t().stride() == (1, 64) and b.scale.t().is_contiguous() and a.scale.is_contiguous()
