"""Run: pytest tests/ops/test_inference_then_training.py. Training does not trip over what inference left behind."""

from __future__ import annotations

import torch

from whimbrel.model.language import LanguageModel
from whimbrel.model.presets import preset


def test_training_after_inference_mode_at_the_same_length() -> None:
    model = LanguageModel(preset("hybrid-tiny")).initialise(0)
    tokens_BL = torch.arange(37)[None]
    with torch.inference_mode():
        before = model(tokens_BL)
    after = model(tokens_BL)
    after.sum().backward()
    assert torch.equal(before, after)
    assert all(parameter.grad is not None for parameter in model.parameters())
