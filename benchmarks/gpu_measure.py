"""What a GPU gives: a check of every kernel, then each row of figures, in one command that outlives any row's failure.

    python benchmarks/gpu_measure.py --out results.jsonl [--rows decode,scan] [--seconds 540]
    python benchmarks/gpu_measure.py --out results.jsonl --dry-run        # tiny shapes on a CPU, kernels interpreted

Each row is a process of its own with a limit of time; what it finds is appended to --out as it comes (JSON lines: row,
figures, floor, share of the floor), and a table is printed last. An operation that fails the check is named, and runs
in torch's form in every row after it. Weights are random and made on the device; depths are filled with random numbers,
not read. A dry run proves that the script runs; its figures mean nothing and say so.
"""

from __future__ import annotations

import argparse
import json
import os
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
Record = dict[str, Any]
CAP = 22.06 * 2**30
"""Bytes of an A10G, the card of the Nano 2 report."""


@dataclass(frozen=True)
class Place:
    """Where the rows run, and whether the figures count."""

    dry: bool

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
        """Median seconds of some work; at least three runs after one to warm up, as many as `most` seconds hold."""
        work()
        self.wait()
        times: list[float] = []
        end = time.perf_counter() + (0.0 if self.dry else most)
        while len(times) < (1 if self.dry else 3) or time.perf_counter() < end:
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
    """Let torch have so many bytes of the card."""
    import torch

    if not place.dry:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
        torch.cuda.reset_peak_memory_stats()
    yield


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


