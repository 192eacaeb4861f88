"""The native operations against float64, in every instruction set this processor has.

Float32: 2e-5 of the largest value; for the gradient of `a`, a sum over all tokens of differences, of the sum of what is
subtracted.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, gap, instruction_set

from whimbrel import ops
from whimbrel.ops import cpu, vectorised
from whimbrel.ops.cpu import library, matmul
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.mamba import of_parts

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")
LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) > 0)


def with_gradients(function, leaves, seed):
    """Outputs of a function and gradients of a fixed random sum of them."""
    outputs = [y for y in function(*leaves) if y.numel()]
    g = torch.Generator().manual_seed(seed)
    total = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in outputs)
    return outputs, torch.autograd.grad(total, leaves)


def compare(native, true, leaves, seed=0, scales={}):  # noqa: B006
    """Native in float32 against the vectorised form in float64, in every instruction set."""
    double = [v.float().double().requires_grad_() for v in leaves]
    expected, expected_gradients = with_gradients(true, double, seed)
    for isa in ISAS:
        single = [v.float().requires_grad_() for v in leaves]
        with instruction_set(isa):
            got, got_gradients = with_gradients(native, single, seed)
        for y, e in zip(got, expected, strict=True):
            assert gap(y, e) < 2e-5, isa
        for place, (y, e) in enumerate(zip(got_gradients, expected_gradients, strict=True)):
            assert gap(y, e, scales.get(place)) < 2e-5, (isa, place)


def size_of_decay_terms(leaves, segments, seed, keep=()):
    """[H] sum over tokens of dt_t times the sizes of what the gradient of a decay is a difference of.

    These are |dy_t| (|S_t C_t| + |D x_t|), and |dS| |S| at the end of the sequence and at the tokens of `keep`.
    """
    x, dt, a, b, c, d, *initial = (v.double() for v in leaves)
    y, final, kept = vectorised.ssd(x, dt, a, b, c, d * 0, segments, *initial or [None], keep)
    g = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=g).double()
    terms_TH = upstream.norm(dim=-1) * (y.norm(dim=-1) + d.abs() * x.norm(dim=-1))
    ends_SH = torch.randn(final.shape, generator=g).double().norm(dim=(2, 3)) * final.norm(dim=(2, 3))
    terms_TH += ends_SH[segments.sequence_T]
    if keep:
        cuts_KH = torch.randn(kept.shape, generator=g).double().norm(dim=(2, 3)) * kept.norm(dim=(2, 3))
        for token, cut_H in zip(keep, cuts_KH, strict=True):
            begin = int(segments.starts[segments.sequence_T[token]])
            terms_TH[begin : token + 1] += cut_H
    return (dt * terms_TH).sum(0)


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 70),
    size=st.integers(1, 70),
    continues=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_scan(lengths, shared, groups, width, size, continues, data, seed):
    g, tokens, heads = torch.Generator().manual_seed(seed), sum(lengths), shared * groups
    keep = tuple(data.draw(st.lists(st.integers(0, tokens - 1), max_size=3, unique=True)))
    row = [
        torch.randn(shape, generator=g)
        for shape in [(tokens, heads, width), (tokens, groups, size), (tokens, groups, size)]
    ]
    dt = torch.nn.functional.softplus(torch.randn(tokens, heads, generator=g) - 2)
    a, d = -(1 + 15 * torch.rand(heads, generator=g)), torch.randn(heads, generator=g)
    initial, segments = torch.randn(len(lengths), heads, width, size, generator=g), Segments.of(lengths)
    leaves = [row[0], dt, a, row[1], row[2], d] + [initial] * continues

    def run(form):
        return lambda *v: form.ssd(*v[:6], segments, v[6] if continues else None, keep)

    compare(run(cpu), run(vectorised), leaves, seed, {2: size_of_decay_terms(leaves, segments, seed, keep)})


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_gradients_of_a_scan_of_which_one_output_is_used(asked):
    """y, the last states, or states inside alone: what nobody asks for is 0, whatever was there before."""
    g, segments, keep = torch.Generator().manual_seed(1), Segments.of([300, 20, 0, 290, 33]), (10, 299, 319, 600)
    row = [torch.randn(643, 2, 8, generator=g), 0.1 * torch.rand(643, 2, generator=g), -torch.rand(2, generator=g)]
    leaves = [*row, *torch.randn(2, 643, 1, 8, generator=g), torch.ones(2), torch.randn(5, 2, 8, 8, generator=g)]

    def run(form):
        return lambda *v: (form.ssd(*v[:6], segments, v[6], keep)[asked], torch.stack([x.sum() for x in v]))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one after the other, in the same scratch
    try:
        compare(run(cpu), run(vectorised), leaves, 0, {2: size_of_decay_terms(leaves, segments, 0, keep)})
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    channels=st.integers(1, 150),
    width=st.integers(1, 5),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution(lengths, channels, width, biased, seed):
    g, segments = torch.Generator().manual_seed(seed), Segments.of(lengths)
    shapes = [(sum(lengths), channels), (channels, width), (len(lengths), channels, width - 1), (channels,)]
    leaves = [torch.randn(shape, generator=g) for shape in shapes][: 4 if biased else 3]
    if width == 1:
        del leaves[2]

    def run(form):
        def call(x, weight, *rest):
            rest = list(rest)
            initial = rest.pop(0) if width > 1 else None
            return form.conv(x, weight, rest[0] if biased else None, segments, initial)

        return call

    compare(run(cpu), run(vectorised), leaves, seed)


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 40),
    size=st.integers(1, 40),
    taps=st.integers(1, 5),
    biased=st.booleans(),
    limited=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_layer_is_its_parts(lengths, shared, groups, width, size, taps, biased, limited, seed):
    """Outputs and gradients are those of the parts, bit for bit.

    The parts are held to float64 by the other tests here.
    """
    g, segments, heads = torch.Generator().manual_seed(seed), Segments.of(lengths), shared * groups
    inner, channels = heads * width, heads * width + 2 * groups * size
    leaves = {
        "z": torch.randn(sum(lengths), inner + channels + heads, generator=g),
        "conv": torch.randn(channels, taps, generator=g),
        "conv_bias": torch.randn(channels, generator=g) if biased else None,
        "dt_bias": torch.randn(heads, generator=g) - 2,
        "a": -(1 + 15 * torch.rand(heads, generator=g)),
        "d": torch.randn(heads, generator=g),
        "norm": torch.randn(inner, generator=g),
    }
    more = (segments, groups, 1e-5, (0.05, 0.3) if limited else (0.0, float("inf")))
    parts = of_parts(vectorised.step_size, cpu.conv, cpu.ssd, cpu.gated_norm)
    up = torch.randn(sum(lengths), inner, generator=g)

    def learned(form):
        row = [None if v is None else v.clone().requires_grad_() for v in leaves.values()]
        inside = torch.nn.functional.pad(row[0], (1, 3))[:, 1:-3]  # of wider rows than its gradient
        y = form(inside, *row[1:], *more)
        y.backward(up)
        return y.detach(), {name: v.grad for name, v in zip(leaves, row, strict=True) if v is not None}

    for isa in ISAS:
        with instruction_set(isa):
            (y, gradients), (expected, expected_gradients) = learned(cpu.mamba_layer), learned(parts)
            with torch.no_grad():
                assert torch.equal(cpu.mamba_layer(*leaves.values(), *more), y), isa
        assert torch.equal(y, expected), isa
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected_gradients[name]), (isa, name)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), groups=st.integers(1, 4), width=st.integers(2, 70), seed=st.integers(0, 99))
def test_gated_norm(tokens, groups, width, seed):
    g = torch.Generator().manual_seed(seed)
    leaves = [3 * torch.randn(tokens, groups * width, generator=g) for _ in range(2)] + [
        torch.randn(groups * width, generator=g)
    ]
    compare(
        lambda *v: [cpu.gated_norm(*v, groups, 1e-5)],
        lambda *v: [vectorised.gated_norm(*v, groups, 1e-5)],
        leaves,
        seed,
    )


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_rms_norm_and_squared_relu(tokens, width, seed):
    g = torch.Generator().manual_seed(seed)
    leaves = [3 * torch.randn(tokens, width, generator=g), torch.randn(width, generator=g)]
    for native, true, inputs in (
        (cpu.rms_norm, vectorised.rms_norm, leaves),
        (lambda x, _, __: cpu.relu2(x), lambda x, _, __: vectorised.relu2(x), leaves[:1]),
    ):
        compare(
            lambda *v, f=native: [f(v[0], v[-1], 1e-5)],
            lambda *v, f=true: [f(v[0], v[-1], 1e-5)],
            inputs,
            seed,
        )


def test_a_norm_of_heads_keeps_their_shape():
    x, weight = torch.randn(5, 3, 8), torch.randn(8)
    assert (
        gap(cpu.rms_norm(x.transpose(0, 1), weight, 1e-5), vectorised.rms_norm(x.transpose(0, 1), weight, 1e-5)) < 2e-5
    )


def scan_of_slices(tokens=200, heads=4, width=16, groups=2, size=16):
    """x, B and C as slices of one wide row, as the model hands them over."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(tokens, heads * width + 2 * groups * size, generator=g)
    x, b, c = wide.split([heads * width, groups * size, groups * size], dim=1)
    shapes = (heads, width), (groups, size), (groups, size)
    x, b, c = (v.unflatten(1, shape) for v, shape in zip((x, b, c), shapes, strict=True))
    return [x, torch.rand(tokens, heads, generator=g), -torch.rand(heads, generator=g), b, c, torch.ones(heads)]


