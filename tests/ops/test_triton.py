"""Triton kernels against the definitions in float64: in the interpreter on a CPU, as machine code on a GPU.

float32: 2e-5 of the largest value, 1e-4 for sums over many tokens of the scan. bfloat16: 2e-2 (its rounding is 4e-3,
and operands of products are rounded too).
"""

import pytest
import torch
from kernels import DEVICE, apart, compare, gap, normal

from whimbrel import ops
from whimbrel.ops import Segments, reference, vectorised

kernels = ops.gpu()[0]
assert kernels is not None, ops.gpu()[1]
from whimbrel.ops.triton import launch  # noqa: E402

F32, BF16 = (torch.float32, 2e-5), (torch.bfloat16, 2e-2)
SCAN = {"piece": 32, "chunk": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (3, 4, 16), (33, 128)])
def test_rms_norm(shape, dtype, most):
    leaves = [normal(*shape), 1 + normal(shape[-1], seed=1)]
    compare(
        lambda x, w: [kernels.rms_norm(x, w, 1e-5)], lambda x, w: [reference.rms_norm(x, w, 1e-5)], leaves, dtype, most
    )


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("rows, groups, width", [(1, 1, 1), (9, 3, 5), (20, 2, 40)])
def test_gated_norm(rows, groups, width, dtype, most):
    leaves = [normal(rows, groups * width), normal(rows, groups * width, seed=1), 1 + normal(groups * width, seed=2)]

    def form(module):
        return lambda y, gate, w: [module.gated_norm(y, gate, w, groups, 1e-5)]

    compare(form(kernels), form(reference), leaves, dtype, most)


@pytest.mark.parametrize("dtype, most", [F32, BF16])
def test_activations(dtype, most):
    leaves = [normal(7, 33), normal(7, 33, seed=1)]
    compare(lambda x: [kernels.relu2(x)], lambda x: [reference.relu2(x)], leaves[:1], dtype, most)
    compare(lambda g, u: [kernels.swiglu(g, u)], lambda g, u: [reference.swiglu(g, u)], leaves, dtype, most)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 1.5)])
def test_step_size(limit):
    leaves = [4 * normal(11, 6), normal(6, seed=1)]
    compare(
        lambda dt, bias: [kernels.step_size(dt, bias, limit)],
        lambda dt, bias: [reference.step_size(dt, bias, limit)],
        leaves,
    )
    small = torch.full((1, 1), -9.0, device=DEVICE)  # exp(-9) is kept to the last bits, not only to 1e-7 of 1
    exact = torch.nn.functional.softplus(small.double().cpu())
    got = kernels.step_size(small, torch.zeros(1, device=DEVICE), (0.0, float("inf")))
    assert abs(got.cpu().double() / exact - 1).item() < 1e-5


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("lengths, width, biased, begun", [
    ([1], 4, True, False), ([5, 0, 2, 40], 4, True, True), ([9, 1], 2, False, True), ([3, 4], 1, True, False),
    ([0, 2], 3, False, False),
])  # fmt: skip
def test_convolution(lengths, width, biased, begun, dtype, most):
    channels, segments = 21, Segments.of(lengths, device=DEVICE)
    leaves = [
        normal(sum(lengths), channels),
        normal(channels, width, seed=1),
        normal(channels, seed=2) if biased else None,
    ]
    leaves.append(normal(len(lengths), channels, width - 1, seed=3) if begun and width > 1 else None)

    def form(module, cut):
        return lambda x, w, b, h: module.conv(x, w, b, cut, h)

    compare(form(kernels, segments), form(reference, Segments.of(lengths)), leaves, dtype, most)


