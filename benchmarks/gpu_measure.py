"""What a GPU gives: a check of every kernel, then each row of figures, in one command that outlives any row's failure.

    python benchmarks/gpu_measure.py --out results.jsonl [--rows decode,scan] [--seconds 540]
    python benchmarks/gpu_measure.py --out results.jsonl --dry-run        # tiny shapes on a CPU, kernels interpreted

First the floors of the real shapes are printed (`gpu_floors.py`: an H200's own words, what `whimbrel plan` predicts).
Then the rows, by worth. Each is a process of its own; what it finds is appended to --out as it comes (JSON lines: row,
figures, floor, share of the floor). A row may take what is left but the least of those after it, and at most its own
most; one for which too little is left is skipped, with a line that says so. After every row all is written to
results.json beside --out: machine, command, floors, records. A table is printed last. An operation that fails the
check, or that the check did not come to, is named, and runs in torch's form in every row after it. Weights are random
and made on the device; depths are filled with random numbers, not read. A dry run proves that the script runs; its
figures mean nothing and say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
import gpu_floors  # noqa: E402
from gpu_floors import CAP, Card, Record  # noqa: E402

GRACE = 5.0
"""Seconds before its limit at which a row should be done by itself."""


@dataclass(frozen=True)
class Place:
    """Where the rows run, and whether the figures count."""

    dry: bool
    end: float = float("inf")
    """Of `time.perf_counter`: when the row should be done."""
    known: tuple[float, ...] = ()
    """Bytes/s of a copy and operations/s of a product, where this run has measured them."""
    skip: int = 0
    """Cases of the check that another process has been through."""

    @property
    def left(self) -> float:
        """Seconds that the row still has."""
        return self.end - time.perf_counter()

    @property
    def memory(self) -> int:
        """Bytes of the whole card; a dry run plans for an H200."""
        import torch

        return gpu_floors.H200.memory if self.dry else torch.cuda.get_device_properties(0).total_memory

    @property
    def card(self) -> Card:
        """What floors divide by: the ceilings measured here."""
        bandwidth, peak = self.known or speed(self)
        return Card(bandwidth, peak, 2 * peak, self.memory)

    def fresh(self) -> None:
        """Nothing left of what was before, and peak memory counted anew."""
        gc.collect()
        if not self.dry:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float32 if self.dry else torch.bfloat16

    def model(self, name: str) -> Any:
        """A model with random weights in the shape of a preset; a dry run has small shapes of the same kind."""
        from whimbrel.model import LanguageModel
        from whimbrel.model.presets import preset

        return LanguageModel(self.shape(preset(name)), device=self.device, dtype=self.dtype).initialise(0)

    def shape(self, config: Any) -> Any:
        """The shape itself, or its small twin: the first layers that hold every kind, narrow."""
        if not self.dry:
            return config
        narrow = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        narrow |= {"head_dim": 16, "vocab_size": 256, "pattern": "M-M*-" if "M" in config.pattern else "*-*-"}
        mamba = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2}
        return replace(config, **narrow, **(mamba if "M" in config.pattern else {}))

    def wait(self) -> None:
        if not self.dry:
            import torch

            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], most: float = 2.0) -> float:
        """Median seconds of some work: one run to warm up, then as many as `most` seconds hold, three at least, or one
        where a run takes longer than that. A dry run works once.
        """
        begin = time.perf_counter()
        work()
        self.wait()
        times = [time.perf_counter() - begin] * self.dry
        end = time.perf_counter() + (0.0 if self.dry else most)
        least = 1 if self.dry or time.perf_counter() - begin > 2 * most else 3
        while len(times) < least or time.perf_counter() < end:
            begin = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def peak_bytes(self) -> int:
        import torch

        return 0 if self.dry else torch.cuda.max_memory_allocated()


@contextmanager
def capped(place: Place, limit: float) -> Iterator[None]:
    """Let torch have so many bytes of the card; all of them again after the block."""
    import torch

    place.fresh()
    if place.dry:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / place.memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fitting(place: Place, model: Any, context: int, batch: int) -> Any:
    """A step of decoding of so many sequences, or of as many as fit: a tenth fewer at each try."""
    import torch

    from whimbrel.engine import bench

    while True:
        try:
            task = bench.Task(model, context, batch)
            task.decode()
            return task
        except torch.OutOfMemoryError:
            task, batch = None, batch * 9 // 10
            torch.cuda.empty_cache()
            if not batch:
                raise


def reading(place: Place, model: Any, tokens: int) -> float:
    """Seconds to read one prompt, in the longest chunks that fit."""
    import torch

    from whimbrel.engine import bench

    for chunk in (8192, 2048, 512):
        try:
            task = bench.Task(model, tokens, 1)
            task.prompt = min(task.prompt, chunk)
            return place.seconds(task.prefill, 0.5)
        except torch.OutOfMemoryError:
            task = None
            torch.cuda.empty_cache()
    raise MemoryError(f"a prompt of {tokens} tokens does not fit, even 512 at a time")


def attempted(labels: Record, work: Callable[..., Record], *given: Any) -> Record:
    """What some work found of what it is given, or why it failed, with its labels: one failure is not the row's."""
    try:
        return labels | work(*given)
    except Exception as fault:
        return labels | {"failed": f"{type(fault).__name__}: {str(fault)[:300]}"}


