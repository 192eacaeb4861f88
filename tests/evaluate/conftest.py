"""Models that write what a table says: after each character the next, `$` ends the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.text import Tokenizer

VOCABULARY = 320  # 64 reserved ids and the 256 bytes: a character is a token, and a tag is several


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["whimbrel"], VOCABULARY)


@pytest.fixture
def write(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """`write("=7", "7$")`: the folder of a model that says 7 after `=` and then ends."""

    def make(*pairs: str, name: str = "model") -> Path:
        config = ModelConfig(
            pattern="-", vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=1, eos_token_id=12
        )
        model = LanguageModel(config).initialise(0)
        with torch.no_grad():
            for parameter in model.layers[0].mixer.parameters():
                parameter.zero_()
            model.embeddings.weight.copy_(torch.eye(VOCABULARY))
            model.head.weight.zero_()
            for now, following in pairs:
                after = tokenizer.eos_ids[0] if following == "$" else tokenizer.encode(following)[0]
                model.head.weight[after, tokenizer.encode(now)[0]] = 1.0
        tokenizer.save(tmp_path / f"{name}-tokenizer")
        model.save(tmp_path / name, tmp_path / f"{name}-tokenizer")
        return tmp_path / name

    return make