def test_convolution_of_one_token_each_advances_its_slots_alone():
    x, weight, bias = normal(3, 21).float(), normal(21, 4, seed=1).float(), normal(21, seed=2).float()
    slots = torch.tensor([4, 0, 2])
    tails = normal(5, 3, 21, seed=3).float()
    mine, true = tails.to(DEVICE).transpose(1, 2), tails.clone().double().transpose(1, 2)
    y = kernels.conv_step(apart(x).to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), mine, slots.to(DEVICE))
    expected = reference.conv_step(x.double(), weight.double(), bias.double(), true, slots)
    assert gap(y, expected) < 2e-5
    assert gap(mine, true) < 1e-6


def scan_leaves(lengths, heads, groups, width, size):
    tokens = sum(lengths)
    dt = torch.nn.functional.softplus(normal(tokens, heads, seed=1) - 2)
    a = -(1 + 15 * torch.rand(heads, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    vectors = [normal(tokens, groups, size, seed=seed) for seed in (3, 4)]
    return [
        normal(tokens, heads, width),
        dt,
        a,
        *vectors,
        normal(heads, seed=5),
        normal(len(lengths), heads, width, size, seed=6),
    ]


SCANS = [
    ([1], 1, 1, 1, 1, ()),
    ([50], 4, 2, 5, 7, ()),
    ([3, 0, 70, 33], 6, 2, 16, 16, (1, 20, 72, 105)),
    ([0, 16], 2, 1, 20, 3, (15,)),
    ([100], 2, 2, 3, 17, (40, 63)),
]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), BF16])
@pytest.mark.parametrize("lengths, heads, groups, width, size, keep", SCANS)
def test_scan(lengths, heads, groups, width, size, keep, dtype, most):
    leaves = scan_leaves(lengths, heads, groups, width, size)

    def form(module, device):
        segments = Segments.of(lengths, device=device)
        return lambda x, dt, a, b, c, d, s: module.ssd(x, dt, a, b, c, d, segments, s, keep)

    with launch.trial("scan", SCAN):
        compare(form(kernels, DEVICE), form(reference, "cpu"), leaves, dtype, most, kept=(1, 2, 5, 6))


def test_scan_without_an_initial_state_and_with_the_tables_blocks():
    leaves = scan_leaves([130, 20], 2, 1, 8, 8)[:6]

    def form(module, device):
        segments = Segments.of([130, 20], device=device)
        return lambda *v: module.ssd(*v, segments)

    compare(form(kernels, DEVICE), form(vectorised, "cpu"), leaves, most=1e-4)


@pytest.mark.parametrize("softplus", [False, True])
def test_scan_of_one_token_each(softplus):
    x, dt, a, b, c, d, state = (v.float() for v in scan_leaves([1, 1, 1], 4, 2, 10, 6))
    bias, limit, slots = normal(4, seed=9).float(), (0.0, 0.4), torch.tensor([2, 0, 1])
    mine, true = state.to(DEVICE), state.double()
    row = [v.to(DEVICE) for v in (x, dt, a, b, c, d)]
    more = {"bias_H": bias.to(DEVICE), "limit": limit} if softplus else {}
    y = kernels.ssd_step(*row, mine, slots.to(DEVICE), **more)
    steps = reference.step_size(dt.double(), bias.double(), limit) if softplus else dt.double()
    expected = reference.ssd_step(x.double(), steps, a.double(), b.double(), c.double(), d.double(), true, slots)
    assert gap(y, expected) < 2e-5
    assert gap(mine, true) < 2e-5


LAYERS = {"odd": (6, 3, 5, 7, 4), "one": (1, 1, 1, 1, 1), "wide": (4, 2, 40, 16, 3), "whole": (4, 1, 20, 33, 2)}
"""heads, groups, width, state, taps"""


def layer_inputs(shape, count, dtype, biased=True):
    heads, groups, width, size, taps = LAYERS[shape]
    inner, channels = heads * width, heads * width + 2 * groups * size
    row = [normal(count, inner + channels + heads), normal(channels, taps, seed=1), normal(channels, seed=2)]
    row = [v.to(dtype) for v in row]
    row += [normal(heads, seed=3).float(), -normal(heads, seed=4).exp().float(), normal(heads, seed=5).float()]
    row.append((1 + normal(inner, seed=6)).to(dtype))
    tail, state = normal(9, max(taps - 1, 0), channels, seed=7).to(dtype), normal(9, heads, width, size, seed=8)
    return [v if biased or at != 2 else None for at, v in enumerate(row)], tail, state, (groups, 1e-5, (0.01, 2.0))


