"""How fast a model reads prompts and decodes here, beside what the machine could do, and where the time goes.

A step is what the engine computes of one: a layout, the forward over a state, the head, the most likely token. Sampling
and text are left out. Decoding at a depth starts from a state filled with random numbers: a step does the same work
whatever they are. docs/bench.md derives each figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whimbrel.engine.plan import prompt_flops
from whimbrel.errors import UserError
from whimbrel.events import Report, silent
from whimbrel.model import count
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.linear import pack_model
from whimbrel.model.presets import PRESETS
from whimbrel.model.state import State
from whimbrel.ops import machine
from whimbrel.ops.cpu.library import isa, timed
from whimbrel.units import format_count

BLOCK = 16
"""Tokens of a block of keys and values, as in the engine."""
BITS = {"float16": 16, "int8": 8, "int4": 4}
PROMPT = 512
"""Tokens of a prompt in one step, as in the engine."""
SECONDS = 1.0
"""A row is repeated for about so long, and three times at least."""


@dataclass(frozen=True)
class Row:
    """One measured task. Seconds are those of a whole prompt, or of one token of each sequence (medians)."""

    task: str
    """`prefill` or `decode`."""
    context: int
    """Tokens of the prompt, or tokens that each sequence has before the step."""
    batch: int
    tokens_per_second: float
    """All sequences together."""
    seconds: float
    native_seconds: float
    """In calls of the native library; the three add up to `seconds`."""
    torch_seconds: float
    """In calls of torch."""
    python_seconds: float
    """In everything else."""
    bytes_per_token: float
    flops_per_token: float
    bandwidth_share: float
    """Bytes over seconds, over the measured bandwidth."""
    peak_share: float
    """Operations over seconds, over the measured peak of a float32 product."""


class _Watch(TorchFunctionMode):
    """Times every call of torch's Python interface from its outside: what runs inside is what runs without it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.calls = 0.0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds += time.perf_counter() - begin
            self.calls += 1


def _watching_costs() -> float:
    """Seconds that being watched adds to one call of torch."""
    tensor, calls = torch.zeros(1), 2000

    def loop() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            tensor.dim()
        return time.perf_counter() - begin

    plain = min(loop() for _ in range(3))
    with _Watch() as watch:
        watched = min(loop() for _ in range(3))
    return max(0.0, watched - plain - watch.seconds / 3) / calls


def parts(work: Callable[[], object], seconds: float) -> tuple[float, dict[str, float]]:
    """Median seconds of some work, and how they divide into native, torch and python, which add up to them.

    Plain and watched runs take turns. The plain ones give the time; the watched ones the shares, after what watching
    itself costs has been taken from python's.
    """
    cost = _watching_costs()
    plain: list[float] = []
    shares: list[tuple[float, float, float]] = []
    work()
    end = time.perf_counter() + seconds
    while len(plain) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        plain.append(time.perf_counter() - begin)
        with timed() as native, _Watch() as watch:
            begin = time.perf_counter()
            work()
            wall = time.perf_counter() - begin
        rest = max(0.0, wall - native.seconds - watch.seconds - cost * watch.calls)
        shares.append((native.seconds, watch.seconds, rest))
    median = statistics.median(plain)
    sums = [sum(column) for column in zip(*shares, strict=True)]
    names = ("native_seconds", "torch_seconds", "python_seconds")
    return median, {name: median * part / sum(sums) for name, part in zip(names, sums, strict=True)}


