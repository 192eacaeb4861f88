"""Products with weights of few bits in rows: the kernels in Triton's interpreter, or on a GPU, against float64."""

import pytest
import torch
from kernels import DEVICE, apart, gap, normal

from whimbrel import ops
from whimbrel.ops import packed, reference, vectorised

kernels = ops.gpu()[0]
assert kernels is not None, ops.gpu()[1]
from whimbrel.ops.triton import fewbits as module  # noqa: E402
from whimbrel.ops.triton import launch  # noqa: E402

WIDE = {"rows": 256, "outputs": 16, "programs": 12, "num_warps": 4, "num_stages": 2}
SETTINGS = {"rows": 64, "outputs": 16, "programs": 12, "num_warps": 4, "num_stages": 2}


def matrix(outputs, inputs, bits, group):
    weight = normal(outputs, inputs, seed=7) * torch.rand(outputs, 1, generator=torch.Generator().manual_seed(1))
    panels = packed.round_to_nearest(weight.float(), bits, group)
    return panels, packed.by_rows(panels)


def there(weight):
    codes, scales = (v.to(DEVICE) for v in (weight.codes, weight.scales))
    return packed.Packed(codes, scales, weight.shape, weight.bits, weight.group, weight.form)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", packed.GROUPS)
@pytest.mark.parametrize("outputs", [1, 21])
def test_rows_mean_what_panels_mean(bits, group, outputs):
    panels, lines = matrix(outputs, 3 * group, bits, group)
    assert lines.form == "rows" and lines.codes.shape == (outputs, 3 * group * bits // 8)
    assert lines.scales.stride(0) == 1 or outputs == 1
    assert torch.equal(packed.unpack(lines), packed.unpack(panels))
    assert all(torch.equal(a, b) for a, b in zip(packed.integers(lines), packed.integers(panels), strict=True))
    ids = torch.tensor([outputs - 1, 0])
    assert torch.equal(packed.rows(lines, ids), packed.rows(panels, ids))
    if bits == 4:  # the layout of the page
        q, byte = packed.integers(panels)[0], lines.codes[0, group // 2 + 3]
        assert int(byte & 15) - 8 == q[0, group + 3] and int(byte >> 4) - 8 == q[0, group + 3 + group // 2]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, outputs, inputs, group, biased", [
    (1, 1, 32, 32, False), (3, 37, 9 * 32, 32, True), (17, 40, 3 * 64, 64, False), (64, 16, 128, 128, True),
    (70, 33, 5 * 32, 32, True), (2, 90, 32 * 13, 32, True), (65, 1, 32, 32, False), (128, 90, 9 * 64, 64, True),
    (131, 21, 13 * 32, 32, True), (256, 37, 5 * 128, 128, False), (257, 3, 64, 32, True),
])  # fmt: skip
def test_products(rows, outputs, inputs, group, biased, bits, dtype, most):
    """One row, rows that lie apart, odd outputs, parts of the groups; many rows, and more than a kernel takes."""
    weight, bias = matrix(outputs, inputs, bits, group)[1], normal(outputs, seed=3).to(dtype) if biased else None
    x = normal(rows, inputs, seed=rows).to(dtype)
    true = reference.linear(x.double(), weight, None if bias is None else bias.double())
    with launch.trial("linear", SETTINGS), launch.trial("linear_wide", WIDE):
        got = kernels.linear(apart(x).to(DEVICE), there(weight), None if bias is None else bias.to(DEVICE))
    assert got.dtype == dtype and gap(got, true) < most
    plain = vectorised.linear(x.to(DEVICE), there(weight), None if bias is None else bias.to(DEVICE))
    assert gap(plain, true) < 2 * most


@pytest.mark.parametrize("rows", [40, 200])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_mates_and_a_run_repeats(bits, rows):
    """Not within a kernel: up to 64 rows, or more."""
    weight, x = there(matrix(50, 9 * 32, bits, 32)[1]), normal(rows, 288).to(DEVICE, torch.bfloat16)
    with launch.trial("linear", SETTINGS), launch.trial("linear_wide", WIDE):
        together = kernels.linear(x, weight)
        assert torch.equal(together, kernels.linear(x, weight))
        for row in (0, 17, rows - 1):
            few = [row, *range(65)] if rows > 64 else [row]
            alone = kernels.linear(x[few], weight)
            # A GPU may sum tiles of 16 and of 64 rows in another order.
            assert torch.equal(alone[0], together[row]) if DEVICE == "cpu" else gap(alone[0], together[row]) < 1e-2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [65, 200])
def test_many_rows_meet_the_weights_that_unpacking_would_give(bits, rows, monkeypatch):
    """Rounded once: rows that are 1 at one input alone bring back the matrix."""
    weight, x = there(matrix(50, 224, bits, 32)[1]), torch.eye(224, device=DEVICE, dtype=torch.bfloat16)[:rows]
    unpacked = module.unpack(weight.codes, weight.scales, bits, 32, torch.bfloat16)
    monkeypatch.setattr(module, "unpack", None)
    with launch.trial("linear_wide", WIDE):
        got = kernels.linear(x, weight)
    assert torch.equal(got, unpacked.t()[:rows]) and torch.equal(unpacked.cpu(), packed.unpack(weight).cpu().bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_meet_the_weights_a_slice_at_a_time(bits, monkeypatch):
    weight, x = there(matrix(50, 96, bits, 32)[1]), normal(70, 96).to(DEVICE, torch.float32)
    monkeypatch.setattr(module, "SLICE", 7 * 96)
    bias = normal(50, seed=2).float()
    true = x.double().cpu() @ packed.unpack(weight).double().cpu().t() + bias
    assert gap(kernels.linear(x, weight, bias.to(DEVICE)), true) < 2e-5
    assert torch.equal(module.unpack(weight.codes, weight.scales, bits, 32, torch.float32), packed.unpack(weight))


def test_other_weights_and_gradients_run_in_torchs_form():
    panels, weight = matrix(8, 32, 8, 32)
    x = normal(2, 32).float()
    for other in (panels, packed.unpack(panels)):
        assert torch.equal(kernels.linear(x, other), vectorised.linear(x, other))
    x.requires_grad_()
    kernels.linear(x, weight).sum().backward()
    assert gap(x.grad[0], packed.unpack(weight).sum(0)) < 1e-6
    with ops.using("triton"), torch.no_grad():
        assert gap(ops.linear(x, there(weight)), x.double() @ packed.unpack(weight).double().t()) < 2e-5