def test_slices_of_wider_rows_are_read_in_place_and_runs_are_equal_bit_for_bit():
    row, segments = scan_of_slices(), Segments.of([150, 50])
    first = cpu.ssd(*row, segments)
    again = cpu.ssd(*row, segments)
    dense = cpu.ssd(*(v.contiguous() for v in row), segments)
    assert all(torch.equal(y, z) for y, z in zip(first, again, strict=True))
    assert all(torch.equal(y, z) for y, z in zip(first, dense, strict=True))


def test_number_of_threads_changes_no_bit():
    row, segments, before = scan_of_slices(), Segments.of([150, 50]), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [v.detach().clone().requires_grad_() for v in row]
            results.append(torch.autograd.grad(cpu.ssd(*leaves, segments)[0].square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, z) for y, z in zip(*results, strict=True))


def test_a_long_sequence_keeps_the_gradient_of_its_steps():
    g = torch.Generator().manual_seed(1)
    row = [torch.randn(6000, 2, 8, generator=g), 0.3 * torch.rand(6000, 2, generator=g), -torch.tensor([0.01, 12.0])]
    row += [torch.randn(6000, 1, 8, generator=g), torch.randn(6000, 1, 8, generator=g), torch.tensor([30.0, 1.0])]
    segments = Segments.of([6000])
    compare(
        lambda *v: cpu.ssd(*v, segments)[:2],
        lambda *v: vectorised.ssd(*v, segments)[:2],
        row,
        scales={2: size_of_decay_terms(row, segments, 0)},
    )


