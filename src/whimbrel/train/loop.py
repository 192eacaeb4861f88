"""The loop. Data are a pure function of an index, the state is a step and tensors: a run that dies goes on bit for bit.

Micro-batch i of step s is `source.batch(s * accumulate + i)`. Training and validation lines go to `metrics.jsonl`; the
`step` of a line counts the updates done.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from whimbrel.errors import UserError, nearest
from whimbrel.events import Report, silent
from whimbrel.model.language import LanguageModel
from whimbrel.ops import cpu
from whimbrel.ops.memory import kept
from whimbrel.parallel import Axes, Share, applied
from whimbrel.parallel.context import piece_of
from whimbrel.parallel.mesh import ALONE
from whimbrel.train import checkpointing, threads
from whimbrel.train.checkpointing import Saver, TrainState
from whimbrel.train.interrupt import Stopped, Wish, stop_politely
from whimbrel.train.measure import Log, Meter, NoLog
from whimbrel.train.memory import check_memory, peak_memory, training_bytes
from whimbrel.train.objective import Batch, CrossEntropy, Objective
from whimbrel.train.optimizer import OptimizerSettings, adamw, set_learning_rate
from whimbrel.train.precision import Fp8, converted
from whimbrel.train.schedule import ScheduleSettings
from whimbrel.train.step import NotFinite, accumulate, train_step

PRECISIONS = ("auto", "float32", "bfloat16")
FREE = (
    *("threads", "recompute", "parallel", "validate_every", "validate_batches"),
    *("checkpoint_every", "keep", "asynchronous", "tensorboard"),
)
"""Settings that may change in the middle of a run: they do not change what is learned."""


class Source(Protocol):
    """Batches as a pure function of an index; it never ends (epochs follow each other)."""

    def batch(self, index: int) -> Batch:
        """The batch of this index, always the same."""


@dataclass(frozen=True)
class TrainSettings:
    """How long, how large, how often. The size of a micro-batch belongs to the source."""

    steps: int = 1000
    """Optimizer steps of the whole run; the schedule is stretched over them."""
    accumulate: int = 1
    """Micro-batches of an optimizer step."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: str = "auto"
    """`float32`, `bfloat16` (products alone, over float32 weights), or `auto`: that on a GPU, else float32."""
    fp8: Fp8 = field(default_factory=Fp8)
    """Linear layers whose products run in 8 bits (train/precision.py)."""
    recompute: bool = False
    """Activation checkpointing: less memory, about a third more time."""
    threads: int = 0
    """Threads of the CPU; 0 times 1, 2, 4, ... before step 1 and keeps the fastest."""
    validate_every: int = 100
    """Updates between two looks at held-out data; there is always one at the start and one at the end."""
    validate_batches: int = 8
    """Held-out batches of a look: always the same ones, from index 0."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; there is always one at the end."""
    keep: int = 2
    """Checkpoints kept."""
    asynchronous: bool = False
    """Write checkpoints while the next steps are computed, out of a copy of the state in the CPU's memory."""
    tensorboard: bool = True
    """Curves for TensorBoard too, if the package is installed."""
    parallel: Axes = field(default_factory=Axes)
    """Processes that share the work; micro-batches of a step are dealt to `data` × `fsdp` copies."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "validate_every", "validate_batches", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; set train.{name} to 1 or more")
        for name in ("clip", "threads"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"train.{name} is {getattr(self, name)}; set train.{name} to 0 or more")
        if self.precision not in PRECISIONS:
            hint = nearest(self.precision, PRECISIONS)
            raise UserError(f"train.precision is {self.precision!r}; {hint}; set it to auto, float32 or bfloat16")
        self.check_batches()
        self.schedule.check(self.steps)

    def check_batches(self) -> None:
        """Raise `UserError` unless a step's micro-batches can be dealt out evenly."""
        self.parallel.check_batches(self.accumulate)

    def precision_on(self, device: torch.device) -> str:
        """`float32` or `bfloat16`, which takes a GPU or the native library; torch's is slow on many CPUs."""
        if self.precision == "bfloat16" and device.type == "cpu" and cpu.isa() in (None, "baseline"):
            raise UserError("train.precision is 'bfloat16', which needs a GPU, or a processor with AVX2 and the native "
                            "library; set train.precision to float32 or auto")  # fmt: skip
        return self.precision if self.precision != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def pretrain(
    settings: TrainSettings,
    source: Source,
    validation: Source | None,
    model: LanguageModel,
    folder: Path,
    report: Report = silent,
) -> dict[str, Any]:
    """Next-token prediction: `train` with cross-entropy."""
    return train(settings, CrossEntropy(), source, validation, model, folder, report)


