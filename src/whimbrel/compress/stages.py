"""The stages `compress` (importance, search, surgery: a smaller model) and `distill` (it learns from a teacher).

OUT/model/            Hugging Face folder of the child, with the tokenizer's files of its parent
OUT/candidates.json   compress: the shapes that fit, the chosen one first; candidates.txt is the table of them
OUT/found.json        compress: losses by shape and the order of the layers, so that an interrupted search goes on
OUT/metrics.jsonl     distill: as pretrain writes it; validation_loss is cross-entropy, whatever is learned from
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from whimbrel.compress.distill import Distillation
from whimbrel.compress.importance import DEPTH_SCORES, depths, measure
from whimbrel.compress.prune import cut, prove, select
from whimbrel.compress.quantize import quantize
from whimbrel.compress.search import Axes, Bound, Candidate, candidates, choose, estimated, largest, table
from whimbrel.data.pack import Batch
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import count
from whimbrel.model.checkpoint import resolve, save
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.train import threads
from whimbrel.train.loop import TrainSettings, train
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.stages import RowSettings, blend, token_folders, torch_device
from whimbrel.train.step import accumulate
from whimbrel.units import parse_bytes


@dataclass(frozen=True)
class DistillSettings(RowSettings):
    """A student that learns from a teacher on token shards."""

    labels: float = 0.0
    """Weight of the labels: 0 learns from the teacher alone, 1 from the labels alone (the control)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.labels <= 1:
            raise UserError(f"labels is {self.labels}; set it from 0 (the teacher alone) to 1 (the labels alone)")


@dataclass(frozen=True)
class CompressSettings(RowSettings):
    """A smaller model under a memory, a share of the parameters, or both. `train` is the trial of a candidate."""

    memory: str | None = None
    """What serving may take, for instance 22GiB; counted as `whimbrel plan` does."""
    context: int | None = None
    """Tokens of a sequence in that memory; null: max_position_embeddings."""
    batch: int = 1
    """Sequences at once in that memory."""
    dtype: str = "bfloat16"
    """Numbers of weights and cache in that memory."""
    share: float | None = None
    """Largest share of the parent's parameters."""
    axes: Axes = field(default_factory=Axes)
    depth_score: str = "mse"
    """Which layers go first: `mse` of the logits, looked at anew after each; or `cosine` of each layer, one look."""
    calibration: int = 64
    """Rows from which importance is read; each is a sample."""
    scored: int = 32
    """Candidates that are cut and scored on held-out rows."""
    finalists: int = 3
    """Candidates of the chosen depth that are tried by a short distillation."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=100))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is None and self.share is None and self.axes == Axes():
            raise UserError("memory and share are null: nothing is to be cut; set memory to 22GiB or share to 0.6, say")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"share is {self.share}; set share above 0 and at most 1, for example 0.6")
        if self.depth_score not in DEPTH_SCORES:
            raise UserError(f"depth_score is {self.depth_score!r}; {nearest(self.depth_score, DEPTH_SCORES)}")
        for name in ("batch", "calibration", "scored", "finalists"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; set {name} to 1 or more")
        count.dtype_bytes(self.dtype)

    def bound(self, parent: ModelConfig) -> Bound:
        """What a child of this parent may take."""
        memory = None if self.memory is None else parse_bytes(self.memory)
        parameters = None if self.share is None else int(self.share * count.total(parent))
        return Bound(memory, self.context or parent.max_position_embeddings, self.batch, self.dtype, parameters)


def run_compress(settings: CompressSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Cut the input `model` to the best shape within the bound, judged on the held-out rows of `tokens`."""
    folder, tokens = resolve(inputs["model"]), token_folders(inputs)
    parent = LanguageModel.load(folder, device=torch_device(settings.device)).requires_grad_(False)
    source = blend(settings, tokens)
    validation, trial = settings.held_out(tokens, report)
    if validation is None:
        raise UserError(
            f"heldout is {settings.heldout!r}, but candidates need held-out rows; set it to a shard there is"
        )
    held = [validation.batch(index) for index in range(trial.validate_batches)]
    cuts = itertools.count(1)

    def loss(model: LanguageModel) -> float:
        return accumulate(model, CrossEntropy(), held, trial.precision_on(model.device), learn=False)[0]

    def child(shape: ModelConfig, layers: Sequence[int]) -> LanguageModel:
        return cut(parent, select(found, parent.config, shape, layers), shape)

    def cut_loss(shape: ModelConfig, layers: Sequence[int]) -> float:
        report({"event": "progress", "done": next(cuts), "total": None, "unit": "cuts scored", "text": ""})
        said = f"{Candidate(shape, tuple(layers), 0, 0).name} of {layers}"
        return _once(out, said, lambda: loss(child(shape, layers)))

    def trial_loss(one: Candidate) -> float:
        report({"event": "log", "text": f"trial of {one.name}: {one.parameters:,} parameters, {one.cut_loss:.3f} now"})
        student, place = child(one.config, one.layers), out / "trials" / one.name
        figures = train(trial, Distillation(parent), source, validation, student, place, report, CrossEntropy())
        return float(figures["validation_loss"])

    trial = replace(trial, threads=threads.choose(trial.threads, None, lambda: loss(parent), report))
    with threads.using(trial.threads):
        samples = _samples(settings, tokens)
        least = min(settings.axes.values(parent.config)["layers"])
        kept = _once(out, "stay", lambda: [*depths(parent, samples, least, settings.depth_score, report).values()])
        stay = {len(layers): tuple(layers) for layers in kept}
        fits = candidates(parent.config, stay, settings.axes, settings.bound(parent.config))
        report({"event": "log", "text": f"{len(fits):,} shapes fit; those that no other contains are looked at"})
        found = measure(parent, samples)
        front = estimated(parent.config, largest(fits), cut_loss)
        front = choose(front, settings.scored, settings.finalists, lambda c: cut_loss(c.config, c.layers), trial_loss)
        winner = child(front[0].config, front[0].layers)
        figures = {"parent_loss": loss(parent), "cut_loss": loss(winner), "candidates": len(front)}
    _write(front, out, report)
    lineage = [f"cut out of {folder.name}, {count.total(parent.config):,} parameters in {parent.config.pattern}"]
    save(winner, out / "model", folder if (folder / "tokenizer.json").exists() else None, lineage=lineage)
    prove(winner, out / "model")
    for leftover in (out / "trials").glob("*/checkpoints"):
        shutil.rmtree(leftover)
    sizes = {"parameters": front[0].parameters, "parent_parameters": count.total(parent.config)}
    return sizes | figures | {"bytes": front[0].bytes}


