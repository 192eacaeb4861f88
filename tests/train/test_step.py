"""One step: exact normalisation over micro-batches, clipping, and the stop before harm is done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_run import TinyBatch, TinySource, pack, tiny_model

from whimbrel.model.language import LanguageModel
from whimbrel.ops import cpu
from whimbrel.ops.cpu import matmul
from whimbrel.parallel.recompute import recomputed
from whimbrel.train.objective import CrossEntropy, Term
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.step import NotFinite, accumulate, train_step


def documents(batch: TinyBatch) -> list[np.ndarray]:
    return np.split(batch.tokens_T, np.cumsum(batch.lengths)[:-1])


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


UNEVEN = [TinySource(3, documents=1).batch(0), TinySource(3, documents=9).batch(1), TinySource(3, documents=2).batch(2)]


def test_micro_batches_equal_one_large_batch() -> None:
    """Loss and gradient within 1e-6, with micro-batches of very different numbers of targets."""
    parts, whole = tiny_model(), tiny_model()
    one = pack([document for batch in UNEVEN for document in documents(batch)])
    loss, _ = accumulate(parts, CrossEntropy(), UNEVEN, learn=True)
    expected, _ = accumulate(whole, CrossEntropy(), [one], learn=True)
    assert loss == pytest.approx(expected, abs=1e-6)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-6, atol=1e-6)


def test_an_idle_batch_is_neither_counted_nor_learned() -> None:
    """It is computed because other ranks need help; loss and gradient are those without it."""
    helped, alone = tiny_model(), tiny_model()
    loss, _ = accumulate(helped, CrossEntropy(), UNEVEN, learn=True, idle=1)
    expected, _ = accumulate(alone, CrossEntropy(), UNEVEN[:2], learn=True)
    assert loss == pytest.approx(expected, abs=1e-6)
    for name, gradient in gradients(helped).items():
        torch.testing.assert_close(gradient, gradients(alone)[name], rtol=1e-6, atol=1e-6)


def test_a_mean_of_means_would_have_been_noticed() -> None:
    """The bug that the test above is for changes the loss here by a thousand times its tolerance."""
    model = tiny_model()
    loss, _ = accumulate(model, CrossEntropy(), UNEVEN, learn=False)
    means = [accumulate(model, CrossEntropy(), [batch], learn=False)[0] for batch in UNEVEN]
    assert abs(np.mean(means) - loss) > 1e-3


@dataclass(frozen=True)
class TwoTerms:
    """Cross-entropy, and the squared hidden states with a count and a weight of their own."""

    def counts(self, batch: TinyBatch) -> dict[str, int]:
        return CrossEntropy().counts(batch) | {"size": len(batch.lengths)}

    def __call__(self, model: LanguageModel, batch: TinyBatch) -> dict[str, Term]:
        size = model.embeddings(torch.from_numpy(batch.tokens_T)).square().sum()
        return CrossEntropy()(model, batch) | {"size": Term(size, len(batch.lengths), weight=0.25)}


def test_each_term_is_divided_by_its_own_count() -> None:
    model = tiny_model()
    loss, terms = accumulate(model, TwoTerms(), UNEVEN, learn=False)
    squares = sum(model.embeddings(torch.from_numpy(b.tokens_T)).square().sum().item() for b in UNEVEN)
    assert terms["size"] == pytest.approx(squares / 12, rel=1e-5)
    assert terms["loss"] == pytest.approx(accumulate(model, CrossEntropy(), UNEVEN, learn=False)[0], rel=1e-6)
    assert loss == pytest.approx(terms["loss"] + 0.25 * terms["size"], rel=1e-6)


def test_nothing_to_learn_is_no_division_by_zero() -> None:
    batch = TinyBatch(np.arange(5), np.full(5, -100), (5,))
    model = tiny_model()
    step = train_step(model, CrossEntropy(), [batch], adamw(model, OptimizerSettings()), clip=1.0)
    assert (step.loss, step.grad_norm) == (0.0, 0.0)


def test_validation_leaves_no_gradient() -> None:
    model = tiny_model()
    accumulate(model, CrossEntropy(), UNEVEN, learn=False)
    assert gradients(model) == {}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_clipping_bounds_the_norm(clip: float) -> None:
    model = tiny_model()
    accumulate(model, CrossEntropy(), UNEVEN, learn=True)
    norm = torch.cat([g.flatten() for g in gradients(model).values()]).norm().item()
    model.zero_grad(set_to_none=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    step = train_step(model, CrossEntropy(), UNEVEN, sgd, clip=clip)
    moved = torch.cat([(before[name] - p).flatten() for name, p in model.named_parameters()]).norm().item()
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    assert moved == pytest.approx(norm if clip != 0.05 else 0.05, rel=1e-4)


def test_a_step_makes_cached_states_void() -> None:
    model = tiny_model()
    version = model.weights_version
    train_step(model, CrossEntropy(), UNEVEN, adamw(model, OptimizerSettings()), clip=1.0)
    assert model.weights_version > version


@dataclass(frozen=True)
class InfiniteSlope:
    """A loss of 0 whose gradient is infinite: a square root at zero."""

    def counts(self, batch: TinyBatch) -> dict[str, int]:
        return {"root": 1}

    def __call__(self, model: LanguageModel, batch: TinyBatch) -> dict[str, Term]:
        return {"root": Term((model.norm_f.weight * 0).sum().sqrt(), 1)}


def test_a_loss_that_is_not_finite_stops_before_the_weights_move() -> None:
    model = tiny_model()
    optimizer = adamw(model, OptimizerSettings())
    train_step(model, CrossEntropy(), UNEVEN, optimizer, clip=1.0)
    with torch.no_grad():
        model.layers[1].mixer.o_proj.weight[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    with pytest.raises(NotFinite, match="'loss' of the loss is nan"):
        train_step(model, CrossEntropy(), UNEVEN, optimizer, clip=1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
        assert optimizer.state[parameter]["step"] == 1
    assert gradients(model) == {}


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    with pytest.raises(NotFinite, match=r"gradient of norm_f\.weight is not"):
        train_step(model, InfiniteSlope(), UNEVEN[:1], adamw(model, OptimizerSettings()), clip=1.0)


@pytest.mark.skipif(cpu.isa() in (None, "baseline"), reason="needs the native products")
def test_bfloat16_on_a_processor_rounds_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are near those in float32, not the same; and the same if layers are computed again."""
    monkeypatch.setattr(matmul, "LEAST", 1)
    exact, rounded, again = tiny_model(), tiny_model(), tiny_model()
    wanted, _ = accumulate(exact, CrossEntropy(), UNEVEN, learn=True)
    loss, _ = accumulate(rounded, CrossEntropy(), UNEVEN, "bfloat16", learn=True)
    with recomputed(again):
        assert accumulate(again, CrossEntropy(), UNEVEN, "bfloat16", learn=True)[0] == loss
    assert 0 < abs(loss - wanted) < 0.02 * wanted
    for name, gradient in gradients(rounded).items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, gradients(again)[name]), name
        away = (gradient - gradients(exact)[name]).norm() / gradients(exact)[name].norm()
        assert 0 < away < 0.05, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model = tiny_model().to("cuda")
    exact, _ = accumulate(model, CrossEntropy(), UNEVEN, learn=False)
    rounded, _ = accumulate(model, CrossEntropy(), UNEVEN, "bfloat16", learn=True)
    assert 0 < abs(rounded - exact) < 0.02 * exact
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}