def ceilings(place: Place) -> Iterator[Record]:
    """A copy (bytes read and written), a bfloat16 product on random numbers, and an FP8 product."""
    import torch

    n = 64 if place.dry else 8192

    def copy() -> Record:
        source = torch.randn(n * n * (1 if place.dry else 16), device=place.device)
        target = torch.empty_like(source)
        return {"bytes_per_second": 2 * source.nbytes / place.seconds(lambda: target.copy_(source), 1.0)}

    def product(eight: bool) -> Record:
        left, right = (torch.randn(n, n, device=place.device, dtype=place.dtype) for _ in range(2))
        one = torch.ones((), device=place.device)
        if not eight:
            return {"flops": 2 * n**3 / place.seconds(lambda: left @ right, 1.0)}
        codes = [v.to(torch.float8_e4m3fn) for v in (left, right)]
        made = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        run = lambda: torch._scaled_mm(codes[0], codes[1].t(), one, one, **made)  # noqa: E731
        return {"flops": 2 * n**3 / place.seconds(run, 1.0)}

    yield attempted({"what": "copy"}, copy)
    yield attempted({"what": "product", "dtype": str(place.dtype)}, lambda: product(False))
    yield attempted({"what": "product", "dtype": "float8_e4m3fn"}, lambda: product(True))


def speed(place: Place) -> tuple[float, float]:
    """Bytes/s of a copy and operations/s of a product, measured in this process, where no row before has."""
    copy, product = (record for record, _ in zip(ceilings(place), range(2), strict=False))
    return copy["bytes_per_second"], product["flops"]


def in_three_kernels() -> None:
    """Let Mamba-2 layers decode in a kernel for each part from here on."""
    from whimbrel.ops import triton as kernels
    from whimbrel.ops.triton import mamba

    kernels.mamba_step, mamba.WIDEST = mamba.mamba_step, 0


def decode(place: Place) -> Iterator[Record]:
    """Decoding of the 9B shape at 4k: bytes that must move / time, as a share of the measured bandwidth. Then the
    smaller batches again with a kernel for each part of a Mamba-2 layer, beside which the one kernel must win.
    """
    from whimbrel import ops
    from whimbrel.engine import bench

    card, kernels = place.card, ops.gpu()[0]
    model, context = place.model(gpu_floors.PEERS[0]), 64 if place.dry else gpu_floors.DEPTH
    batches = (1, 2) if place.dry else gpu_floors.BATCHES
    whole = kernels is not None and kernels.mamba_step is kernels.mamba.mamba_step and kernels.mamba.WIDEST > 0
    for at, batch in enumerate((*batches, *batches[: 3 * whole])):
        if at == len(batches):
            in_three_kernels()

        def work(batch: int) -> Record:
            task = bench.Task(model, context, batch)
            seconds, moved = place.seconds(task.decode), task.bytes("decode")
            return {"seconds": seconds, "tokens_per_second": batch / seconds, "floor_seconds": moved / card.bandwidth,
                    "share": moved / seconds / card.bandwidth, "bandwidth": card.bandwidth}  # fmt: skip

        yield attempted({"batch": batch, "context": context, "one_kernel": whole and at < len(batches)}, work, batch)
        place.fresh()