def test_states_between_pieces_are_kept_beside_empty_sequences():
    row, segments = scan_of_slices(tokens=300), Segments.of([0, 300, 0, 0])  # three pieces, fewer than sequences
    compare(lambda *v: cpu.ssd(*v, segments)[:1], lambda *v: vectorised.ssd(*v, segments)[:1], row)


def test_other_dtypes_and_a_missing_library_are_left_to_torch(monkeypatch):
    row, segments = scan_of_slices(), Segments.of([200])
    double = [v.double() for v in row]
    assert torch.equal(cpu.ssd(*double, segments)[0], vectorised.ssd(*double, segments)[0])
    monkeypatch.setattr(library, "load", lambda: (None, "it was not built"))
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    assert ops.active()["ssd"] == "torch" and cpu.isa() is None
    assert torch.equal(ops.ssd(*row, segments)[0], vectorised.ssd(*row, segments)[0])


def shapes(*depths):
    """What `operands` takes, to be drawn."""
    return {
        "rows": st.integers(1, 90),
        "columns": st.one_of(st.integers(1, 90), st.integers(1140, 1170)),
        "depth": st.one_of(st.integers(1, 90), *depths),
        "turned": st.tuples(st.booleans(), st.booleans()),
        "seed": st.integers(0, 99),
    }


