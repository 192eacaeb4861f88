"""What a user can get wrong, said in a way that helps."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """A mistake that a user can cause and mend. The message names the setting, its value, and a value that works."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra of the package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed ({error}); install it with: pip install 'whimbrel[{extra}]'"
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """A half sentence that points from an unknown word to the nearest known one, or lists what there is."""
    options = sorted(known)
    match = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(options)}"