def peers(place: Place, jobs: Sequence[tuple[int, int]] = gpu_floors.JOBS[:1]) -> Iterator[Record]:
    """Hybrid beside dense in the same engine: output tokens/s of prompts and answers, capped and on the whole card.

    The batch is the largest that `plan` admits, whole contexts reserved or paged on demand. Seconds of a request: its
    share of reading the prompt, and its tokens at the mean depth, timed as one step of that batch there.
    """
    card, jobs = place.card, [(32, 32)] if place.dry else jobs
    rates: dict[tuple[Any, ...], tuple[float, float]] = {}
    for name in gpu_floors.PEERS:
        model, prompts = place.model(name), dict[int, float]()
        for into, out in jobs:
            for limit in (CAP, card.memory):
                for rule in gpu_floors.RULES:
                    key = {"cap": limit, "in": into, "out": out, "rule": rule}
                    found = attempted({"model": name} | key, _serve, place, card, model, name, key, prompts)
                    rates[name, *key.values()] = found.get("output_tokens_per_second", 0.0), found.get("predicted", 0.0)
                    yield found
                    other = rates.get((gpu_floors.PEERS[0], *key.values()), (0.0, 0.0))
                    mine = rates[name, *key.values()]
                    if name == gpu_floors.PEERS[1] and other[0] and mine[0]:
                        ratio, predicted = other[0] / mine[0], other[1] / mine[1]
                        yield {"ratio": ratio, "predicted_ratio": predicted, "share": ratio / predicted} | key
        del model