def operands(rows, columns, depth, turned, seed):
    """a and b, by rows or turned, and c to be added to; rows of a and c lie apart."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, depth + 3, generator=g)[:, :depth], torch.randn(depth, columns, generator=g)
    a, b = (v.t().contiguous().t() if turn else v for v, turn in zip((a, b), turned, strict=True))
    c = torch.randn(rows, columns + 3, generator=g)[:, :columns]
    return a, b, c


@settings(max_examples=25, deadline=None)
@given(**shapes(st.integers(380, 1200), st.integers(2040, 2100)))
def test_products(rows, columns, depth, turned, seed):
    a, b, c = operands(rows, columns, depth, turned, seed)
    for isa in ISAS:
        with instruction_set(isa):
            added = matmul.product(a, b, c.clone(), add=True)
            assert gap(added, c.double() + a.double() @ b.double()) < 2e-5, isa
            again = matmul.product(a[rows // 2 :], b, torch.empty(rows - rows // 2, columns))
            assert torch.equal(again, matmul.product(a, b, torch.empty(rows, columns))[rows // 2 :]), isa
            for levels in (1, 2):
                wide = torch.full((rows, columns + 3), 7.0)
                fast = matmul.product(a, b, wide[:, :columns].copy_(c), add=True, levels=levels)
                assert gap(fast, c.double() + a.double() @ b.double()) < 2e-5, (isa, levels)
                assert (wide[:, columns:] == 7).all(), (isa, levels)


@settings(max_examples=25, deadline=None)
@given(**shapes(st.integers(1000, 1100), st.integers(4080, 4200)))
def test_products_of_rounded_numbers(rows, columns, depth, turned, seed):
    """Whether the processor has them or not: those of the operands rounded to bfloat16."""
    a, b, c = operands(rows, columns, depth, turned, seed)
    true = a.bfloat16().double() @ b.bfloat16().double()
    for isa in ISAS:
        with instruction_set(isa), ops.rounding(True):
            wide = torch.full((rows, columns + 3), 7.0)
            added = matmul.product(a, b, wide[:, :columns].copy_(c), add=True)
            assert gap(added, c.double() + true) < 2e-5, isa
            assert (wide[:, columns:] == 7).all(), isa
            again = matmul.product(a[rows // 2 :], b, torch.empty(rows - rows // 2, columns))
            assert torch.equal(again, matmul.product(a, b, torch.empty(rows, columns))[rows // 2 :]), isa
            squares = matmul.product(a, b, torch.empty(rows, columns), squares=True)
            assert gap(squares, true.relu() ** 2) < 2e-5, isa


def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one():
    """Bit for bit as torch rounds, and what is no number or infinite stays so."""
    bits = torch.randint(-(2**31), 2**31 - 1, (3000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    bits[:1000] = bits[:1000] & ~0xFFFF | 0x8000  # half way
    x = bits.view(torch.float32)
    x = torch.cat(
        [x[(x.abs() >= torch.finfo(x.dtype).smallest_normal) | x.isnan()], torch.tensor([0.0, torch.inf, -torch.inf])]
    )
    for isa in ISAS:
        with instruction_set(isa), ops.rounding(True):
            for a in (x[:, None], x[None].t()):
                found = matmul.product(a, torch.ones(1, 1), torch.empty(len(x), 1))[:, 0]
                assert found.isnan().sum() == x.isnan().sum() > 0
                assert torch.equal(found.nan_to_num(9.0), x.bfloat16().float().nan_to_num(9.0)), isa


def test_rounded_projections_keep_float32_and_round_in_both_passes(monkeypatch):
    if cpu.isa() == "baseline":
        pytest.skip("products of the baseline are torch's")
    monkeypatch.setattr(matmul, "LEAST", 1)
    g = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=g) for shape in ((50, 33), (70, 33), (50, 70)))
    leaves = [v.clone().requires_grad_() for v in (x, weight)]
    with ops.rounding(True):
        y = cpu.linear(*leaves)
        y.backward(dy)
    x, weight, dy = (v.bfloat16().double() for v in (x, weight, dy))
    for found, true in zip(
        (y, *(leaf.grad for leaf in leaves)), (x @ weight.t(), dy @ weight, dy.t() @ x), strict=True
    ):
        assert found.dtype == torch.float32 and gap(found, true) < 2e-5
    with ops.rounding(False):
        assert gap(cpu.linear(*leaves), leaves[0].double() @ leaves[1].double().t()) < 2e-5


@pytest.mark.parametrize("turned", [False, True])
def test_products_in_several_pieces(turned):
    """More rows than are laid out at once, more depth than stays in a cache: the bits are those of fewer rows."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2100, 2100, generator=g), torch.randn(2100, 1170, generator=g)
    a, many, b = a.t().contiguous().t() if turned else a, b, b[:, :50]
    for isa in ISAS:
        with instruction_set(isa):
            whole = matmul.product(a, b, torch.empty(2100, 50))
            assert gap(whole, a.double() @ b.double()) < 2e-5, isa
            assert torch.equal(matmul.product(a[1700:], b, torch.empty(400, 50)), whole[1700:]), isa
            more = matmul.product(a[1700:], many, torch.empty(400, 1170))
            assert torch.equal(more[:, :32], whole[1700:, :32]), isa  # wherever the rows of a were read
            for levels in (1, 2):
                fast = matmul.product(a, b, torch.empty(2100, 50), levels=levels)
                assert gap(fast, a.double() @ b.double()) < 4e-5, (isa, levels)


