"""Head losses, norms and activations against their definitions."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel import ops
from whimbrel.ops import reference, vectorised


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), chunk=st.integers(1, 13), seed=st.integers(0, 9))
def test_cross_entropy_in_chunks_equals_all_at_once(rows, chunk, seed):
    hidden, weight = normal(rows, 5, seed=seed).requires_grad_(), normal(11, 5, seed=1).requires_grad_()
    targets = torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[::3] = -100
    up = normal(rows, seed=2)
    results = []
    for form in (reference, vectorised):
        loss = form.cross_entropy(hidden, weight, targets, chunk)
        results.append((loss, *torch.autograd.grad((loss * up).sum(), (hidden, weight))))
    assert (results[1][0][::3] == 0).all()
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        vectorised.log_prob(hidden, weight, targets, chunk), -results[0][0], rtol=1e-11, atol=1e-11
    )


def test_cross_entropy_and_kl_pass_gradcheck():
    hidden, weight = normal(6, 4).requires_grad_(), normal(7, 4, seed=1).requires_grad_()
    targets = torch.tensor([0, 6, -100, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h, w: vectorised.cross_entropy(h, w, targets, 4), (hidden, weight))
    teacher = normal(6, 3, seed=2), normal(7, 3, seed=3)
    assert torch.autograd.gradcheck(lambda h, w: vectorised.kl(h, w, *teacher, 4), (hidden, weight))


def test_kl_is_teacher_to_student_and_leaves_the_teacher_alone():
    hidden, weight, teacher, teacher_weight = (
        normal(5, 4),
        normal(7, 4, seed=1),
        normal(5, 3, seed=2),
        normal(7, 3, seed=3),
    )
    teacher.requires_grad_()
    hidden.requires_grad_()
    got = vectorised.kl(hidden, weight, teacher, teacher_weight, 2)
    torch.testing.assert_close(got, reference.kl(hidden, weight, teacher, teacher_weight), rtol=1e-11, atol=1e-11)
    p, q = torch.softmax(teacher @ teacher_weight.T, -1), torch.softmax(hidden @ weight.T, -1)
    torch.testing.assert_close(got, (p * (p / q).log()).sum(-1), rtol=1e-11, atol=1e-11)
    got.sum().backward()
    assert teacher.grad is None and hidden.grad.abs().sum() > 0


def test_logits_of_a_whole_batch_are_never_held():
    hidden, weight = (
        normal(64, 4, dtype=torch.float32).requires_grad_(),
        normal(500, 4, seed=1, dtype=torch.float32).requires_grad_(),
    )
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        vectorised.cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64), 8)
    assert max(held) < 64 * 500


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_norm_gates_first_and_norms_inside_a_group(groups):
    y, gate, weight = normal(5, 16), normal(5, 16, seed=1), normal(16, seed=2)
    expected = reference.gated_norm(y, gate, weight, groups, 1e-5)
    torch.testing.assert_close(vectorised.gated_norm(y, gate, weight, groups, 1e-5), expected, rtol=1e-12, atol=1e-12)
    if groups > 1:
        scaled = torch.cat([y[:, :4] * 100, y[:, 4:]], dim=1)
        again = vectorised.gated_norm(scaled, gate, weight, groups, 1e-5)
        assert torch.equal(
            again[:, 16 // groups :], vectorised.gated_norm(y, gate, weight, groups, 1e-5)[:, 16 // groups :]
        )
    late = reference.rms_norm(y.unflatten(1, (groups, -1)), torch.ones(16 // groups), 1e-5).flatten(
        1
    ) * torch.nn.functional.silu(gate)
    assert (expected - late * weight).abs().max() > 0.1


def test_pointwise_operations_and_their_gradients():
    x, y, weight, bias = normal(6, 8), normal(6, 8, seed=1), normal(8, seed=2), normal(8, seed=3)
    cases = {
        "rms_norm": (x, weight, 1e-5),
        "layer_norm_1p": (x, weight, bias, 1e-5),
        "relu2": (x,),
        "swiglu": (x, y),
        "step_size": (x, weight, (0.2, 1.0)),
        "gated_norm": (x, y, weight, 2, 1e-5),
    }
    for name, arguments in cases.items():
        got = getattr(vectorised, name)(*arguments)
        torch.testing.assert_close(got, getattr(reference, name)(*arguments), rtol=1e-12, atol=1e-12, msg=name)
        leaves = [v.clone().requires_grad_() for v in arguments if isinstance(v, torch.Tensor)]
        rest = [v for v in arguments if not isinstance(v, torch.Tensor)]
        operation = partial(_with_settings, getattr(vectorised, name), rest)
        assert torch.autograd.gradcheck(operation, leaves), name


def _with_settings(operation, rest, *tensors):
    return operation(*tensors, *rest)


def test_norms_compute_in_float32_and_return_what_came():
    x = (normal(4, 8) * 300).bfloat16()
    for got in (
        vectorised.rms_norm(x, torch.ones(8).bfloat16(), 1e-5),
        vectorised.gated_norm(x, x, torch.ones(8).bfloat16(), 2, 1e-5),
    ):
        assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()


def test_the_dispatcher_runs_the_form_asked_for():
    usual = ops.active()
    assert usual["step_size"] == "torch" and usual["ssd"] in ("cpu", "torch")
    for form in ("reference", "torch"):
        with ops.using(form):
            assert set(ops.active().values()) == {form}
    assert ops.active() == usual
    with pytest.raises(ValueError, match="torch"), ops.using("quick"):
        pass
