"""Does a model that is read give the logits that were seen when it was written?

The probe is two rows of token ids, drawn by a formula from the size of the vocabulary, and the logits after each at
a few places of the vocabulary. It is small enough to lie in a manifest and would not survive a swapped tensor, a
changed configuration, or a half-copied file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whimbrel.errors import UserError

ROWS, LENGTH, PLACES = 2, 24, 48
TOLERANCE = 1e-4  # of the largest logit; the same machine gives 0, another one differs in the order of its sums


def take(folder: Path) -> dict[str, Any]:
    """Load the checkpoint of a folder and record `tokens` [ROWS][LENGTH], `places` and `logits` [ROWS][PLACES].

    Beside them `shape`: pattern, width, vocabulary, number of parameters, for readers of a manifest without torch.
    """
    import torch

    from whimbrel.model import LanguageModel, count

    model = LanguageModel.load(folder)
    vocabulary = model.config.vocab_size
    steps = torch.arange(ROWS * LENGTH, dtype=torch.int64)
    tokens_BL = ((steps + 1) * 2654435761 % (2**32) % vocabulary).view(ROWS, LENGTH)
    places = torch.linspace(0, vocabulary - 1, min(PLACES, vocabulary)).long()
    with torch.no_grad():
        logits_BV = model(tokens_BL)[:, -1, places]
    shape = {
        "pattern": model.config.pattern,
        "hidden_size": model.config.hidden_size,
        "vocab_size": vocabulary,
        "parameters": count.total(model.config),
    }
    probe = {"tokens": tokens_BL.tolist(), "places": places.tolist(), "logits": logits_BV.tolist()}
    return probe | {"shape": shape}


def check(folder: Path, expected: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint of a folder does not give the recorded logits."""
    seen = take(folder)
    pairs = [
        (a, b)
        for row, other in zip(seen["logits"], expected["logits"], strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    scale = max(abs(b) for _, b in pairs)
    worst = max(abs(a - b) for a, b in pairs)
    if seen["tokens"] != expected["tokens"] or not worst <= TOLERANCE * scale:
        raise UserError(
            f"the model in {folder} does not give the logits recorded when it was made (off by {worst:.3g}, largest "
            f"{scale:.3g}): its files have changed; move {folder.parent} away and run again to make it anew"
        )