def layer(module, inputs, slots, place, kind=None, state_kind=torch.float32, **more):
    """Output, tails and states after one token."""
    row, tail, state, rest = inputs
    given = [None if v is None else v.to(place, kind or v.dtype) for v in row]
    given[0] = apart(given[0])
    tail = tail.to(place, kind or tail.dtype, copy=True).transpose(1, 2)
    state = state.to(place, kind or state_kind, copy=True)
    y = module.mamba_step(*given, tail, state, torch.tensor(slots, device=place), *rest, **more)
    return y, tail, state


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("programs", [1, 4, 1000])
@pytest.mark.parametrize(
    "shape, slots, biased",
    [("odd", [3, 0, 8, 5], True), ("one", [2], True), ("wide", [1, 7], False), ("whole", [4, 2, 0], True)],
)
def test_a_layer_between_its_projections_in_one_kernel(shape, slots, biased, programs, dtype, most):
    """However many programs share a group; a second token finds the counters at zero and the tails moved on."""
    inputs = layer_inputs(shape, len(slots), dtype, biased)
    with launch.trial("mamba_step", {"width": 8, "num_warps": 2, "programs": programs}):
        for _ in range(2):
            found = layer(kernels, inputs, slots, DEVICE)
            for module, kind in ((reference, torch.float64), (vectorised, torch.float64)):
                for mine, true in zip(found, layer(module, inputs, slots, "cpu", kind), strict=True):
                    assert gap(mine, true) < most if true.numel() else mine.shape == true.shape
            row, _, _, rest = inputs
            inputs = row, found[1].cpu().transpose(1, 2).contiguous(), found[2].cpu(), rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_over_a_float16_state_is_a_neighbour_of_the_exact_one(dtype):
    inputs, slots = layer_inputs("wide", 3, dtype), [5, 1, 2]
    inputs = *inputs[:2], inputs[2].half(), inputs[3]
    exact = layer(reference, inputs, slots, "cpu", torch.float64)[2][slots]
    seeds = torch.tensor([4096, 8192, 4096 * 77])
    found = [
        layer(kernels, inputs, slots, DEVICE, state_kind=torch.float16, seed=(seeds + more).to(DEVICE))
        for more in (0, 1)
    ]
    state, other = (v[2][slots].cpu().double() for v in found)
    step = torch.exp2(exact.abs().clamp(min=2**-14).log2().floor() - 10)
    assert ((state - exact).abs() <= step + 2e-6).all() and not state.equal(other)
    spread = (1 / 6 / exact.numel()) ** 0.5
    assert abs(((state - exact) / step).mean()) < 6 * spread, "up as often as down"
    with launch.trial("mamba_step", {"width": 16, "num_warps": 2, "programs": 1}):
        again = layer(kernels, inputs, slots, DEVICE, state_kind=torch.float16, seed=seeds.to(DEVICE))
    assert again[2].equal(found[0][2]), "how a group is shared does not change how a number is rounded"
    with pytest.raises(AssertionError, match="give a seed"):
        layer(kernels, inputs, slots, DEVICE, state_kind=torch.float16)


def test_a_layer_that_does_not_fit_one_kernel_takes_three(monkeypatch):
    from whimbrel.ops.triton import mamba

    inputs, slots = layer_inputs("odd", 3, torch.float32), [1, 0, 4]
    true = layer(reference, inputs, slots, "cpu", torch.float64)
    monkeypatch.setattr(mamba, "_layer", None)
    with pytest.raises(TypeError):
        layer(kernels, inputs, slots, DEVICE)
    monkeypatch.setattr(mamba, "WIDEST", 9)
    found = layer(kernels, inputs, slots, DEVICE)
    for mine, exact in zip(found, true, strict=True):
        assert gap(mine, exact) < 2e-5


