"""How fast a model reads prompts and decodes here, beside what the machine could do, and where the time goes.

A step is what the engine computes of one: a layout, the forward over a state, the head, the most likely token. Sampling
and text are left out. Decoding at a depth starts from a state filled with random numbers: a step does the same work
whatever they are. docs/bench.md derives each figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whimbrel.engine.graphs import record
from whimbrel.engine.memory import check_state_dtype
from whimbrel.engine.plan import BLOCK, prompt_flops
from whimbrel.errors import UserError
from whimbrel.events import Report, silent
from whimbrel.model import checkpoint, count, fewbits
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.linear import pack_model
from whimbrel.model.presets import PRESETS
from whimbrel.model.state import State
from whimbrel.ops import machine
from whimbrel.ops.cpu.library import isa, timed
from whimbrel.units import format_count

BITS = {"float16": 16, "int8": 8, "int4": 4}
KNOWN = {"cpu": ("float32", *BITS, "fp8"), "cuda": ("float32", "bfloat16", "int8", "int4", "fp8")}
"""What `dtype` may be on a device."""
PROMPT = {"cpu": 512, "cuda": 8192}
"""Tokens of a prompt in one step: on a CPU as in the engine, on a GPU so many that products are at their best."""
SECONDS = 1.0
"""A row is repeated for about so long, and three times at least."""


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
    plain = min(_clock(lambda: [tensor.dim() for _ in range(calls)]) for _ in range(3))
    with _Watch() as watch:
        watched = min(_clock(lambda: [tensor.dim() for _ in range(calls)]) for _ in range(3))
    return max(0.0, watched - plain - watch.seconds / 3) / calls


def _clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def parts(work: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median `seconds` of some work, and its `native_`, `torch_` and `python_seconds`, which add up to them.

    Plain and watched runs take turns. The plain ones give the time; the watched ones the shares, after what watching
    itself costs has been taken from python's.
    """
    cost, end = _watching_costs(), time.perf_counter() + seconds + _clock(work)
    plain: list[float] = []
    spent = [0.0, 0.0, 0.0]
    while len(plain) < 3 or time.perf_counter() < end:
        plain.append(_clock(work))
        with timed() as native, _Watch() as watch:
            wall = _clock(work)
        rest = max(0.0, wall - native.seconds - watch.seconds - cost * watch.calls)
        spent = [total + new for total, new in zip(spent, (native.seconds, watch.seconds, rest), strict=True)]
    median = statistics.median(plain)
    names = ("native_seconds", "torch_seconds", "python_seconds")
    return {"seconds": median} | {name: median * s / sum(spent) for name, s in zip(names, spent, strict=True)}


