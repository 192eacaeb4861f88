"""What training takes: the dry run against what is really kept, and what recomputation saves."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_run import CONFIG, TinySource, tiny_model

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.parallel.recompute import recomputed
from whimbrel.train import memory
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.step import accumulate

LENGTHS = (700, 1, 1300, 47)


class HeapFigures(ctypes.Structure):
    """glibc's `struct mallinfo2`: ten counters; `uordblks` and `hblkhd` are the bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split(" ")  # noqa: SIM905
    ]


def live_bytes() -> int:
    """Bytes of the heap in use in this process."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapFigures
    figures = mallinfo2()
    return int(figures.uordblks + figures.hblkhd)


def kept_bytes(model: LanguageModel, recompute: bool) -> int:
    """Bytes that the forward of all layers leaves behind for the backward."""
    tokens_T = torch.arange(sum(LENGTHS)) % CONFIG.vocab_size
    with recomputed(model, recompute), ops.using("torch"):
        warm = model(tokens_T, Layout.of(LENGTHS))
        del warm
        layout = Layout.of(LENGTHS)
        before = live_bytes()
        hidden_TD = model(tokens_T, layout)
        kept = live_bytes() - before
    assert hidden_TD.requires_grad
    return kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts the heap of glibc")
def test_the_dry_run_finds_what_is_kept() -> None:
    kept = kept_bytes(tiny_model(), recompute=False)
    planned = memory.activation_bytes(CONFIG, LENGTHS, torch.float32, recompute=False)
    assert kept == pytest.approx(planned, rel=0.05)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts the heap of glibc")
def test_recomputation_keeps_little_more_than_the_input_of_each_layer() -> None:
    rows = sum(LENGTHS) * CONFIG.hidden_size * 4
    kept = kept_bytes(tiny_model(), recompute=True)
    assert kept < 1.2 * rows * (CONFIG.layers + 3)
    assert kept < 0.25 * kept_bytes(tiny_model(), recompute=False)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, mlp="swiglu", qk_norm=True, rope_theta=1e4)])
def test_recomputation_changes_no_bit(config: Any) -> None:
    outcomes = []
    for recompute in (False, True):
        model = LanguageModel(config).initialise(1)
        with recomputed(model, recompute):
            loss, _ = accumulate(model, CrossEntropy(), [TinySource(4).batch(0)], learn=True)
        outcomes.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (again, others) = outcomes
    assert loss == again
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, others[name]), name


def test_recomputation_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    names = list(model.state_dict())
    with recomputed(model):
        assert list(model.state_dict()) == names
        assert "forward" in vars(model.layers[0])
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_weights_gradients_and_moments_are_counted() -> None:
    model = tiny_model()
    parts = memory.training_bytes(model, LENGTHS, "float32", recompute=False)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert (parts["weights"], parts["gradients"], parts["moments"]) == (weights, weights, 2 * weights)
    half = memory.training_bytes(model, LENGTHS, "bfloat16", recompute=False)
    assert 0.4 < half["activations"] / parts["activations"] < 0.9


def test_what_cannot_fit_is_refused_and_what_may_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda device: 2**30)
    events: list[dict[str, Any]] = []
    parts = {"weights": 2**28, "gradients": 2**28, "moments": 2**29, "activations": 0}
    memory.check_memory(parts, torch.device("cpu"), events.append)
    memory.check_memory(parts | {"activations": 1}, torch.device("cpu"), events.append)
    assert [event["event"] for event in events] == ["log", "warning"]
    assert "1.00 GiB" in events[0]["text"] and "train.recompute=true" in events[1]["text"]
    with pytest.raises(UserError, match="set model to a smaller one"):
        memory.check_memory(parts | {"weights": 2**28 + 1}, torch.device("cpu"), events.append)


def test_the_machine_has_more_memory_than_this_process_used() -> None:
    device = torch.device("cpu")
    assert 10**7 < memory.peak_memory(device) < memory.machine_memory(device)
