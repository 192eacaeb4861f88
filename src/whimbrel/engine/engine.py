"""Text in, text out: the loop that puts model, pool, scheduler and sampler together.

`Engine(model, tokenizer).start()`, then `generate`, `stream` or `score`. One step computes one token of every running
answer and a part of the waiting prompts, in one flat forward. T packed tokens, S sequences that get a token, V
vocabulary.
"""

from __future__ import annotations

import secrets
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch

from whimbrel.engine.answer import Answer, Chunk
from whimbrel.engine.graphs import DecodeGraphs
from whimbrel.engine.memory import SHARE, Room, check_state_dtype, free_memory, sizes
from whimbrel.engine.pool import Pool
from whimbrel.engine.prompt import Prompt, read_prompt
from whimbrel.engine.sampler import CANDIDATES, LogProb, pick, sample, top_log_probs
from whimbrel.engine.sampling import Sampling
from whimbrel.engine.scheduler import Scheduler, Work
from whimbrel.engine.score import score_pairs
from whimbrel.engine.sequence import Sequence
from whimbrel.engine.thinking import Thinking
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.ops.segments import put
from whimbrel.text.thinking import CLOSE
from whimbrel.text.tokenizer import Tokenizer


def warn(event: dict[str, Any]) -> None:
    """The report of an engine that nobody listens to: warnings become Python warnings, all else is dropped."""
    if event["event"] == "warning":
        warnings.warn(event["text"], stacklevel=2)