def test_prompts_alone_take_fewer_multiplications(monkeypatch):
    """And only with gradients off, though parameters ask for them; a small size here stands for a large one."""
    if cpu.isa() == "baseline":
        pytest.skip("products of the baseline are torch's")
    asked, project = [], matmul.project
    monkeypatch.setattr(matmul, "project", lambda *v: asked.append(v[3]) or project(*v))
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(matmul, "FAST", ((40, 20, 60), (20, 20, 20)))
    x, weight, bias = torch.randn(50, 24), torch.randn(64, 24).requires_grad_(), torch.randn(64)
    true = x.double() @ weight.detach().double().t() + bias
    for rows in (50, 30, 18):
        with torch.no_grad(), ops.reading_prompts():
            assert gap(cpu.linear(x[:rows], weight, bias), true[:rows]) < 2e-5
        with torch.no_grad():
            cpu.linear(x[:rows], weight, bias)
        with ops.reading_prompts():
            assert cpu.linear(x[:rows], weight, bias).requires_grad
    assert asked == [2, 0, 0, 1, 0, 0, 0, 0, 0]


def test_large_projections_are_native_and_keep_their_gradients(monkeypatch):
    monkeypatch.setattr(matmul, "LEAST", 1)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g) for shape in ((50, 33), (70, 33), (70,))]
    compare(lambda *v: [cpu.linear(*v)], lambda *v: [vectorised.linear(*v)], leaves)
    x, weight, _ = (v.requires_grad_() for v in leaves)
    name = "NativeLinearBackward" if cpu.isa() != "baseline" else "MmBackward0"
    assert cpu.linear(x, weight).grad_fn.name() == name
    assert cpu.linear(x[:, ::3], weight[:, ::3]).sum().backward() is None  # numbers that lie apart


@pytest.mark.parametrize("depth", [33, 1100])
def test_projections_that_are_squared_keep_only_the_squares(depth, monkeypatch):
    monkeypatch.setattr(matmul, "LEAST", 1)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, depth, generator=g) / depth**0.5 for shape in (50, 70)]
    compare(lambda *v: [ops.linear_relu2(*v)], lambda *v: [vectorised.relu2(vectorised.linear(*v))], leaves)
    if cpu.isa() == "baseline":
        return
    x, weight = (v.requires_grad_() for v in leaves)
    apart = vectorised.relu2(cpu.linear(x, weight))
    found = [torch.autograd.grad(y, (x, weight), torch.ones_like(y)) for y in (cpu.linear_relu2(x, weight), apart)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))  # the root of a square is what was squared
    true = vectorised.relu2(vectorised.linear(*(v.detach().double() for v in leaves)))
    for levels in (0, 1, 2):
        assert gap(matmul.project(x.detach(), weight.detach(), None, levels, squares=True), true) < 2e-5, levels


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 20),
    vocabulary=st.integers(2, 70),
    chunk=st.integers(1, 50),
    alike=st.booleans(),
    loss=st.sampled_from(["cross_entropy", "log_prob", "kl"]),
    seed=st.integers(0, 99),
)
def test_losses_of_the_head(tokens, width, vocabulary, chunk, alike, loss, seed):
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(tokens, width, generator=g), 3 * torch.randn(vocabulary, width, generator=g)]
    targets = torch.randint(-1, vocabulary, (tokens,), generator=g)
    targets[targets < 0] = -100
    teacher = [torch.randn(tokens, 7, generator=g), torch.randn(vocabulary, 7, generator=g)]
    judge = teacher if loss == "kl" else [targets]

    def run(form):  # rows that weigh alike, and rows that do not, take different ways back
        def call(hidden, weight):
            loss_T = getattr(form, loss)(hidden, weight, *judge, chunk)
            return [loss_T.sum() * 0.3 if alike else loss_T]

        return call

    compare(run(cpu), run(vectorised), leaves, seed)
    with torch.no_grad():
        assert gap(*(getattr(form, loss)(*leaves, *judge, chunk) for form in (cpu, vectorised))) < 2e-5


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient():
    for isa in ISAS:
        hidden, weight = torch.randn(9, 12, requires_grad=True), torch.randn(70, 12, requires_grad=True)
        with instruction_set(isa):
            loss = cpu.kl(hidden, weight, hidden, weight, 4)
            loss.sum().backward()
        assert loss.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6, isa