def ceilings(place: Place) -> Iterator[Record]:
    """A copy (bytes read and written), a bfloat16 product on random numbers, and an FP8 product."""
    import torch

    n = 64 if place.dry else 8192
    source = torch.randn(n * n * (1 if place.dry else 16), device=place.device)
    target = torch.empty_like(source)
    yield {"what": "copy", "bytes_per_second": 2 * source.nbytes / place.seconds(lambda: target.copy_(source))}
    left, right = (torch.randn(n, n, device=place.device, dtype=place.dtype) for _ in range(2))
    yield {"what": "product", "dtype": str(place.dtype), "flops": 2 * n**3 / place.seconds(lambda: left @ right)}
    codes = [v.to(torch.float8_e4m3fn) for v in (left, right)]
    one = torch.ones((), device=place.device)

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(codes[0], codes[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    yield {"what": "product", "dtype": "float8_e4m3fn", "flops": 2 * n**3 / place.seconds(fp8)}


def speed(place: Place) -> tuple[float, float]:
    """Bytes/s of a copy and operations/s of a product, measured in this process: the floors' ceilings."""
    found = [*ceilings_without_fp8(place)]
    return found[0], found[1]


def ceilings_without_fp8(place: Place) -> Iterator[float]:
    for number, record in zip(range(2), ceilings(place), strict=False):
        yield record["bytes_per_second" if number == 0 else "flops"]


def decode(place: Place) -> Iterator[Record]:
    """Decoding of the 9B shape at 4k: bytes that must move / time, as a share of the measured bandwidth."""
    from whimbrel.engine import bench

    bandwidth, peak = speed(place)
    model, context = place.model("nemotron-nano-9b-v2"), 64 if place.dry else 4096
    for batch in (1, 2) if place.dry else (1, 8, 64, 256):
        task = bench.Task(model, context, batch)
        seconds, moved = place.seconds(task.decode), task.bytes("decode")
        share = moved / seconds / bandwidth
        yield {"batch": batch, "context": context, "seconds": seconds, "tokens_per_second": batch / seconds,
               "floor_seconds": moved / bandwidth, "share": share, "bandwidth": bandwidth, "peak": peak}  # fmt: skip
        del task


def peers(place: Place) -> Iterator[Record]:
    """Hybrid beside dense in the same engine: output tokens/s at three shapes of work, capped and on the whole card.

    The batch is the largest that `plan` admits, whole contexts reserved or paged on demand. Seconds of a request: its
    share of reading the prompt, and its tokens at the mean depth, timed as one step of that batch there.
    """
    from whimbrel.engine.plan import plan
    from whimbrel.model.presets import preset

    bandwidth, peak = speed(place)
    jobs = [(32, 32)] if place.dry else [(8192, 16384), (1024, 8192), (32768, 1024)]
    for limit in (CAP, CAP * 6):
        for into, out in jobs:
            rates: dict[tuple[str, str], tuple[float, float]] = {}
            for name in ("nemotron-nano-9b-v2", "qwen3-8b"):
                with capped(place, limit):
                    model = place.model(name)
                    made = plan(preset(name), memory=int(limit), context=into + out, bandwidth=bandwidth, peak=peak)
                    first = plan(preset(name), memory=int(limit), context=into, bandwidth=bandwidth, peak=peak)
                    for rule, most in (("reserved", made.largest_batch), ("on demand", made.largest_batch_on_demand)):
                        batch = 2 if place.dry else min(most, 512)
                        if not batch:
                            yield {"model": name, "cap": limit, "in": into, "out": out, "rule": rule, "batch": 0}
                            continue
                        step = fitting(place, model, into + out // 2, batch)
                        batch, moved = step.batch, step.bytes("decode")
                        floor, seconds = max(moved / bandwidth, 0.0), place.seconds(step.decode, 1.0)
                        del step
                        prompt = reading(place, model, into)
                        rate = batch * out / (batch * prompt + out * seconds)
                        rates[name, rule] = rate, batch * out / (batch * (first.prefill_seconds or 0) + out * floor)
                        yield {"model": name, "cap": limit, "in": into, "out": out, "rule": rule, "batch": batch,
                               "step_seconds": seconds, "floor_seconds": floor, "share": floor / seconds,
                               "prefill_seconds": prompt, "output_tokens_per_second": rate,
                               "peak_bytes": place.peak_bytes()}  # fmt: skip
                    del model
            for rule in ("reserved", "on demand"):
                if len(pair := [rates[key] for key in rates if key[1] == rule]) == 2 and pair[1][0]:
                    ratio, predicted = pair[0][0] / pair[1][0], pair[0][1] / pair[1][1]
                    yield {"ratio": ratio, "predicted_ratio": predicted, "share": ratio / predicted, "cap": limit,
                           "in": into, "out": out, "rule": rule}  # fmt: skip


def long_prompts(place: Place) -> Iterator[Record]:
    """The 8B hybrid beside Llama-3.1-8B at 65,536 in and 1,024 out under 80 GB, prefill and decoding apart."""
    from whimbrel.engine.plan import plan
    from whimbrel.model.presets import preset

    bandwidth, peak = speed(place)
    into, out = (32, 8) if place.dry else (65536, 1024)
    found = {}
    for name in ("nemotron-h-8b", "llama-3.1-8b"):
        with capped(place, 80e9):
            model = place.model(name)
            made = plan(preset(name), memory=int(80e9), context=into + out, bandwidth=bandwidth, peak=peak)
            batch = 2 if place.dry else min(64, made.largest_batch)
            task = fitting(place, model, into, batch)
            batch = task.batch
            moved, seconds = task.bytes("decode"), place.seconds(task.decode, 1.0)
            del task
            prompt = reading(place, model, into)
            floor = made.prefill_seconds or 0.0
            found[name] = (batch / seconds, into / prompt)
            yield {"model": name, "batch": batch, "decode_tokens_per_second": batch / seconds,
                   "prefill_tokens_per_second": into / prompt, "share": moved / bandwidth / seconds,
                   "prefill_share": floor / prompt, "peak_bytes": place.peak_bytes()}  # fmt: skip
            del model
    a, b = found.values()
    yield {"ratio": a[0] / b[0], "prefill_ratio": a[1] / b[1]}


def whole_context(place: Place) -> Iterator[Record]:
    """131,072 tokens of the 9B shape under 22.06 GiB: read in chunks, then 64 tokens; peak memory against `plan`."""
    from whimbrel.engine import bench
    from whimbrel.engine.plan import plan

    context, tokens = (64, 2) if place.dry else (131_072, 64)
    with capped(place, CAP):
        model = place.model("nemotron-nano-9b-v2")
        task = bench.Task(model, context, 1)
        task.prompt = 32 if place.dry else 2048
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
    """One step of training as a function, the model, and its row of tokens."""
    from whimbrel.model import LanguageModel
    from whimbrel.parallel.recompute import recomputed
    from whimbrel.train.objective import CrossEntropy
    from whimbrel.train.optimizer import OptimizerSettings, adamw
    from whimbrel.train.precision import Fp8, converted
    from whimbrel.train.step import train_step

    model = LanguageModel(config, device=place.device).initialise(0)
    optimizer, row = adamw(model, OptimizerSettings()), Row.random(tokens, documents, config.vocab_size)
    precision = "float32" if place.dry else "bfloat16"

    def step() -> None:
        with recomputed(model, recompute), converted(model, Fp8(recipe=fp8, ends=ends)):
            train_step(model, CrossEntropy(), [row], optimizer, clip=1.0, precision=precision)

    return step, model, row


def train(place: Place) -> Iterator[Record]:
    """Steps of hybrids of about 1B and 4B on 8,192 packed tokens, in bfloat16 and in each FP8 recipe: MFU."""
    from whimbrel.model import count
    from whimbrel.model.presets import preset

    _, peak = speed(place)
    four = preset("nemotron-h-4b")
    one = replace(four, pattern="M-M-M*-M-M-M-M*-M-M-M-M*-M-", hidden_size=2048, intermediate_size=8192,
                  num_attention_heads=16, num_key_value_heads=4, mamba_num_heads=64)  # fmt: skip
    tokens, documents = (64, 4) if place.dry else (8192, 4)
    for name, config in (("1B", one), ("4B", four)):
        config = place.shape(config)
        flops = count.flops_per_token(config, count.mean_context([tokens // documents] * documents), training=True)
        for recipe in ("none", "tensorwise", "rowwise", "blockwise"):
            try:
                step, model, _ = trainer(place, config, tokens, documents, name == "4B", recipe, 0 if place.dry else 4)
                seconds = place.seconds(step, 3.0)
                yield {"model": name, "parameters": count.total(config), "fp8": recipe, "seconds": seconds,
                       "tokens_per_second": tokens / seconds, "flops": tokens * flops / seconds,
                       "share": tokens * flops / seconds / peak, "peak_bytes": place.peak_bytes()}  # fmt: skip
                del step, model
            except Exception as fault:
                yield {"model": name, "fp8": recipe, "failed": f"{type(fault).__name__}: {str(fault)[:300]}"}


def scan(place: Place) -> Iterator[Record]:
    """The scan, forward, and forward and backward, against max(bytes / bandwidth, operations / peak)."""
    import torch
    from gpu_check import scan_inputs

    from whimbrel import ops
    from whimbrel.ops import Segments

    bandwidth, peak = speed(place)
    shapes = [(4, 2, 16, 16, 64)] if place.dry else []
    for heads, width, size in () if place.dry else ((128, 64, 128), (128, 80, 128), (256, 64, 256)):
        shapes += [(heads, 8, width, size, length) for length in (2048, 8192, 32768, 131072)]
    for heads, groups, width, size, tokens in shapes:
        row = [v.to(place.device) for v in (t.float() for t in scan_inputs(tokens, heads, groups, width, size, 1)[:6])]
        for at in (0, 3, 4):
            row[at] = row[at].to(place.dtype)
        leaves = [v.requires_grad_() for v in row]
        cut, up = Segments.of([tokens], device=place.device), torch.randn_like(row[0])

        def forward(leaves: Any = leaves, cut: Any = cut) -> Any:
            return ops.ssd(*leaves, cut)[0]

        def both(leaves: Any = leaves, up: Any = up, forward: Any = forward) -> Any:
            return torch.autograd.grad(forward(), leaves, up)

        number = row[0].element_size()
        read = number * tokens * (heads * width + 2 * groups * size) + 4 * tokens * heads
        # In chunks of 64: C B' once a group, scores by x, C by state, x by B; backward two and a half times that.
        flops = 2.0 * tokens * (64 * groups * size + 64 * heads * width / 2 + 2 * heads * width * size)
        for name, work, moved, factor in (
            ("forward", forward, read + number * tokens * heads * width, 1.0),
            ("forward+backward", both, 3 * read + 3 * number * tokens * heads * width, 3.5),
        ):
            seconds = place.seconds(work, 0.3)
            floor = max(moved / bandwidth, factor * flops / peak)
            yield {"what": name, "heads": heads, "width": width, "state": size, "tokens": tokens, "seconds": seconds,
                   "flops": factor * flops / seconds, "bytes_per_second": moved / seconds, "floor_seconds": floor,
                   "share": floor / seconds}  # fmt: skip


def fp8(place: Place) -> Iterator[Record]:
    """Each FP8 recipe: noise of a layer, whether we refuse what the device refuses, losses of a small hybrid."""
    from gpu_fp8 import curves, decoding, layouts, noise

    yield from noise(place)
    yield from decoding(place)
    yield from layouts(place)
    yield from curves(place, trainer)


def long_step(place: Place) -> Iterator[Record]:
    """One sequence of 131,072 and of 524,288 tokens through a training step of the 1B shape, with recomputation."""
    from whimbrel.model.presets import preset
    from whimbrel.train.memory import training_bytes

    four = preset("nemotron-h-4b")
    one = replace(four, pattern="M-M-M*-M-M-M-M*-M-M-M-M*-M-", hidden_size=2048, intermediate_size=8192,
                  num_attention_heads=16, num_key_value_heads=4, mamba_num_heads=64)  # fmt: skip
    for tokens in (96,) if place.dry else (131_072, 524_288):
        step, model, _ = trainer(place, place.shape(one), tokens, 1, recompute=True)
        planned = sum(training_bytes(model, [tokens], "float32" if place.dry else "bfloat16", True).values())
        begin = time.perf_counter()
        step()
        place.wait()
        yield {"tokens": tokens, "seconds": time.perf_counter() - begin, "peak_bytes": place.peak_bytes(),
               "planned_bytes": planned, "share": place.peak_bytes() / planned}  # fmt: skip
        del step, model


def few_bits(place: Place) -> Iterator[Record]:
    """Decoding of the 9B shape at 4k with weights in int8, int4 and FP8, as `decode` does."""
    from gpu_bits import decoding

    yield from decoding(place, speed(place)[0])


def check(place: Place) -> Iterator[Record]:
    """Every kernel against float64 and `ops/torch`."""
    import torch
    from gpu_check import check as run

    yield run(torch.device(place.device), small=place.dry)


ROWS: dict[str, tuple[Callable[[Place], Iterator[Record]], float]] = {
    "check": (check, 150), "ceilings": (ceilings, 40), "decode": (decode, 90), "scan": (scan, 90),
    "whole_context": (whole_context, 90), "peers": (peers, 200), "long_prompts": (long_prompts, 120),
    "train": (train, 200), "fp8": (fp8, 120), "long_step": (long_step, 120), "few_bits": (few_bits, 90),
}  # fmt: skip
"""Row -> what runs it, and the seconds it may take."""


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
    good, note = True, {"without": list(without)} if without else {}
    with context, out.open("a", encoding="utf-8") as file:
        try:
            for record in ROWS[name][0](place):
                good = good and record.get("ok", True)
                file.write(json.dumps({"row": name, "dry": place.dry} | note | record, default=str) + "\n")
                file.flush()
        except Exception as fault:
            file.write(
                json.dumps({"row": name, "dry": place.dry, "failed": f"{type(fault).__name__}: {fault}"[:600]}) + "\n"
            )
            raise
    return 0 if good else 1


def parent(names: list[str], place: Place, out: Path, budget: float) -> int:
    """Run rows one after another within the budget, then print what they found."""
    begin, bad, without = time.perf_counter(), [], []
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if place.dry else {})
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": "machine", "dry": place.dry} | machine(place)) + "\n")
    for name in names:
        left = budget - (time.perf_counter() - begin)
        if left < 15:
            bad.append(f"{name}: no time left")
            continue
        command = [sys.executable, __file__, "--row", name, "--out", str(out), *(["--dry-run"] if place.dry else [])]
        command += ["--without", ",".join(without)] if without else []
        try:
            limit = left if place.dry else min(left, ROWS[name][1])
            code = subprocess.run(command, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            bad.append(f"{name}: ended with {code}")
        if name == "check" and code:
            without = wrong(out)
            bad.append(f"in torch's form from here on: {', '.join(without)}")
    print(table(out))
    print("\n".join(f"FAILED {text}" for text in bad) or "every row ran")
    return 1 if bad else 0


STEPS, KERNELS = (
    ["conv_step", "ssd_step", "paged_attention"],
    {"scan": ["ssd"], "cross_entropy": ["cross_entropy", "log_prob"]},
)


def wrong(out: Path) -> list[str]:
    """Operations that the last check found wrong; all of them if it did not come to an end."""
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    checks = [record["failed"] for record in records if record["row"] == "check"]
    if not checks or not isinstance(checks[-1], dict):
        from whimbrel import ops

        return [name for name in getattr(ops.gpu()[0], "__all__", []) if hasattr(ops.vectorised, name)]
    first = {label.split(" ")[0] for label in checks[-1]}
    names = [name for word in sorted(first) for name in (STEPS if word == "steps" else KERNELS.get(word, [word]))]
    return list(dict.fromkeys(names))


def machine(place: Place) -> Record:
    """Date, commit, versions and device."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    gpu = "none (dry run)" if place.dry else torch.cuda.get_device_name()
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit, "torch": torch.__version__, "gpu": gpu}


def table(out: Path) -> str:
    """The records for people: one line each, shares as percentages."""
    lines = []
    for text in out.read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        record.pop("errors", None)
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
    said = parser.parse_args()
    place = Place(said.dry_run)
    if said.row:
        return child(said.row, place, said.out, [word for word in said.without.split(",") if word])
    names = said.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    return parent(names, place, said.out, said.seconds)


if __name__ == "__main__":
    sys.exit(main())
