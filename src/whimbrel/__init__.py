"""Whimbrel: small reasoning language models, from raw pages to a served model, in one package."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whimbrel.engine import Engine, Sampling
    from whimbrel.model import LanguageModel, ModelConfig
    from whimbrel.text import Tokenizer

__version__ = "0.1.0"
__all__ = ["Engine", "LanguageModel", "ModelConfig", "Sampling", "Tokenizer", "__version__"]

_HOMES = {
    "Engine": "whimbrel.engine",
    "Sampling": "whimbrel.engine",
    "LanguageModel": "whimbrel.model",
    "ModelConfig": "whimbrel.model",
    "Tokenizer": "whimbrel.text",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import whimbrel` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'whimbrel' has no attribute {name!r}")
