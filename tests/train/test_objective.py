"""Cross-entropy against the definition: each document alone, log-softmax over whole logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import VOCABULARY, TinySource, pack, tiny_model
from torch import Tensor

from whimbrel.errors import UserError
from whimbrel.train.objective import CrossEntropy


def test_the_loss_is_that_of_each_document_alone() -> None:
    """Catches targets shifted twice or not at all, documents that see each other, and a mean where a sum belongs."""
    batch, model = TinySource(3, documents=4).batch(0), tiny_model()
    expected, count = 0.0, 0
    for document in np.split(batch.tokens_T, np.cumsum(batch.lengths)[:-1]):
        tokens_L = torch.from_numpy(document)
        logp_LV = model(tokens_L[None])[0].double().log_softmax(-1)
        expected -= logp_LV[:-1].gather(1, tokens_L[1:, None]).sum().item()
        count += len(document) - 1
    term = CrossEntropy()(model, batch)["loss"]
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.count == count == CrossEntropy().counts(batch)["loss"]
    assert term.sum.dtype == torch.float32


def test_masked_targets_count_nothing() -> None:
    batch, model = TinySource(3).batch(0), tiny_model()
    masked = replace(batch, targets_T=np.where(np.arange(len(batch.tokens_T)) % 2, batch.targets_T, -100))
    term, whole = CrossEntropy()(model, masked)["loss"], CrossEntropy()(model, batch)["loss"]
    assert term.count == (masked.targets_T != -100).sum() < whole.count
    assert term.sum < whole.sum


def test_the_chunk_changes_nothing_but_memory() -> None:
    """Logits of the whole row are never kept: nothing that autograd holds is as large as they."""
    batch, model = TinySource(3, documents=20).batch(0), tiny_model()
    kept: list[int] = []

    def pack_(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape.numel() if tensor.shape[-1:] == (VOCABULARY,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
        chunked = CrossEntropy(chunk=7)(model, batch)["loss"].sum
    whole = CrossEntropy(chunk=10_000)(model, batch)["loss"].sum
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert kept and max(kept) < len(batch.tokens_T) * VOCABULARY


def test_tokens_of_another_vocabulary_are_named() -> None:
    with pytest.raises(UserError, match=f"token {VOCABULARY}, the model knows {VOCABULARY} entries"):
        CrossEntropy()(tiny_model(), pack([np.array([1, VOCABULARY, 2])]))
