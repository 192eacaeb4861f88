"""How long work says what it does: it calls `report(event)` and never prints.

An event is a plain dict. Its key `event` is one of
`progress` (done, total, unit, text), `metrics` (step and figures), `log` (text), `warning` (text).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """A report that nobody reads."""
