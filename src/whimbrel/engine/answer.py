"""What comes out of the engine: a whole answer, or pieces of one while it grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from whimbrel.engine.thinking import Ended, Kind

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Answer:
    """One finished answer. Text is what a reader sees: no tags, no stop string, nothing of the prompt."""

    index: int
    """Which prompt of the call."""
    sample: int
    """Which of the n answers to it."""
    text: str
    thinking: str
    ids: tuple[int, ...]
    """Every id written, in order: thought, tags, end-of-sequence token and all."""
    forced: tuple[int, ...]
    """Places in `ids` that the engine wrote itself to close the thought."""
    finish: Finish
    """`stop`: an end-of-sequence token or a stop string; `length`: max_tokens; `abort`: taken back by the caller."""
    stop: str | None
    """The stop string that was met."""
    thinking_ended: Ended
    """`closed` by the model, `budget` at a line break after the budget, `grace` when no line break came, `length`: the
    answer ended inside the thought, `off`: there was none, or it was turned off."""
    prompt_tokens: int
    thinking_tokens: int
    """Tokens between the tags."""
    seed: int
    """With it, Sampling.seed draws the same answer again."""
    logprobs: tuple[float, ...] | None
    """Log-probability of each id under the model (natural log); None unless asked for."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    """For each id the likeliest (id, log-probability); None unless asked for."""
    wait_seconds: float
    """From the request to its first computation."""
    first_seconds: float
    """From the request to its first token."""
    seconds: float
    """From the request to its last token."""

    def to_dict(self) -> dict[str, Any]:
        """A row of an answers file; ids and log-probabilities only where they were asked for."""
        row: dict[str, Any] = {"index": self.index, "sample": self.sample, "text": self.text, "thinking": self.thinking}
        row |= {"finish": self.finish, "stop": self.stop, "thinking_ended": self.thinking_ended}
        row |= {"prompt_tokens": self.prompt_tokens, "tokens": len(self.ids), "thinking_tokens": self.thinking_tokens}
        row |= {"seed": self.seed, "seconds": round(self.seconds, 4)}
        if self.logprobs is not None:
            row |= {"ids": self.ids, "logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        return row


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer in a stream."""

    text: str
    kind: Kind
    ids: tuple[int, ...]
    """Ids since the piece before; more than one where text had to wait for them."""
    answer: Answer | None = None
    """The whole answer, with the last piece."""