def test_a_float16_state_is_rounded_up_and_down_in_proportion():
    """An update far below half a step of float16 is lost by rounding to the nearest, and kept on average here."""
    heads, size, old, add = 4, 64, 1.0, 1e-4  # float16 has steps of 9.8e-4 above 1
    state = torch.full((1, heads, 16, size), old, dtype=torch.float16, device=DEVICE)
    one = torch.ones(1, heads, 16, device=DEVICE)
    vector, still = torch.ones(1, 1, size, device=DEVICE), torch.zeros(heads, device=DEVICE)
    dt = torch.full((1, heads), add, device=DEVICE)
    for count in range(1, 5):
        seed = torch.tensor([count], device=DEVICE)
        kernels.ssd_step(
            one, dt, still, vector, vector, still, state, torch.zeros(1, dtype=torch.int64, device=DEVICE), seed=seed
        )
    assert set(state.double().unique().tolist()) <= {1 + k * 2**-10 for k in range(5)}
    mean, spread = state.double().mean().item() - old, (4 * add * 2**-10 / state.numel()) ** 0.5
    assert abs(mean - 4 * add) < 5 * spread


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("heads, kv_heads, width, lengths", [(1, 1, 16, [1]), (10, 2, 24, [5, 64, 131, 17])])
def test_paged_attention(heads, kv_heads, width, lengths, dtype, most):
    size, blocks = 16, 40
    q = normal(len(lengths), heads, width).to(dtype)
    k, v = (normal(blocks, size, kv_heads, width, seed=seed).to(dtype) for seed in (1, 2))
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(3))[: len(lengths) * 9].view(len(lengths), 9)
    true = reference.paged_attention(q.double(), k.double(), v.double(), table, lengths)
    with launch.trial("paged", {"split": 32, "tile": 16, "num_warps": 4, "num_stages": 2}):
        for counts in (lengths, torch.tensor(lengths, device=DEVICE)):
            row = [
                apart(q.flatten(1), heads * width).unflatten(1, (heads, width)).to(DEVICE),
                k.to(DEVICE),
                v.to(DEVICE),
            ]
            assert gap(kernels.paged_attention(*row, table.to(DEVICE), counts), true) < most


@pytest.mark.parametrize("lengths, past", [([1], [0]), ([5, 0, 40], [0, 0, 0]), ([3, 20], [30, 7])])
def test_attention_of_unlike_lengths(lengths, past):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cut, whole = (Segments.of(v) for v in (lengths, [n + p for n, p in zip(lengths, past, strict=True)]))
    leaves = [normal(cut.tokens, 4, 64), normal(whole.tokens, 2, 64, seed=1), normal(whole.tokens, 2, 64, seed=2)]
    mine = [Segments.of(v.lengths, device=DEVICE) for v in (cut, whole)]
    compare(
        lambda q, k, v: [kernels.attention(q, k, v, *mine)], lambda q, k, v: [reference.attention(q, k, v, cut, whole)],
        leaves, dtype, 2e-2 if DEVICE == "cuda" else 2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype, most", [F32, BF16])
@pytest.mark.parametrize("half", [3, 8])
def test_rotary(half, dtype, most):
    angles = normal(5, half, seed=1)
    rotation = [angles.cos().float(), angles.sin().float()]
    mine = [v.to(DEVICE) for v in rotation]
    compare(
        lambda x: [kernels.rotary(x, *mine)],
        lambda x: [reference.rotary(x, *rotation)],
        [normal(5, 3, 16)],
        dtype,
        most,
    )


@pytest.mark.parametrize("dtype, most", [F32, BF16])
def test_losses_over_the_vocabulary(dtype, most):
    rows, width, vocabulary = 9, 16, 5000
    leaves = [
        normal(rows, width),
        0.2 * normal(vocabulary, width, seed=1),
        normal(rows, 8, seed=2),
        0.3 * normal(vocabulary, 8, seed=3),
    ]
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(4))
    targets[::4] = -100
    mine = targets.to(DEVICE)
    compare(
        lambda h, w: [kernels.cross_entropy(h, w, mine, 4), kernels.log_prob(h, w, mine)],
        lambda h, w: [reference.cross_entropy(h, w, targets), reference.log_prob(h, w, targets)],
        leaves[:2], dtype, most,
    )  # fmt: skip

    def divergence(module):
        return lambda h, w, th, tw: [module.kl(h, w, th.detach(), tw.detach(), 4) + 0 * th.sum() + 0 * tw.sum()]

    compare(divergence(kernels), divergence(reference), leaves, dtype, most)