def _once(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, or gave before an interruption: the file `found.json` remembers it."""
    file = out / "found.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in known:
        known[name] = make()
        with atomic_write(file) as opened:
            json.dump(known, opened)
    return known[name]


def _samples(settings: CompressSettings, tokens: Mapping[str, Path]) -> list[Batch]:
    """Rows of the calibration set, one a sample."""
    rows = blend(replace(settings, batch_rows=1, train=TrainSettings(steps=settings.calibration)), tokens)
    return [rows.batch(index) for index in range(settings.calibration)]


def _write(front: Sequence[Candidate], out: Path, report: Report) -> None:
    """candidates.json and candidates.txt."""
    lines = table(front)
    report({"event": "log", "text": "\n".join(lines[:12])})
    with atomic_write(out / "candidates.txt") as file:
        file.write("\n".join([*lines, ""]))
    rows = [asdict(one) | {"config": dict(zip(vars(Axes()), one.shape, strict=True))} for one in front]
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # NaN: not known
    with atomic_write(out / "candidates.json") as file:
        json.dump(plain, file, indent=2)


def run_distill(settings: DistillSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train the input `student` on `tokens` against the input `teacher`; goes on from what it finds in `out`."""
    device, folder, tokens = torch_device(settings.device), resolve(inputs["student"]), token_folders(inputs)
    teacher = LanguageModel.load(inputs["teacher"], device=device)
    student = LanguageModel.load(folder, device=device)
    source = blend(settings, tokens)
    report({"event": "log", "text": source.preview()})
    validation, limits = settings.held_out(tokens, report)
    objective = Distillation(teacher, settings.labels)
    figures = train(limits, objective, source, validation, student, out, report, judge=CrossEntropy())
    if validation is not None:
        held = [validation.batch(index) for index in range(limits.validate_batches)]
        figures["teacher_loss"] = accumulate(teacher, CrossEntropy(), held, learn=False)[0]
    lineage = [f"{folder.name}, taught by {resolve(inputs['teacher']).name} (labels: {settings.labels:g})"]
    save(student, out / "model", folder if (folder / "tokenizer.json").exists() else None, lineage=lineage)
    return figures


@dataclass(frozen=True)
class QuantizeSettings:
    """Few bits, as `whimbrel quantize` does it."""

    to: str = "int8"
    """`int8` or `int4`."""
    group: int = 32
    """Inputs that share a scale: 32, 64 or 128."""
    method: str = "rtn"
    """`rtn`, to the nearest, or `gptq`, calibrated on the text."""
    text: tuple[str, ...] = ()
    """Files of plain text for calibration and perplexity; none: a page that comes with the package."""


def run_quantize(settings: QuantizeSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Write the input `model` with few bits as OUT/model; perplexities before and after among the figures."""
    shutil.rmtree(out / "model", ignore_errors=True)
    texts = [Path(text) for text in settings.text]
    made = quantize(
        str(inputs["model"]),
        out / "model",
        to=settings.to,
        group=settings.group,
        method=settings.method,
        texts=texts,
        report=report,
    )
    return {name: value for name, value in asdict(made).items() if isinstance(value, int | float)}