class Task:
    """A model, and a state for `batch` sequences of `context` tokens, filled as if those had been read."""

    def __init__(self, model: LanguageModel, context: int, batch: int, state_dtype: str = "float32") -> None:
        self.model, self.context, self.batch, self.device = model, context, batch, model.device
        self.prompt = PROMPT[self.device.type]
        self.graph: Any = None
        self.blocks = -(-(context + 1) // BLOCK)
        self.state = State.empty(
            model.config,
            slots=batch,
            blocks=batch * self.blocks,
            dtype=model.dtype,
            kv_dtype=model.kv_dtype,
            ssm_dtype=getattr(torch, check_state_dtype(state_dtype)),
            device=self.device,
        )
        for side in (self.state.k, self.state.v, self.state.ssm, self.state.conv):
            for tensor in side.values():
                tensor.normal_(0.0, 0.5)
        self.slots_S = torch.arange(batch, device=self.device)
        self.table = torch.arange(batch * self.blocks, device=self.device).view(batch, self.blocks)
        self.tokens_T = torch.randint(model.config.vocab_size, (max(context, batch),), device=self.device)

    def decode(self) -> Tensor:
        """The next token of each sequence after a full context; the same step each time. On a GPU a recorded graph."""
        if self.device.type == "cuda":
            if self.graph is None:
                layout = self._layout([1] * self.batch, self.context)
                self.graph, self.best = record(lambda: self._step(self.tokens_T[: self.batch], layout))
            self.graph.replay()
            return self.best
        return self._step(self.tokens_T[: self.batch], self._layout([1] * self.batch, self.context))

    def prefill(self) -> None:
        """Read one prompt as long as the context, as the engine does: so many tokens a step."""
        for begin in range(0, self.context, self.prompt):
            self.read(begin, min(self.prompt, self.context - begin))

    def read(self, begin: int, tokens: int) -> Tensor:
        """Read `tokens` tokens of one prompt that follow its first `begin`; the token after them."""
        return self._step(self.tokens_T[begin : begin + tokens], self._layout([tokens], begin))

    def _layout(self, lengths: list[int], past: int) -> Layout:
        mine, tokens = slice(len(lengths)), sum(lengths)
        rows = None if len(lengths) == tokens else torch.tensor([tokens - 1], device=self.device)
        slots_S, table = self.slots_S[mine], self.table[mine]
        pasts = [past] * len(lengths)
        return Layout.of(lengths, pasts, slots=slots_S, block_table=table, rows=rows, device=self.device)

    @torch.inference_mode()
    def _step(self, tokens_T: Tensor, layout: Layout) -> Tensor:
        return self.model.head(self.model(tokens_T, layout, self.state)).argmax(-1)

    def bytes(self, task: str) -> int:
        """Bytes that must move, from what is there: weights, keys and values read once, states read and written.

        Of the embedding a step reads one row a sequence, besides the whole where it is the head too. A prompt reads
        the weights and the keys before it once every step (512 tokens on a CPU, 8,192 on a GPU).
        """
        config, held = self.model.config, self.state.bytes()
        whole, table = _nbytes(self.model), _nbytes(self.model.embeddings)
        weights = whole - table * (not config.tie_embeddings) + self.batch * table // config.vocab_size
        kv = held["kv"] * (self.context + 1) // (self.blocks * BLOCK)
        once = weights + 2 * (held["conv"] + held["ssm"])
        steps = -(-self.context // self.prompt)
        return once + kv if task == "decode" else steps * once + kv * (steps + 1) // 2


def _nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def on_device(work: Callable[[], object], seconds: float) -> dict[str, float]:
    """As `parts`, on a GPU, where a step is one graph: the median of synchronised runs, all counted as torch's."""
    times: list[float] = []

    def once() -> None:
        work()
        torch.cuda.synchronize()

    once()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(_clock(once))
    median = statistics.median(times)
    return {"seconds": median, "native_seconds": 0.0, "torch_seconds": median, "python_seconds": 0.0}


def load(name: str, dtype: str, device: str = "cpu") -> LanguageModel:
    """The model of a folder, file, fetched name or hub id, or random weights in the shape of a preset.

    float16, int8 and int4 are weights of so many bits, rounded to the nearest, fp8 those of projections; the arithmetic
    is float32 on a CPU and bfloat16 on a GPU, or the dtype. A folder of few bits is taken as it is.
    """
    if dtype not in KNOWN[device]:
        raise UserError(f"dtype is {dtype!r}; on this device set dtype to one of {', '.join(KNOWN[device])}")
    rows = checkpoint.by_rows(torch.device(device))
    plain = dtype if dtype in checkpoint.DTYPES and dtype not in BITS else "bfloat16" if rows else "float32"
    form = None if name in PRESETS else checkpoint.load_form(name)
    if form is not None and dtype not in (plain, form.name):
        raise UserError(f"dtype is {dtype}, but {name} holds {form.name}; set dtype to {form.name}")
    if name in PRESETS:
        model = LanguageModel(PRESETS[name], device=device, dtype=getattr(torch, plain)).initialise(0)
    else:
        model = LanguageModel.load(name, dtype="fp8" if dtype == "fp8" else plain, device=device)
    if form is None and (dtype != "fp8" or name in PRESETS):
        round_weights(model, dtype, rows)
    return model


def round_weights(model: LanguageModel, dtype: str, rows: bool) -> None:
    """Round weights to the nearest of `dtype`, in place, if it has few bits; with `rows` as a GPU reads them."""
    if dtype == "fp8":
        fewbits.to_fp8(model)
    elif dtype in BITS:
        plain = model.dtype
        pack_model(model, BITS[dtype])
        if rows:
            fewbits.settle(model, plain)


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers of 1 or more from a list such as 512,4096; `name` is the setting in an error."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{name} is {text!r}; set --{name} to whole numbers of 1 or more, such as 512,4096")
    return [int(word) for word in words]


def run(
    name: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    dtype: str,
    threads: int = 0,
    report: Report = silent,
    device: str = "cpu",
    state_dtype: str = "float32",
) -> dict[str, Any]:
    """Load a model and measure a prompt of each length and a step of decoding at each depth and batch: plain data."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"device is {device!r}; set device to cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU; set device to cpu")
    check_state_dtype(state_dtype)
    if threads:
        torch.set_num_threads(threads)
    model, bandwidth, peak = load(name, dtype, device), machine.bandwidth(device), machine.matmul_peak(device)
    tasks = [("prefill", context, 1) for context in contexts]
    tasks += [("decode", context, batch) for context in contexts for batch in batches]
    rows = []
    for done, (task, context, batch) in enumerate(tasks):
        report({"event": "progress", "done": done, "total": len(tasks), "unit": "tasks", "text": f"{task} {context}"})
        rows.append(measure(Task(model, context, batch, state_dtype), task, bandwidth, peak))
    said = {"model": name, "parameters": count.total(model.config), "dtype": dtype, "state_dtype": state_dtype}
    said |= {"native": isa(), "device": device, "threads": torch.get_num_threads()}
    return said | {"bandwidth": bandwidth, "peak": peak, "rows": rows}


def measure(task: Task, name: str, bandwidth: float, peak: float) -> dict[str, Any]:
    """Time a task's `prefill` or `decode`: a row. `bandwidth` bytes/s and `peak` operations/s are the machine's."""
    config, context, prompt = task.model.config, task.context, name == "prefill"
    tokens = context if prompt else task.batch
    flops = prompt_flops(config, context) if prompt else tokens * count.flops_per_token(config, context + 1)
    time_it = parts if task.device.type == "cpu" else on_device
    moved, split = task.bytes(name), time_it(task.prefill if prompt else task.decode, SECONDS)
    seconds = split["seconds"]
    return {
        "task": name,
        "context": context,
        "batch": task.batch,
        "tokens_per_second": tokens / seconds,
        **split,
        "bytes_per_token": moved / tokens,
        "flops_per_token": flops / tokens,
        "bandwidth_share": moved / seconds / bandwidth,
        "peak_share": flops / seconds / peak,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The table a person reads."""
    native = f"native: {found['native'] or 'none'}; {found['threads']} threads"
    states = f" with {found['state_dtype']} states" if found["state_dtype"] != "float32" else ""
    where = native if found["device"] == "cpu" else "recorded graphs on the GPU, whose kernels"
    head = (
        f"{found['model']}: {format_count(found['parameters'])} parameters, {found['dtype']}{states}, "
        f"{where} read {found['bandwidth'] / 1e9:.1f} GB/s here and "
        f"multiply matrices at {found['peak'] / 1e9:.0f} GFLOP/s"
    )
    columns = "task     context  batch  tokens/s   ms/step  native  torch  python  MB/token  of bandwidth  of peak"
    return "\n".join([head, "", columns, *map(_line, found["rows"])])


def _line(row: Mapping[str, Any]) -> str:
    native, torch_, python = (100 * row[f"{part}_seconds"] / row["seconds"] for part in ("native", "torch", "python"))
    return (
        f"{row['task']:<7} {row['context']:>8,} {row['batch']:>6} {row['tokens_per_second']:>9,.4g}"
        f" {1000 * row['seconds']:>9,.4g} {native:>6.1f}% {torch_:>5.1f}% {python:>6.1f}%"
        f" {row['bytes_per_token'] / 1e6:>8,.4g} {row['bandwidth_share']:>13.1%} {row['peak_share']:>8.1%}"
    )