def train(
    settings: TrainSettings,
    objective: Objective,
    source: Source,
    validation: Source | None,
    model: LanguageModel,
    folder: Path,
    report: Report = silent,
    judge: Objective | None = None,
) -> dict[str, Any]:
    """Train a model in place; returns figures of the run. `judge` scores the held-out data, else the objective does.

    `folder` gets `metrics.jsonl`, `tensorboard/` and `checkpoints/`. If a checkpoint is there, the run goes on from it,
    bit for bit as if it had never stopped (on a CPU, with the same build of torch). Raises `Stopped` after SIGINT or
    SIGTERM, with a checkpoint written; `NotFinite` before weights would be spoilt; `UserError` for settings that do not
    fit the checkpoint and for a full disk.
    """
    precision = settings.precision_on(model.device)
    checkpoints = folder / "checkpoints"
    with ExitStack() as stack:
        wish, share = _enter(stack, settings, model)
        report = report if share.first else silent
        optimizer = adamw(model, settings.optimizer)
        state = _begin(settings, precision, objective, source, model, checkpoints, report)
        stack.enter_context(threads.using(state.threads))
        figures, held_out = state.figures, dict[str, float]()
        meter = Meter(model.config, model.device, precision, int(figures.get("tokens", 0)), figures.get("seconds", 0.0))
        if state.step:
            checkpointing.load(checkpointing.path_of(checkpoints, state.step), model, optimizer)
            model.touch()
        log = stack.enter_context(closing(book(folder, state, settings, share, report)))
        saver = stack.enter_context(closing(Saver(checkpoints, settings.keep, share, settings.asynchronous)))
        session = time.perf_counter()
        for step in range(state.step, settings.steps + 1):
            if validation is not None and (step % settings.validate_every == 0 or step == settings.steps):
                held_out = _look(settings, judge or objective, validation, model, precision, share)
                log.write({"step": step} | held_out)
            if step == settings.steps:
                break
            start, first = time.perf_counter(), step * settings.accumulate
            batches = [source.batch(first + i) for i in share.mine(settings.accumulate)]
            rate = settings.optimizer.learning_rate * settings.schedule.share(step, settings.steps)
            set_learning_rate(optimizer, rate)
            with _explained(step, settings, checkpoints):
                seen = train_step(model, objective, batches, optimizer, clip=settings.clip, precision=precision)
            figures = {"step": step + 1} | seen.terms | {"loss": seen.loss, "grad_norm": seen.grad_norm}
            figures |= {"learning_rate": rate} | meter.lap(batches, time.perf_counter() - start, share)
            log.write(figures)
            pace = (time.perf_counter() - session) / (step + 1 - state.step)
            report(_progress(figures, settings.steps, pace))
            signal = wish.signal  # read once: it may come at any moment
            stop = share.any(signal is not None)
            if stop or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                data = _digest(source.batch(first + settings.accumulate - 1))
                here = replace(state, step=step + 1, metrics_offset=log.sync(), data=data, figures=figures)
                path = saver.save(here, model, optimizer)
                if stop:
                    raise _stopped(saver, signal, step + 1, path)
    return figures | held_out | {"threads": state.threads, "peak_memory_bytes": peak_memory(model.device)}


def _enter(stack: ExitStack, settings: TrainSettings, model: LanguageModel) -> tuple[Wish, Share]:
    """What holds while a run lasts: signals are wishes, a CPU keeps its memory, linear maps compute in FP8, the model
    lies on its processes.
    """
    wish = stack.enter_context(stop_politely())
    if model.device.type == "cpu":
        stack.enter_context(kept())
    stack.enter_context(converted(model, settings.fp8))
    return wish, stack.enter_context(applied(model, settings.parallel, recompute=settings.recompute))


def book(folder: Path, state: TrainState, settings: TrainSettings, share: Share, report: Report) -> Log | NoLog:
    """The log of a run, which the first rank keeps."""
    return Log(folder, state.metrics_offset, state.step, settings.tensorboard, report) if share.first else NoLog()


