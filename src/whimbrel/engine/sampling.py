"""What a request may ask of the sampler: one frozen value, checked when it is made, in the words the user typed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whimbrel.errors import UserError, nearest


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to end. Any value that cannot work raises `UserError` here, before a model runs."""

    max_tokens: int = 512
    """Tokens to write at most, thought included."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 the logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose share (after top_k) reaches this."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token already in prompt or output; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; never shown, found also when split over tokens. One string will do."""
    stop_in_thinking: bool = False
    """Look for the stop strings inside the thought as well."""
    seed: int | None = None
    """Draws depend on (seed, which of the n samples, position) alone, never on batch mates. None: always new."""
    logprobs: int | None = None
    """None: none; 0: of each chosen token; k: also of the k likeliest. Natural log of the model's own distribution,
    before temperature, penalty and truncation."""
    n: int = 1
    """Answers to each prompt."""
    thinking_budget: int | None = None
    """Tokens allowed between the thinking tags; None: no limit, 0: thinking off."""
    thinking_grace: int = 500
    """Tokens after the budget in which a line break is awaited before the thought is cut where it stands."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token, up to max_tokens (for measurements)."""

    def __post_init__(self) -> None:
        stop = tuple(self.stop) if isinstance(self.stop, list | tuple) else (self.stop,)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop={stop!r} must be non-empty strings; set stop to a string such as '\\n\\n'")
        _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("n", self.n, 1, 65_536)
        _whole("thinking_grace", self.thinking_grace, 0)
        for name in ("seed", "logprobs", "thinking_budget"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, 2**128 if name == "seed" else 2**31 - 1)
        _real("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or 0.6")
        _real("top_p", self.top_p, 0.0, 1.0, "1 (off) or 0.95", above=True)
        _real("min_p", self.min_p, 0.0, 1.0, "0 (off) or 0.05")
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 (off) or 1.1", above=True)
        for name in ("stop_in_thinking", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r} must be true or false; set {name} to true")

    def override(self, values: Mapping[str, Any]) -> Sampling:
        """This value with some fields replaced, as a row of a prompts file asks; an unknown name raises `UserError`."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in values:
            if name not in known:
                raise UserError(f"unknown sampling setting {name!r}; {nearest(name, known)}")
        return dataclasses.replace(self, **values)


def _whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        bound = f"of at least {least} and at most {most}"
        raise UserError(f"{name}={value!r} must be a whole number {bound}; set {name} to {max(least, 1)}")


def _real(name: str, value: Any, low: float, high: float, fix: str, above: bool = False) -> None:
    """Check low <= value <= high (low < value when `above`)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if not good or value > high or value < low or (above and value == low):
        bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise UserError(f"{name}={value!r} must be a number {bound}; set {name} to {fix}")
