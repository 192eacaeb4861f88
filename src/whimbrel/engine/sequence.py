"""One answer on its way: its tokens, where its state lies, and the text read off so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from whimbrel.engine.answer import Answer, Chunk, Finish
from whimbrel.engine.sampler import Draw
from whimbrel.engine.sampling import Sampling
from whimbrel.engine.stop import Stops
from whimbrel.engine.thinking import Kind, Thinking
from whimbrel.text.stream import TextStream


@dataclass(eq=False)
class Sequence:
    """A request's tokens and its place in the pool. The scheduler moves it, the engine appends to it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    thinking: Thinking
    detokenise: TextStream
    index: int = 0
    sample: int = 0
    tokens: list[int] = field(default_factory=list)
    """Prompt and output."""
    cached: int = 0
    """Leading tokens whose state the pool holds."""
    slot: int | None = None
    """Place of the recurrent state; None while waiting."""
    blocks: list[int] = field(default_factory=list)
    finish: Finish | None = None
    preempted: int = 0
    """Times the state was given up and computed again."""
    seen: int = 0
    """Leading tokens that the pool's record for the repetition penalty holds."""
    wide: bool = False
    """As in `Draw`: said of a top_k beyond the likeliest, and of a row for which they did not suffice once."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self._stops: dict[Kind, Stops] = {
            "thinking": Stops(self.sampling.stop if self.sampling.stop_in_thinking else ()),
            "answer": Stops(self.sampling.stop),
        }
        self._text: dict[Kind, list[str]] = {"thinking": [], "answer": []}
        self._fresh: list[tuple[Kind, str]] = []
        self._shown = 0
        self._forced: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._times = [time.perf_counter()]

    @property
    def pending(self) -> int:
        """Tokens whose state is still to be computed; at least one until the sequence is finished."""
        return len(self.tokens) - self.cached

    @property
    def written(self) -> int:
        """Tokens of the output so far."""
        return len(self.tokens) - len(self.prompt)

    def begin(self) -> None:
        """Note when the first computation started."""
        if len(self._times) == 1:
            self._times.append(time.perf_counter())

    def draw(self, used_V: Tensor | None) -> Draw:
        """What the sampler needs for the next token; `used_V` is the pool's record."""
        return Draw(self.sampling, self.seed, self.sample, self.written, used_V, self.wide)

    def append(
        self, token: int, ends: frozenset[int], logprob: tuple[float, tuple[tuple[int, float], ...]] | None = None
    ) -> None:
        """Take the next token: count it, read its text, and see whether the answer is at its end."""
        if len(self._times) == 2:
            self._times.append(time.perf_counter())
        forced = bool(self.thinking.forced)
        if forced:
            assert token == self.thinking.forced.pop(0), "a forced id was replaced"
            self._forced.append(self.written)
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob[0])
            self._top.append(logprob[1])
        stops = token in ends and not forced and not self.sampling.ignore_eos
        full = self.written >= self.sampling.max_tokens
        text = "" if stops else self.detokenise.push(token)
        if stops or full:
            text += self.detokenise.finish()
        if self.thinking.over and not self.sampling.stop:
            self._take("answer", text)
        elif text or not stops:
            self._show(self.thinking.push(text))
        if self.finish is None and (stops or full):
            self.end("stop" if stops else "length")

    def end(self, finish: Finish) -> None:
        """Close the sequence and show the text that was held back."""
        self.finish = finish
        self._times.append(time.perf_counter())
        if not self._hit:
            self._show(self.thinking.flush())
        if not self._hit:
            for kind, stops in self._stops.items():
                self._take(kind, stops.flush())
        elif finish == "length":
            self.finish = "stop"

    @property
    def _hit(self) -> str | None:
        return self._stops["thinking"].hit or self._stops["answer"].hit

    def _show(self, pieces: list[tuple[Kind, str]]) -> None:
        for kind, text in pieces:
            if kind == "answer":  # the thought is over: what it held back can be no stop string any more
                self._take("thinking", self._stops["thinking"].flush())
            self._take(kind, self._stops[kind].push(text))
            if self._hit and self.finish is None:
                self.end("stop")
                return

    def _take(self, kind: Kind, text: str) -> None:
        if text:
            self._text[kind].append(text)
            self._fresh.append((kind, text))

    def chunks(self) -> list[Chunk]:
        """The pieces of text since the last call. Ids go with the first; the last piece of all carries the answer."""
        pieces, self._fresh = self._fresh, []
        if self.finish is not None and not pieces:
            pieces = [("answer", "")]
        if not pieces:
            return []
        ids, self._shown = tuple(self.tokens[len(self.prompt) + self._shown :]), self.written
        last = len(pieces) - 1
        whole = self.answer() if self.finish is not None else None
        return [
            Chunk(text, kind, ids if i == 0 else (), whole if i == last else None)
            for i, (kind, text) in enumerate(pieces)
        ]

    def answer(self) -> Answer:
        """The finished answer."""
        assert self.finish is not None, "only a finished sequence has an answer"
        start, last = self._times[0], self._times[-1]
        wants = self.sampling.logprobs
        return Answer(
            index=self.index,
            sample=self.sample,
            text="".join(self._text["answer"]),
            thinking="".join(self._text["thinking"]),
            ids=tuple(self.tokens[len(self.prompt) :]),
            forced=tuple(self._forced),
            finish=self.finish,
            stop=self._hit,
            thinking_ended=self.thinking.ended,
            prompt_tokens=len(self.prompt),
            thinking_tokens=self.thinking.tokens,
            seed=self.seed,
            logprobs=None if wants is None else tuple(self._logprobs),
            top_logprobs=tuple(self._top) if wants else None,
            wait_seconds=(self._times[1] if len(self._times) > 2 else last) - start,
            first_seconds=(self._times[2] if len(self._times) > 3 else last) - start,
            seconds=last - start,
        )