def _serve(place: Place, card: Card, model: Any, name: str, key: Record, prompts: dict[int, float]) -> Record:
    """One model at one kind of work; prompts already timed are in `prompts`."""
    from whimbrel.model.presets import preset

    limit, into, out, rule = key.values()
    planned = gpu_floors.served(preset(name), card, limit, into, out, rule)
    if not (batch := 2 if place.dry else planned["batch"]):
        return {"batch": 0}
    with capped(place, limit):
        step = fitting(place, model, into + out // 2, batch)
        batch, moved = step.batch, step.bytes("decode")
        seconds = place.seconds(step.decode, 1.0)
        step = None
        if into not in prompts:
            place.fresh()
            prompts[into] = reading(place, model, into)
        rate = batch * out / (batch * prompts[into] + out * seconds)
        return {"batch": batch, "planned_batch": planned["batch"], "step_seconds": seconds,
                "floor_seconds": planned["step_seconds"], "share": moved / card.bandwidth / seconds,
                "prefill_seconds": prompts[into], "output_tokens_per_second": rate,
                "predicted": planned["tokens_per_second"], "peak_bytes": place.peak_bytes()}  # fmt: skip


def peers_more(place: Place) -> Iterator[Record]:
    """The same at short prompts with long answers, and long prompts with short ones."""
    yield from peers(place, gpu_floors.JOBS[1:])


def long_prompts(place: Place) -> Iterator[Record]:
    """The 8B hybrid beside Llama-3.1-8B at 65,536 in and 1,024 out under 80 GB, prefill and decoding apart."""
    from whimbrel.model.presets import preset

    card, into = place.card, 32 if place.dry else gpu_floors.LONG[0]
    found = {}
    for name in gpu_floors.LONG_PEERS:
        planned, decoding, prefill = gpu_floors.long_served(preset(name), card)

        def work(
            name: str = name, planned: int = planned, decoding: float = decoding, prefill: float = prefill
        ) -> Record:
            with capped(place, gpu_floors.LONG_CAP):
                model = place.model(name)
                task = fitting(place, model, into, 2 if place.dry else planned)
                batch, moved, seconds = task.batch, task.bytes("decode"), place.seconds(task.decode, 1.0)
                task = None
                place.fresh()
                prompt = reading(place, model, into)
                found[name] = (batch / seconds, into / prompt, decoding, prefill)
                return {"batch": batch, "planned_batch": planned, "decode_tokens_per_second": batch / seconds,
                        "prefill_tokens_per_second": into / prompt, "share": moved / card.bandwidth / seconds,
                        "prefill_share": into / prompt / prefill, "peak_bytes": place.peak_bytes()}  # fmt: skip

        yield attempted({"model": name}, work)
    if len(found) == 2:
        a, b = found.values()
        ratios, predicted = (a[0] / b[0], a[1] / b[1]), (a[2] / b[2], a[3] / b[3])
        yield {"ratio": ratios[0], "predicted_ratio": predicted[0], "share": ratios[0] / predicted[0],
               "prefill_ratio": ratios[1], "predicted_prefill_ratio": predicted[1],
               "prefill_share": ratios[1] / predicted[1]}  # fmt: skip


def whole_context(place: Place) -> Iterator[Record]:
    """131,072 tokens of the 9B shape under 22.06 GiB: read in chunks, then 64 tokens; peak memory against `plan`."""
    from whimbrel.engine import bench
    from whimbrel.engine.plan import plan

    context, tokens = (64, 2) if place.dry else (gpu_floors.WHOLE, gpu_floors.AFTER)
    with capped(place, CAP):
        model = place.model(gpu_floors.PEERS[0])
        task = bench.Task(model, context, 1)
        task.prompt = 32 if place.dry else gpu_floors.CHUNK
        begin = time.perf_counter()
        task.prefill()
        place.wait()
        reading = time.perf_counter() - begin
        seconds = place.seconds(task.decode, 1.0)
        made = plan(model.config, memory=int(CAP), context=context + tokens, prefill_tokens=task.prompt)
        yield {"context": context, "prefill_seconds": reading, "seconds": seconds, "peak_bytes": place.peak_bytes(),
               "planned_bytes": made.total_bytes, "share": place.peak_bytes() / made.total_bytes}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of packed random tokens."""

    tokens_T: Any
    targets_T: Any
    lengths: tuple[int, ...]

    @classmethod
    def random(cls, tokens: int, documents: int, vocabulary: int) -> Row:
        import numpy as np

        ids = np.random.default_rng(0).integers(0, vocabulary, tokens + 1)
        return cls(ids[:-1], ids[1:], (tokens // documents,) * documents)


def trainer(
    place: Place, config: Any, tokens: int, documents: int, recompute: bool, fp8: str = "none", ends: int = 4
) -> Any:
    """One step of training as a function of a row of tokens (its own if none is given), the model, and that row."""
    from whimbrel.model import LanguageModel
    from whimbrel.parallel.recompute import recomputed
    from whimbrel.train.objective import CrossEntropy
    from whimbrel.train.optimizer import OptimizerSettings, adamw
    from whimbrel.train.precision import Fp8, converted
    from whimbrel.train.step import train_step

    model = LanguageModel(config, device=place.device).initialise(0)
    optimizer, row = adamw(model, OptimizerSettings()), Row.random(tokens, documents, config.vocab_size)
    precision = "float32" if place.dry else "bfloat16"

    def step(given: Row = row) -> None:
        with recomputed(model, recompute), converted(model, Fp8(recipe=fp8, ends=ends)):
            train_step(model, CrossEntropy(), [given], optimizer, clip=1.0, precision=precision)

    return step, model, row


def train(place: Place) -> Iterator[Record]:
    """Steps of hybrids of about 1B and 4B on 8,192 packed tokens, in bfloat16 and in each FP8 recipe: MFU."""
    from whimbrel.model import count

    peak = place.card.peak
    tokens, documents = (64, 4) if place.dry else (gpu_floors.PACKED, gpu_floors.DOCUMENTS)
    rates: dict[str, float] = {}
    # What the table asks for first: both shapes in bfloat16, then the recipe of the larger.
    order = [("1B", "none"), ("4B", "none"), ("4B", "tensorwise"), ("4B", "blockwise"), ("4B", "rowwise"),
             ("1B", "tensorwise"), ("1B", "blockwise"), ("1B", "rowwise")]  # fmt: skip
    for name, recipe in order[:5] if place.dry else order:
        config, recompute, _, _ = gpu_floors.TRAINED[name]
        config = place.shape(config)
        flops = count.flops_per_token(config, count.mean_context([tokens // documents] * documents), training=True)

        def work(name: str = name, recipe: str = recipe, config: Any = config, flops: float = flops,
                 recompute: bool = recompute) -> Record:  # fmt: skip
            step, _, _ = trainer(place, config, tokens, documents, recompute, recipe, 0 if place.dry else 4)
            seconds = place.seconds(step, 2.0)
            rates[name + recipe] = tokens / seconds
            more = {"over_bfloat16": rates[name + recipe] / rates[name + "none"]} if name + "none" in rates else {}
            return {"parameters": count.total(config), "seconds": seconds, "tokens_per_second": tokens / seconds,
                    "flops": tokens * flops / seconds, "share": tokens * flops / seconds / peak,
                    "recompute": recompute, "peak_bytes": place.peak_bytes()} | more  # fmt: skip

        place.fresh()
        yield attempted({"model": name, "fp8": recipe}, work)


def scan(place: Place) -> Iterator[Record]:
    """The scan, forward, and forward and backward, against max(bytes / bandwidth, operations / peak)."""
    import torch
    from gpu_check import scan_inputs

    from whimbrel import ops
    from whimbrel.ops import Segments

    card, shapes = place.card, [("tiny", 4, 2, 16, 16, 64)] if place.dry else []
    for name, heads, width, size in () if place.dry else gpu_floors.SCANS:
        shapes += [(name, heads, 8, width, size, length) for length in gpu_floors.LENGTHS]
    for shape, heads, groups, width, size, tokens in shapes:
        with torch.device(place.device):  # numbers made there: the host would take longer than the row may
            row = [v.float() for v in scan_inputs(tokens, heads, groups, width, size, 1)[:6]]
        for at in (0, 3, 4):
            row[at] = row[at].to(place.dtype)
        leaves = [v.requires_grad_() for v in row]
        cut, up = Segments.of([tokens], device=place.device), torch.randn_like(row[0])

        def forward(leaves: Any = leaves, cut: Any = cut) -> Any:
            return ops.ssd(*leaves, cut)[0]

        def both(leaves: Any = leaves, up: Any = up, forward: Any = forward) -> Any:
            return torch.autograd.grad(forward(), leaves, up)

        bounds = gpu_floors.scan_floors(heads, groups, width, size, tokens, row[0].element_size(), card)
        for name, run in (("forward", forward), ("forward+backward", both)):
            moved, flops, floor = bounds[name]

            def work(run: Any = run, moved: float = moved, flops: float = flops, floor: float = floor) -> Record:
                seconds = place.seconds(run, 0.3)
                return {"seconds": seconds, "flops": flops / seconds, "bytes_per_second": moved / seconds,
                        "floor_seconds": floor, "share": floor / seconds}  # fmt: skip

            yield attempted({"what": name, "model": shape, "tokens": tokens}, work)
        del row, leaves, up, forward, both
        place.fresh()


def fp8(place: Place) -> Iterator[Record]:
    """Each FP8 recipe: noise of a layer, whether we refuse what the device refuses, losses of a small hybrid."""
    from gpu_fp8 import curves, decoding, layouts, noise

    yield from noise(place)
    yield from decoding(place)
    yield from layouts(place)
    yield from curves(place, trainer)


def long_step(place: Place) -> Iterator[Record]:
    """One sequence of 131,072 tokens (1B) and of 524,288 (290M) through a training step, with recomputation. What
    cannot fit by plan is said and not tried.
    """
    from whimbrel.train.memory import training_bytes

    for name, tokens in gpu_floors.LONG_STEPS:
        tokens = 96 if place.dry else tokens

        def work(name: str = name, tokens: int = tokens) -> Record:
            from whimbrel.model import LanguageModel

            config = place.shape(gpu_floors.shape(name))
            parts = training_bytes(LanguageModel(config, device="meta"), [tokens],
                                   "float32" if place.dry else "bfloat16", True)  # fmt: skip
            if (planned := sum(parts.values())) > place.memory:
                return {"planned_bytes": planned, "skipped": "does not fit by plan"}
            step, _, _ = trainer(place, config, tokens, 1, recompute=True)
            begin = time.perf_counter()
            step()
            place.wait()
            return {"seconds": time.perf_counter() - begin, "peak_bytes": place.peak_bytes(),
                    "planned_bytes": planned, "share": place.peak_bytes() / planned}  # fmt: skip

        place.fresh()
        yield attempted({"model": name, "tokens": tokens}, work)


def few_bits(place: Place) -> Iterator[Record]:
    """Decoding of the 9B shape at 4k with weights in int8, int4 and FP8, as `decode` does."""
    from gpu_bits import decoding

    yield from decoding(place, speed(place)[0])


def prepared(place: Place) -> Record:
    """Let a process for each core compile the check's kernels into Triton's cache, while this one opens the card."""
    import torch

    command = [sys.executable, str(HERE / "gpu_prepare.py"), "--seconds", f"{min(25.0, place.left / 2):.0f}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if torch.cuda.get_device_capability() != (9, 0):
        return {"note": "compiled for an H200 alone: this is another card"}
    begin = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        torch.zeros(1, device=place.device)
        said, _ = process.communicate()
    return json.loads(said) | {"seconds": time.perf_counter() - begin}


def check(place: Place) -> Iterator[Record]:
    """Every kernel against float64 and `ops/torch`, an operation a record; the last sums up."""
    import torch
    from gpu_check import checks

    if not place.dry and not place.skip:
        found = attempted({"what": "kernels compiled beforehand"}, prepared, place)
        yield {"note" if key == "failed" else key: value for key, value in found.items()}
    yield from checks(torch.device(place.device), small=place.dry, end=place.end, skip=place.skip)


@dataclass(frozen=True)
class Limits:
    """What runs a row, and the seconds below which it is not begun and after which it is stopped."""

    run: Callable[[Place], Iterator[Record]]
    least: float
    most: float


ROWS: dict[str, Limits] = {
    "check": Limits(check, 30, 60), "ceilings": Limits(ceilings, 12, 30), "decode": Limits(decode, 25, 60),
    "peers": Limits(peers, 45, 110), "train": Limits(train, 40, 100), "whole_context": Limits(whole_context, 25, 50),
    "scan": Limits(scan, 20, 45), "long_prompts": Limits(long_prompts, 40, 80), "fp8": Limits(fp8, 30, 150),
    "long_step": Limits(long_step, 30, 60), "few_bits": Limits(few_bits, 30, 90),
    "peers_more": Limits(peers_more, 60, 200),
}  # fmt: skip
"""The rows by worth."""


def share(names: Sequence[str], left: float) -> float:
    """Seconds for the first of these rows when so many are left: all but the least of the others, at most its most; its
    own least where that does not leave as much; 0 if not even that is left.
    """
    first = ROWS[names[0]]
    if left < first.least:
        return 0.0
    return max(first.least, min(first.most, left - sum(ROWS[name].least for name in names[1:])))


def child(name: str, place: Place, out: Path, without: Sequence[str] = ()) -> int:
    """Run one row here; each record is on disk before the next begins. Operations `without` run in torch's form."""
    import torch

    torch.manual_seed(0)
    if place.dry:
        torch.set_num_threads(1)
        sys.path.insert(0, str(HERE.parent / "tests" / "ops"))
        import kernels  # noqa: F401  (mends the interpreter)

        from whimbrel import ops

        context: Any = ops.using("triton")
    else:
        context = torch.inference_mode(False)
    if without:
        from whimbrel import ops

        for operation in without:
            setattr(ops.gpu()[0], operation, getattr(ops.vectorised, operation))
        if "mamba_step" in without and not {"conv_step", "ssd_step", "gated_norm"} & set(without):
            in_three_kernels()
    good, note = True, {"without": list(without)} if without else {}
    with context, out.open("a", encoding="utf-8") as file:
        try:
            for record in ROWS[name].run(place):
                good = good and record.get("ok", True) and not record.get("failed")
                file.write(json.dumps({"row": name, "dry": place.dry} | note | record, default=str) + "\n")
                file.flush()
        except Exception as fault:
            file.write(
                json.dumps({"row": name, "dry": place.dry, "failed": f"{type(fault).__name__}: {fault}"[:600]}) + "\n"
            )
            raise
    return 0 if good else 1


def parent(names: list[str], place: Place, out: Path, budget: float) -> int:
    """Print the floors, run rows one after another within the budget, and print what they found."""
    begin, bad, without = time.perf_counter(), [], []
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if place.dry else {})
    out.parent.mkdir(parents=True, exist_ok=True)
    floors = gpu_floors.floors()
    print("An H200 by its own words, real shapes; least and aim are what the shares asked for come to.")
    print(gpu_floors.as_text(floors), flush=True)
    append(out, {"row": "machine", "dry": place.dry, "seconds": budget} | machine(place))
    first = len(records(out)) - 1
    for at, name in enumerate(names):
        left = budget - (time.perf_counter() - begin)
        limit = left if place.dry else share(names[at:], left)
        if limit < (15 if place.dry else 1):
            bad.append(f"{name}: skipped, {left:.0f} s are left and it takes {ROWS[name].least:.0f} at least")
            append(out, {"row": name, "dry": place.dry, "skipped": bad[-1]})
            write(out, place, floors, records(out)[first:], bad)
            continue
        command = [sys.executable, __file__, "--row", name, "--out", str(out), *(["--dry-run"] if place.dry else [])]
        command += ["--without", ",".join(without)] if without else []
        command += ["--seconds", f"{limit - GRACE:.1f}", "--ceilings", measured(records(out)[first:])]
        started = time.perf_counter()
        code = ended(command, environment, limit)
        while name == "check" and (seen := lost(records(out)[first:])):  # the others in a new process
            rest = limit - (time.perf_counter() - started)
            if rest < 2 * GRACE:
                break
            more = ["--skip", str(seen), "--seconds", f"{rest - GRACE:.1f}"]
            code = ended([*command, *more], environment, rest) or code
        if code:
            bad.append(f"{name}: " + (f"stopped after {limit:.0f} s" if code == 124 else f"ended with {code}"))
            append(out, {"row": name, "dry": place.dry, "ended": bad[-1]})
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if name == "check" and code:
            without = wrong(out)
            bad.append(f"in torch's form from here on: {', '.join(without)}")
        write(out, place, floors, records(out)[first:], bad)
    print(table(out))
    print("\n".join(f"FAILED {text}" for text in bad) or "every row ran")
    return 1 if bad else 0