def test_what_the_kernels_do_not_take_runs_in_torchs_form():
    row = scan_leaves([20], 2, 1, 4, 4)[:6]
    got = kernels.ssd(*row, Segments.of([20]))
    expected = vectorised.ssd(*row, Segments.of([20]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert kernels.rms_norm(row[0], torch.ones(4, dtype=torch.float64), 1e-5).dtype == torch.float64


def test_the_form_is_chosen_in_one_place():
    x, weight = normal(3, 8).float(), torch.ones(8)
    with ops.using("triton"):
        assert type(ops.rms_norm(x.requires_grad_(), weight, 1e-5).grad_fn).__name__ == "_NormBackward"
    with ops.using("torch"):
        assert type(ops.rms_norm(x, weight, 1e-5).grad_fn).__name__ != "_NormBackward"
    on_gpu = ops.active("cuda")
    assert on_gpu["ssd"] == on_gpu["linear"] == "triton" and on_gpu["layer_norm_1p"] == "torch"
    assert set(on_gpu) == set(ops.OPERATIONS)


@pytest.mark.parametrize("shape", [(1, 16), (9, 48), (3, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_cast_to_fp8_as_torch_does(shape, dtype):
    from whimbrel.ops import fp8
    from whimbrel.ops.triton import quantise

    x = (normal(*shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)
    x[0, :] = 448 * 2.0**-9 if shape[0] > 1 else 0  # a power of two as it is; a row of zeros
    codes, scales = quantise.by_rows(apart(x).to(DEVICE))
    true = fp8.quantise(x, "row")
    assert torch.equal(scales.cpu(), true.scale) and torch.equal(codes.cpu().float(), true.codes.float())


@pytest.mark.parametrize("relu2", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (37, 130)])
def test_casts_to_fp8(shape, relu2):
    """E4M3 keeps four bits: half a step is 1/16 of the value, or of the smallest normal number, 2^-6 of the scale."""
    from whimbrel.ops.triton import quantise

    x = normal(*shape).float()
    true = x.relu().square() if relu2 else x
    codes, scales = quantise.by_blocks(apart(x).to(DEVICE), relu2)
    assert scales.stride(0) == 1 and codes.dtype == torch.float8_e4m3fn
    wide = scales.repeat_interleave(128, 1)[:, : shape[1]].cpu()
    assert ((codes.float().cpu() * wide - true).abs() <= (true.abs() / 16).maximum(wide * 2**-10)).all()
    peak = (
        scales.cpu()
        * 448
        / torch.nn.functional.pad(true.abs(), (0, -shape[1] % 128)).unflatten(1, (-1, 128)).amax(-1).clamp(min=1e-12)
    )
    assert gap(peak, torch.ones_like(peak)) < 1e-6
    scale = quantise.relu2_scale(x.to(DEVICE)) if relu2 else x.abs().max().to(DEVICE) / 448
    codes = quantise.by_tensor(x.to(DEVICE), scale, relu2).float().cpu()
    assert ((codes * scale.cpu() - true).abs() <= (true.abs() / 16).maximum(scale.cpu() * 2**-10)).all()
    assert codes.abs().max() == 448