class Engine:
    """Runs a model for many requests at once. Nothing is allocated before `start()` (called by the first request if
    need be).

    `max_sequences` run at once; `kv_tokens` tokens of keys and values for all of them in blocks of `block_size`;
    `prefill_tokens` tokens of prompts in one step. None: what `memory` bytes hold, or the free memory if that is None
    too (docs/engine.md). `state_dtype`: float32, or float16, rounded at random (docs/gpu.md).
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_sequences: int | None = None,
        kv_tokens: int | None = None,
        block_size: int = 16,
        prefill_tokens: int = 512,
        state_dtype: str = "float32",
        memory: int | None = None,
        report: Report = warn,
    ) -> None:
        given = {"max_sequences": max_sequences, "block_size": block_size, "prefill_tokens": prefill_tokens}
        for name, value in (given | {"kv_tokens": kv_tokens, "memory": memory}).items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1; set {name} to 16")
        self.state_dtype = check_state_dtype(state_dtype)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={model.config.vocab_size}; "
                "load the tokenizer of this model's own folder"
            )
        if tokenizer.vocab_size < 0.9 * model.config.vocab_size:
            words = f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}"
            report({"event": "warning", "text": f"{words}; ids without text are left out: is it this model's own?"})
        self.model, self.tokenizer, self.report = model, tokenizer, report
        self._asked, self.kv_tokens, self.memory = max_sequences, kv_tokens, memory
        self.block_size, self.prefill_tokens = block_size, prefill_tokens
        self.device, self.dtype = model.device, model.dtype
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            raise UserError("dtype is bfloat16, which CPUs emulate slowly and some not at all; set dtype to float32")
        self._ends = frozenset(tokenizer.eos_ids) | frozenset(model.config.eos_token_ids)
        # A tag that is itself a special token must stay in the text, where it is looked for.
        self._skip_special = tokenizer.decode(tokenizer.encode(CLOSE)) == CLOSE
        self._warned = False
        self._scheduler: Scheduler | None = None
        self._graphs: DecodeGraphs | None = None

    def start(self) -> Engine:
        """Take the memory. Called twice it does nothing."""
        self._running()
        return self

    def sizes(self) -> tuple[int, int]:
        """Sequences, and tokens of keys and values, that `start` makes room for; `UserError` where not one fits."""
        memory = self.memory or int(free_memory(self.device) * SHARE.get(self.device.type, 0.5))
        name, kv = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.model.kv_dtype))
        room = Room(self.model.config, memory, name, self.state_dtype, self.block_size, self.prefill_tokens, kv)
        return sizes(room, self._asked, self.kv_tokens, self.memory is not None or self.device.type != "cpu")

    @property
    def max_sequences(self) -> int:
        """Sequences that run at once: those asked for, or those that the memory holds, which is taken to know."""
        return self._asked or self._running().pool.slots

    def _running(self) -> Scheduler:
        if self._scheduler is None:
            sequences, kv_tokens = self.sizes()
            pool = Pool(
                self.model.config,
                slots=sequences,
                kv_tokens=kv_tokens,
                block_size=self.block_size,
                dtype=self.dtype,
                device=self.device,
                spare=self.device.type == "cuda",
                state_dtype=getattr(torch, self.state_dtype),
                kv_dtype=self.model.kv_dtype,
            )
            self._scheduler = Scheduler(pool, self.prefill_tokens)
            self._graphs = DecodeGraphs(self.model, pool) if self.device.type == "cuda" else None
        return self._scheduler

    def add(self, prompt: Prompt, sampling: Sampling, index: int = 0) -> list[Sequence]:
        """Queue the `sampling.n` answers to one prompt. They grow with each `step` until `finish` is set."""
        scheduler = self._running()
        ids, opened = read_prompt(prompt, self.tokenizer, sampling.thinking_budget != 0, self.model.config.vocab_size)
        self._check_length(len(ids), sampling.max_tokens, scheduler.pool)
        sequences = []
        for number in range(sampling.n):
            thinking = Thinking(
                opened=opened,
                budget=sampling.thinking_budget,
                grace=sampling.thinking_grace,
                encode=self.tokenizer.encode,
            )
            seed = secrets.randbits(53) if sampling.seed is None else sampling.seed
            sequence = Sequence(
                ids,
                sampling,
                seed,
                thinking,
                self.tokenizer.stream(skip_special=self._skip_special),
                index=index,
                sample=number,
            )
            sequence.wide = sampling.temperature != 0 and CANDIDATES < sampling.top_k < self.model.config.vocab_size
            scheduler.add(sequence)
            sequences.append(sequence)
        return sequences

    def abort(self, sequence: Sequence) -> None:
        """Take a request back; what it has written so far is its answer. A finished one is left as it is."""
        if sequence.finish is None:
            sequence.end("abort")
            self._running().remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Compute one step; returns the sequences that got a token. An idle engine returns an empty list."""
        scheduler = self._running()
        if scheduler.pool.version != self.model.weights_version:
            scheduler.recompute()
            scheduler.pool.version = self.model.weights_version
        work = scheduler.schedule()
        if not work:
            return []
        due = self._forward(work, scheduler.pool)
        for sequence in due:
            if sequence.finish is not None:
                scheduler.remove(sequence)
        return due

    def _forward(self, work: Work, pool: Pool) -> list[Sequence]:
        """Run the model over one step's tokens and append a token to each sequence whose tokens are all computed."""
        if self._graphs is not None and all(count == 1 and sequence.cached for sequence, count in work):
            return self._decode([sequence for sequence, _ in work], self._graphs)
        tokens: list[int] = []
        rows: list[int] = []
        due: list[Sequence] = []
        for sequence, count in work:
            tokens.extend(sequence.tokens[sequence.cached : sequence.cached + count])
            if count == sequence.pending:
                rows.append(len(tokens) - 1)
                due.append(sequence)
        slots_S, block_table = pool.places([sequence for sequence, _ in work])
        layout = Layout.of(
            [count for _, count in work],
            [sequence.cached for sequence, _ in work],
            slots=slots_S,
            block_table=block_table,
            rows=None if len(rows) == len(tokens) else put(rows, self.device),
            device=self.device,
        )
        hidden_SD = self.model(put(tokens, self.device), layout, pool.state)
        for sequence, count in work:
            sequence.cached += count
        if due:
            logits_SV = self.model.head(hidden_SD)
            self._append(logits_SV, due, sample(logits_SV, pool.draws(due)))
        return due

    def _decode(self, running: list[Sequence], graphs: DecodeGraphs) -> list[Sequence]:
        """One more token of each running answer, on a GPU: nothing waits for the device but the ids themselves."""
        running = sorted(running, key=lambda sequence: not sequence.wide)
        draws = graphs.pool.draws(running, computed=True)
        logits_SV, ids_S = graphs.step(running, draws)
        for sequence in running:
            sequence.cached += 1
        rows = [row for row, sequence in enumerate(running) if not sequence.pending]  # the others compute more first
        if not rows:
            return []
        ids = ids_S.tolist()
        for row in (row for row in rows if ids[row] < 0):
            running[row].wide = True  # from now on it is ordered where it is drawn
            (ids[row],) = sample(logits_SV[row : row + 1], [draws[row]._replace(wide=True)])
        due = [running[row] for row in rows]
        self._append(pick(logits_SV, rows), due, [ids[row] for row in rows])
        return due

    def _append(self, logits_SV: torch.Tensor, due: list[Sequence], tokens: list[int]) -> None:
        """Append a token to each sequence: the one drawn from its row, or the one that must come."""
        for row, sequence in enumerate(due):
            if sequence.thinking.forced:  # the thought is being closed
                tokens[row] = sequence.thinking.forced[0]
        asked = [row for row, sequence in enumerate(due) if sequence.sampling.logprobs is not None]
        logprobs: dict[int, LogProb] = {}
        if asked:
            chosen, counts = [tokens[row] for row in asked], [due[row].sampling.logprobs or 0 for row in asked]
            logprobs = dict(zip(asked, top_log_probs(pick(logits_SV, asked), chosen, counts), strict=True))
        for row, sequence in enumerate(due):
            sequence.append(tokens[row], self._ends, logprobs.get(row))

    def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling | Iterable[Sampling] | None = None
    ) -> Iterator[Answer]:
        """Answers in the order of the prompts (n in a row to each), computed as they are asked for, many at once.

        `sampling` is one for all or one for each prompt. Prompts are drawn as room appears, so they may be a long
        iterator. Leaving the iterator early takes back what is unfinished.
        """
        if isinstance(prompts, str | Mapping):
            raise UserError("prompts is a single prompt; put it in a list, or use stream(prompt)")
        if sampling is None or isinstance(sampling, Sampling):
            return self.generate_pairs(zip(prompts, repeat(sampling or Sampling())))
        return self.generate_pairs(zip(prompts, sampling, strict=True))

    def generate_pairs(self, pairs: Iterable[tuple[Prompt, Sampling]]) -> Iterator[Answer]:
        """`generate` over pairs of a prompt and its own sampling."""
        source = enumerate(pairs)
        waiting = self._running().waiting
        ahead: deque[Sequence] = deque()
        try:
            while True:
                while len(waiting) < self.max_sequences and len(ahead) < 4 * self.max_sequences:
                    index, pair = next(source, (0, None))
                    if pair is None:
                        break
                    ahead.extend(self.add(*pair, index))
                if not ahead:
                    return
                if ahead[0].finish is None:
                    self.step()
                while ahead and ahead[0].finish is not None:
                    yield ahead.popleft().answer()
        finally:
            for sequence in ahead:
                self.abort(sequence)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """One answer piece by piece; the last carries it whole. Leaving the iterator early takes the request back."""
        sampling = sampling or Sampling()
        if sampling.n != 1:
            raise UserError(f"n={sampling.n} cannot be streamed as one answer; set n to 1")
        (sequence,) = self.add(prompt, sampling)
        try:
            while sequence.finish is None:
                self.step()
                yield from sequence.chunks()
        finally:
            self.abort(sequence)

    def score(self, prompts: Iterable[Prompt], continuations: Iterable[str | list[int]]) -> list[list[float]]:
        """For each pair the natural log-probability of each token of the continuation, given the prompt and the tokens
        before.

        Prompt and continuation are tokenised apart; give ids where the cut between them matters.
        """
        pairs = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ids, _ = read_prompt(prompt, self.tokenizer, True, self.model.config.vocab_size)
            after = self.tokenizer.encode(continuation) if isinstance(continuation, str) else list(continuation)
            pairs.append((ids, after))
        return score_pairs(self.model, pairs, self.prefill_tokens)

    def _check_length(self, prompt: int, answer: int, pool: Pool) -> None:
        """Refuse what can never fit, and warn once where the model was not trained for the length."""
        total, held = prompt + answer, pool.blocks * pool.block_size
        if pool.attends and total > held:
            fix = f"set max_tokens to at most {held - prompt}" if held > prompt else "shorten the prompt"
            raise UserError(
                f"a prompt of {prompt} tokens and max_tokens={answer} need {total} tokens, but kv_tokens={held}; "
                f"{fix} or set kv_tokens to {total}"
            )
        trained = self.model.config.max_position_embeddings
        if total > trained and not self._warned:
            self._warned = True
            text = f"{total} tokens of context are more than the model was made for (max_position_embeddings={trained})"
            self.report({"event": "warning", "text": text + "; answers may degrade"})