def ended(command: list[str], environment: dict[str, str], limit: float) -> int:
    """How a row's process ended: 124 if it was stopped."""
    try:
        return subprocess.run(command, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124


def lost(found: list[Record]) -> int:
    """Cases that the check has been through, if the last of them broke its process; else 0."""
    rows = [record for record in found if record["row"] == "check"]
    return sum("case" in record for record in rows) if rows and "lost" in rows[-1] else 0


def append(out: Path, record: Record) -> None:
    """A line more, on a line of its own: a row that was stopped may have left one torn."""
    torn = out.exists() and not out.read_bytes().endswith(b"\n") and out.stat().st_size > 0
    with out.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


def records(out: Path) -> list[Record]:
    """What the file holds; a line that a killed row left torn is left out."""
    found = []
    for line in out.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def measured(found: list[Record]) -> str:
    """The ceilings of this run as an option of the next row: empty where they are not both there."""
    rows = [record for record in found if record["row"] == "ceilings"]
    copy = [r["bytes_per_second"] for r in rows if "bytes_per_second" in r]
    product = [r["flops"] for r in rows if "flops" in r and "float8" not in r["dtype"]]
    return f"{copy[0]},{product[0]}" if copy and product else ""


def write(out: Path, place: Place, floors: list[Record], found: list[Record], bad: list[str]) -> None:
    """All of this run as one file beside `out`, whole or not at all."""
    words = [out.name if word == str(out) else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/gpu_measure.py", *words])
    note = "a dry run: tiny shapes on a CPU, kernels interpreted; only the floors mean something" if place.dry else ""
    said = found[0] | {"command": command, "note": note, "failed": bad, "floors": floors, "records": found[1:]}
    whole = out.with_suffix(".json")
    torn = whole.with_suffix(".torn")
    lines = [f" {json.dumps(key)}: {listed(value)}" for key, value in said.items()]
    torn.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    torn.replace(whole)


def listed(value: Any) -> str:
    """JSON, records one a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in value) + "\n ]"
    return json.dumps(value)


KERNELS = {"scan": ["ssd"], "cross_entropy": ["cross_entropy", "log_prob"]}
"""Case of the check -> the operations it is about, where they are not called so."""


def wrong(out: Path) -> list[str]:
    """Operations that the last check found wrong or did not come to."""
    from whimbrel import ops

    every = [name for name in getattr(ops.gpu()[0], "__all__", []) if hasattr(ops.vectorised, name)]
    found = records(out)
    begun = max((at for at, record in enumerate(found) if record["row"] == "machine"), default=0)
    checks = [record for record in found[begun:] if record["row"] == "check" and "case" in record]
    good = named(record["case"] for record in checks if record["ok"])
    bad = named(record["case"] for record in checks if not record["ok"])
    return [name for name in every if name in bad or name not in good]


def named(cases: Iterator[str]) -> set[str]:
    """The operations that cases of the check are about."""
    first = {case.split(" ")[0] for case in cases}
    return {name for word in first for name in KERNELS.get(word, [word])}


def machine(place: Place) -> Record:
    """Date, commit, versions and device. The process that waits for the rows must not open the card itself."""
    import torch

    def ask(*command: str) -> str:
        """What a program says, in the tree of this script; `unknown` without it."""
        if not shutil.which(command[0]):
            return "unknown"
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip() or "unknown"

    smi = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    gpu = "none (dry run)" if place.dry else ask(*smi)
    said = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": ask("git", "rev-parse", "--short", "HEAD")}
    return said | {"torch": torch.__version__, "gpu": gpu}


def table(out: Path) -> str:
    """The records for people: one line each, shares as percentages."""
    lines = []
    for record in records(out):
        words = []
        for name, value in record.items():
            if name not in ("row", "dry"):
                number = (
                    f"{value:.1%}" if "share" in name else f"{value:,.4g}" if isinstance(value, float) else str(value)
                )
                words.append(f"{name}={number}")
        lines.append(f"{record['row']:<14} {'DRY ' if record['dry'] else ''}{' '.join(words)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--row")
    parser.add_argument("--without", default="")
    parser.add_argument("--ceilings", default="")
    parser.add_argument("--skip", type=int, default=0)
    said = parser.parse_args()
    if said.out.suffix in (".json", ".torn"):
        works = said.out.with_suffix(".jsonl")
        parser.error(f"--out is {said.out}, where the summary is written; set --out to {works}")
    known = tuple(float(word) for word in said.ceilings.split(",") if word)
    place = Place(said.dry_run, time.perf_counter() + said.seconds, known, said.skip)
    if said.row:
        return child(said.row, place, said.out, [word for word in said.without.split(",") if word])
    names = said.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    return parent(names, place, said.out, said.seconds)


if __name__ == "__main__":
    sys.exit(main())
