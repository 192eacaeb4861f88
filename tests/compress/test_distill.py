"""The objective: its gradient is student minus teacher, the teacher does not move, labels are the control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_nets import HYBRID, NETS, net, rows

from whimbrel.compress.distill import Distillation
from whimbrel.errors import UserError
from whimbrel.model.layout import Layout
from whimbrel.train.loop import TrainSettings, train
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.step import accumulate


class Rows:
    """A source of rows that repeats."""

    def __init__(self, count: int = 4) -> None:
        self.rows = rows(HYBRID, count)

    def batch(self, index: int):
        """The row of an index."""
        return self.rows[index % len(self.rows)]


def test_the_gradient_is_student_minus_teacher() -> None:
    teacher, student, (batch,) = net(HYBRID, 1), net(HYBRID, 2), rows(HYBRID, 1)
    term = Distillation(teacher)(student, batch)["kl"]
    term.sum.backward()
    layout, tokens_T = Layout.of(batch.lengths), torch.from_numpy(batch.tokens_T)
    learn = torch.from_numpy(batch.targets_T != -100)
    with torch.no_grad():
        hidden_RD = student(tokens_T, layout)[learn]
        p_RV, q_RV = (m.head(m(tokens_T, layout)).softmax(-1)[learn] for m in (teacher, student))
    kl = (p_RV * (p_RV.log() - q_RV.log())).sum()
    torch.testing.assert_close(term.sum.detach(), kl, rtol=1e-9, atol=0)
    torch.testing.assert_close(student.head.weight.grad, (q_RV - p_RV).T @ hidden_RD, rtol=1e-9, atol=1e-12)
    assert term.count == int(learn.sum()) < len(batch.tokens_T)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", NETS)
def test_a_student_like_its_teacher_has_nothing_to_learn(name: str) -> None:
    teacher, student, batch = net(NETS[name]), net(NETS[name]), rows(NETS[name], 1)[0]
    term = Distillation(teacher)(student, batch)["kl"]
    term.sum.backward()
    assert abs(term.sum.item()) < 1e-12
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-12


def test_labels_alone_are_plain_training() -> None:
    teacher, student, (batch,) = net(HYBRID, 1), net(HYBRID, 2), rows(HYBRID, 1)
    objective = Distillation(teacher, 1.0)
    teacher.layers[0].register_forward_hook(lambda *_: pytest.fail("the teacher is run for nothing"))
    terms, plain = objective(student, batch), CrossEntropy()(student, batch)["loss"]
    assert list(terms) == ["labels"] == list(objective.counts(batch))
    torch.testing.assert_close(terms["labels"].sum, plain.sum, rtol=1e-12, atol=0)
    assert (terms["labels"].weight, terms["labels"].count) == (1, plain.count)


def test_a_mix_is_the_weighted_sum() -> None:
    teacher, student, batches = net(HYBRID, 1), net(HYBRID, 2), rows(HYBRID, 3)
    losses = [accumulate(student, Distillation(teacher, w), batches, learn=False)[0] for w in (0.0, 0.3, 1.0)]
    assert losses[1] == pytest.approx(0.7 * losses[0] + 0.3 * losses[2])


def test_masked_places_count_nothing() -> None:
    teacher, student, (batch,) = net(HYBRID, 1), net(HYBRID, 2), rows(HYBRID, 1)
    odd = np.arange(len(batch.tokens_T)) % 2 == 1
    parts = [replace(batch, targets_T=np.where(mask, batch.targets_T, -100)) for mask in (odd, ~odd)]
    terms = [Distillation(teacher)(student, part)["kl"] for part in (batch, *parts)]
    assert terms[0].sum.item() == pytest.approx(terms[1].sum.item() + terms[2].sum.item())
    assert terms[0].count == terms[1].count + terms[2].count
    nothing = Distillation(teacher)(student, replace(batch, targets_T=np.full_like(batch.targets_T, -100)))["kl"]
    assert (nothing.sum.item(), nothing.count) == (0, 0)


def test_the_loop_moves_the_student_alone_and_knows_its_teacher(tmp_path: Path) -> None:
    teacher, student = net(HYBRID, 1, torch.float32), net(HYBRID, 2, torch.float32)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    settings = TrainSettings(steps=3, threads=1, validate_batches=2, tensorboard=False)
    figures = train(settings, Distillation(teacher), Rows(), Rows(), student, tmp_path, judge=CrossEntropy())
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    batches = [Rows().batch(0), Rows().batch(1)]
    assert figures["validation_loss"] == pytest.approx(accumulate(student, CrossEntropy(), batches, learn=False)[0])
    assert figures["kl"] == figures["loss"]
    again = net(HYBRID, 2, torch.float32)
    with pytest.raises(UserError, match="teacher_probe"):
        train(settings, Distillation(net(HYBRID, 3, torch.float32)), Rows(), None, again, tmp_path)
    with pytest.raises(UserError, match=r"labels.*0\.5"):
        train(settings, Distillation(teacher, 0.5), Rows(), None, again, tmp_path)


def test_another_vocabulary_is_refused() -> None:
    other = replace(HYBRID, vocab_size=41)
    with pytest.raises(UserError, match="the student knows 37 entries, the teacher 41; set student"):
        Distillation(net(other))(net(HYBRID), rows(HYBRID, 1)[0])