class Task:
    """A model and a state of `batch` sequences that hold up to `context` tokens each, with some room behind them."""

    def __init__(self, model: LanguageModel, context: int, batch: int) -> None:
        self.model, self.context, self.batch = model, context, batch
        blocks = -(-(context + 1) // BLOCK)
        self.state = State.empty(
            model.config, slots=batch, blocks=batch * blocks, block_size=BLOCK, dtype=model.dtype, device=model.device
        )
        self.slots_S = torch.arange(batch)
        self.table = torch.arange(batch * blocks).view(batch, blocks)
        self.tokens_T = torch.randint(model.config.vocab_size, (max(context, batch),))

    @torch.inference_mode()
    def read(self, begin: int, tokens: int) -> Tensor:
        """Read `tokens` tokens of one prompt that follow its first `begin`; the token after them."""
        layout = Layout.of(
            [tokens],
            [begin],
            slots=self.slots_S[:1],
            block_table=self.table[:1],
            rows=torch.tensor([tokens - 1]),
        )
        hidden_SD = self.model(self.tokens_T[begin : begin + tokens], layout, self.state)
        return self.model.head(hidden_SD).argmax(-1)

    def prefill(self) -> None:
        """Read one prompt as long as the context, as the engine does: so many tokens a step."""
        for begin in range(0, self.context, PROMPT):
            self.read(begin, min(PROMPT, self.context - begin))

    def fill(self) -> Task:
        """Random keys, values and recurrent states, as if the context had been read."""
        with torch.inference_mode():
            for side in (self.state.k, self.state.v, self.state.ssm, self.state.conv):
                for tensor in side.values():
                    tensor.normal_(0.0, 0.5)
        return self

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """The next token of each sequence after a full context; the same step each time."""
        layout = Layout.of([1] * self.batch, [self.context] * self.batch, slots=self.slots_S, block_table=self.table)
        self.next_S = self.model.head(self.model(self.tokens_T[: self.batch], layout, self.state)).argmax(-1)
        return self.next_S

    def bytes(self, task: str) -> int:
        """Bytes that must move, from what is there: weights, keys and values read once, states read and written.

        Of the embedding a step reads one row a sequence, besides the whole where it is the head too. A prompt reads
        the weights and the keys before it once every 512 tokens.
        """
        model, held, config = self.model, self.state.bytes(), self.model.config
        tensors = [*model.parameters(), *model.buffers()]
        whole = sum(tensor.nbytes for tensor in tensors)
        table = sum(tensor.nbytes for tensor in (*model.embeddings.parameters(), *model.embeddings.buffers()))
        weights = whole - table * (not config.tie_embeddings) + self.batch * table // config.vocab_size
        room = self.table.shape[1] * BLOCK
        kv = held["kv"] * (self.context + 1) // room
        states = 2 * (held["conv"] + held["ssm"])
        if task == "decode":
            return weights + kv + states
        steps = -(-self.context // PROMPT)
        return steps * (weights + states) + kv * (steps + 1) // 2


def load(name: str, dtype: str) -> LanguageModel:
    """The model of a folder, file, fetched name or hub id, or random weights in the shape of a preset, on the CPU.

    float16, int8 and int4 are weights of so many bits, rounded to the nearest; the arithmetic is float32.
    """
    if dtype not in ("float32", "float64", *BITS):
        raise UserError(f"dtype is {dtype!r}; set dtype to float32, float64, {', '.join(BITS)}")
    wide = "float64" if dtype == "float64" else "float32"
    if name in PRESETS:
        model = LanguageModel(PRESETS[name], dtype=getattr(torch, wide)).initialise(0)
    else:
        model = LanguageModel.load(name, dtype=wide)
    if dtype in BITS:
        pack_model(model, BITS[dtype])
    return model


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers of 1 or more from a list such as 512,4096; `name` is the setting in an error."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{name} is {text!r}; set --{name} to whole numbers of 1 or more, such as 512,4096")
    return [int(word) for word in words]


def run(
    name: str, contexts: Sequence[int], batches: Sequence[int], *, dtype: str, threads: int, report: Report = silent
) -> dict[str, Any]:
    """Load a model and measure it, as plain data: the machine's figures, and a `Row` as a dict for each task.

    The tasks are a prompt of each length, and a step of decoding at each depth and batch.
    """
    if threads:
        torch.set_num_threads(threads)
    model = load(name, dtype)
    bandwidth, peak = machine.bandwidth(), machine.matmul_peak()
    tasks = [("prefill", context, 1) for context in contexts]
    tasks += [("decode", context, batch) for context in contexts for batch in batches]
    rows = []
    for done, (task, context, batch) in enumerate(tasks):
        report({"event": "progress", "done": done, "total": len(tasks), "unit": "tasks", "text": f"{task} {context}"})
        rows.append(asdict(measure(Task(model, context, batch).fill(), task, bandwidth, peak)))
    return {
        "model": name,
        "parameters": count.total(model.config),
        "dtype": dtype,
        "native": isa(),
        "threads": torch.get_num_threads(),
        "bandwidth": bandwidth,
        "peak": peak,
        "rows": rows,
    }


def measure(task: Task, name: str, bandwidth: float, peak: float) -> Row:
    """Time a task's `prefill` or `decode`. `bandwidth` bytes/s and `peak` operations/s are the machine's."""
    config, context = task.model.config, task.context
    if name == "prefill":
        tokens, flops = context, prompt_flops(config, context)
        seconds, split = parts(task.prefill, SECONDS)
    else:
        tokens, flops = task.batch, task.batch * count.flops_per_token(config, context + 1)
        seconds, split = parts(task.decode, SECONDS)
    moved = task.bytes(name)
    return Row(
        name,
        context,
        task.batch,
        tokens_per_second=tokens / seconds,
        seconds=seconds,
        **split,
        bytes_per_token=moved / tokens,
        flops_per_token=flops / tokens,
        bandwidth_share=moved / seconds / bandwidth,
        peak_share=flops / seconds / peak,
    )


def as_text(found: Mapping[str, Any]) -> str:
    """The table a person reads."""
    head = (
        f"{found['model']}: {format_count(found['parameters'])} parameters, {found['dtype']}; "
        f"{found['threads']} threads, native: {found['native'] or 'none'}; here memory is read at "
        f"{found['bandwidth'] / 1e9:.1f} GB/s, matrices are multiplied at {found['peak'] / 1e9:.0f} GFLOP/s"
    )
    columns = "task     context  batch  tokens/s   ms/step  native  torch  python  MB/token  of bandwidth  of peak"
    return "\n".join([head, "", columns, *(_line(Row(**row)) for row in found["rows"])])


def _line(row: Row) -> str:
    shares = [100 * part / row.seconds for part in (row.native_seconds, row.torch_seconds, row.python_seconds)]
    return (
        f"{row.task:<7} {row.context:>8,} {row.batch:>6} {row.tokens_per_second:>9,.4g} {1000 * row.seconds:>9,.4g}"
        f" {shares[0]:>6.1f}% {shares[1]:>5.1f}% {shares[2]:>6.1f}% {row.bytes_per_token / 1e6:>8,.4g}"
        f" {100 * row.bandwidth_share:>12.1f}% {100 * row.peak_share:>7.1f}%"
    )