def test_a_divergence_of_a_shifted_teacher_keeps_its_digits():
    """Logits that all lie 50 higher say the same; a small difference must not drown in that."""
    student, teacher = torch.randn(5, 300), torch.eye(300)
    student_VD = torch.randn(300, 300).mul_(1e-3) + torch.eye(300)
    shifted = student + 50
    for isa in ISAS:
        with instruction_set(isa):
            found = cpu.kl(student, student_VD, shifted, teacher)
        truth = vectorised.kl(student.double(), student_VD.double(), shifted.double(), teacher.double())
        assert (found - truth).abs().max() < 2e-6, isa


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("loss_of", ["cross_entropy", "log_prob"])
def test_losses_compute_no_gradient_that_nobody_wants(loss_of, frozen, alike):
    def learned(form):
        g = torch.Generator().manual_seed(3)
        leaves = {"hidden": torch.randn(50, 12, generator=g), "weight": torch.randn(70, 12, generator=g)}
        targets = torch.randint(0, 70, (50,), generator=g)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        loss = getattr(form, loss_of)(*leaves.values(), targets, 16)
        (loss.sum() if alike else loss @ torch.arange(50.0)).backward()
        return leaves

    ours, theirs = learned(cpu), learned(vectorised)
    assert ours[frozen].grad is None
    (name,) = {"hidden", "weight"} - {frozen}
    assert gap(ours[name].grad, theirs[name].grad) < 2e-5


@pytest.mark.parametrize("place", [1, 2])
def test_a_decay_that_is_no_number_is_not_lost(place):
    """In dt from its token on, in a everywhere, and its gradient; other heads, chunks and sequences do not see it."""
    segments, g = Segments.of([300, 9]), torch.Generator().manual_seed(0)
    row = [torch.randn(309, 2, 8, generator=g), torch.rand(309, 2, generator=g), -torch.rand(2, generator=g),
           *torch.randn(2, 309, 2, 8, generator=g), torch.ones(2)]  # fmt: skip
    row[place][..., 1][(slice(40, 41) if place == 1 else ...)] = float("nan")
    begin, end = (40, 300) if place == 1 else (0, 309)
    for isa in ISAS:
        leaves = [v.clone().requires_grad_() for v in row]
        with instruction_set(isa):
            y, final, _ = cpu.ssd(*leaves, segments)
            (y.sum() + final.sum()).backward()
        assert y[begin:end, 1].isnan().all() and final[0, 1].isnan().all(), isa
        assert not y[:, 0].isnan().any() and not y[: begin // 32 * 32].isnan().any() and not y[end:].isnan().any(), isa
        assert leaves[2].grad.isnan().tolist() == [False, True], isa


def test_logits_that_are_large_or_infinite_keep_their_loss():
    hidden, targets = torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([0, 1, 2])
    weight = torch.tensor([[3000.0], [-3000.0], [2999.0]])
    assert cpu.cross_entropy(hidden, weight, targets).tolist() == pytest.approx(
        vectorised.cross_entropy(hidden.double(), weight.double(), targets).tolist(), rel=1e-6
    )
    for isa in ISAS:
        spoilt = torch.randn(40, 1)
        spoilt[7] = float("nan")  # one logit of each row
        with instruction_set(isa):
            assert cpu.cross_entropy(hidden, spoilt, targets).isnan().all(), isa
            assert cpu.kl(hidden, spoilt, hidden, torch.randn(40, 1)).isnan().all(), isa
            assert cpu.kl(hidden, torch.randn(40, 1), hidden, spoilt).isnan().all(), isa
    assert not torch.isfinite(cpu.cross_entropy(hidden, weight * float("inf"), targets)).any()