def _stopped(saver: Saver, signal: str | None, step: int, path: Path) -> Stopped:
    saver.wait()
    return Stopped(f"{signal or 'a signal'}: stopped after step {step}, saved {path}; the same command goes on")


def _look(
    settings: TrainSettings,
    judge: Objective,
    validation: Source,
    model: LanguageModel,
    precision: str,
    share: Share,
) -> dict[str, float]:
    """The loss on held-out batches, dealt to the copies; one that gets none helps the others with the first batch."""
    mine = share.mine(settings.validate_batches)
    idle = -(-settings.validate_batches // share.axes.copies) - len(mine)
    held = [validation.batch(index) for index in [*mine, *[0] * idle]]
    return {"validation_loss": accumulate(model, judge, held, precision, learn=False, idle=idle)[0]}


def _begin(
    settings: TrainSettings,
    precision: str,
    objective: Objective,
    source: Source,
    model: LanguageModel,
    checkpoints: Path,
    report: Report,
) -> TrainState:
    """Where to start: the newest whole checkpoint if it fits, else step 0, with memory and threads looked at first."""
    share: Share = model.share or ALONE
    said = identity(settings, precision, objective, model)
    found = share.once(lambda: checkpointing.newest(checkpoints, report))
    if found is not None:
        path, state = found
        checkpointing.refuse_changes(path, state.identity, said)
        if _digest(source.batch(state.step * settings.accumulate - 1)) != state.data:
            raise UserError(
                f"cannot go on from {path}: the data are not those it was trained on; "
                f"bring them back, or remove {checkpoints} to start anew"
            )
        report({"event": "log", "text": f"going on from {path}"})
    first = source.batch(0)
    lengths = piece_of(first, share).lengths if settings.parallel.context > 1 else first.lengths
    stored = "float32" if model.device.type == "cpu" else precision
    check_memory(training_bytes(model, lengths, stored, settings.recompute), model.device, report)

    def trial() -> None:
        accumulate(model, objective, [first], precision, learn=True)
        model.zero_grad(set_to_none=True)

    recorded = found[1].threads if found is not None else None
    used = (
        threads.choose(settings.threads, recorded, trial, report, share)
        if model.device.type == "cpu"
        else torch.get_num_threads()
    )
    return replace(found[1], threads=used) if found is not None else TrainState(0, used, said)


def identity(settings: TrainSettings, precision: str, objective: Objective, model: LanguageModel) -> dict[str, Any]:
    """Every setting that changes what is computed, as JSON keeps it."""
    kept = {name: value for name, value in asdict(settings).items() if name not in FREE}
    aim: dict[str, Any] = asdict(objective) if is_dataclass(objective) and not isinstance(objective, type) else {}
    whole = {
        "train": kept | {"precision": precision},
        "objective": {"name": type(objective).__name__} | aim,
        "model": asdict(model.config) | {"dtype": str(model.dtype)},
    }
    return dict(json.loads(json.dumps(whole)))


def _digest(batch: Any) -> str:
    """SHA-256 of everything in a batch (a dataclass of arrays and plain values)."""
    digest = hashlib.sha256()
    for part in fields(batch):
        value = getattr(batch, part.name)
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


@contextmanager
def _explained(step: int, settings: TrainSettings, checkpoints: Path) -> Iterator[None]:
    """Add to a number that is not finite what to do about it."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(_way_out(str(error), step, settings, checkpoints)) from error


def _way_out(what: str, step: int, settings: TrainSettings, checkpoints: Path) -> str:
    """What to tell about a number that is not finite."""
    saved = checkpointing.latest(checkpoints)
    last = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    first = step * settings.accumulate
    return (
        f"step {step + 1}: {what}. The weights were not touched; {last}. To look on: batches {first} to "
        f"{first + settings.accumulate - 1} of the source made it. To get past it: lower train.optimizer.learning_rate "
        f"(now {settings.optimizer.learning_rate:g}) or lengthen train.schedule.warmup_steps, and start anew"
    )


def _progress(figures: dict[str, float], steps: int, pace: float) -> dict[str, Any]:
    """An event for a progress bar; `pace`: seconds a step."""
    left = timedelta(seconds=round(pace * (steps - figures["step"])))
    rate = f"{figures['tokens_per_second']:,.0f} tokens/s · MFU {figures['mfu']:.0%}"
    text = f"loss {figures['loss']:.3f} · {rate} · {left} left"
    return {"event": "progress", "done": figures["step"], "total": steps, "unit": "steps", "text": text}
