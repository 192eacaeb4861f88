"""Whole training steps (forward, backward, clipping, AdamW): ours beside what one would use instead, both in float32
and, where the processor multiplies bfloat16, both with products of such numbers over float32 weights: ours as
`train.precision: bfloat16`, the others under torch's autocast.

hybrid-290m   a row of 2,048 tokens, beside transformers' nemotron_h on the same weights: both sides share one set of
              parameters, gradients and moments, so that 24 GiB hold them. The row is one document, because the peer
              cannot keep documents apart. The peer comes first; its first steps, in which malloc learns what to keep,
              take a quarter more time and are not counted. Ours then runs as our loop does: keeping its memory.
hybrid-0.3m   16 sequences of 64 tokens (reference/tiny_life.md, section 1): our native operations beside `ops/torch`
hybrid-5m     alone, and beside a depth-wise conv1d and a scan with one masked decay matrix a head, chunk 32.

The floor is that of the matrix products: the three of each projection (forward, and both gradients) and of the head,
timed in the same run at their own shapes, torch's or ours, whichever is faster. What is left of a step is native
calls, by name, and the rest. A ratio is to our step in the same arithmetic; `best` is the fastest of one side over
the fastest of the other.
Run: python benchmarks/cpu_training.py [--rows hybrid-0.3m …]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from side_by_side import in_turns, record_row, summary
from torch import Tensor, nn

from whimbrel import LanguageModel, ModelConfig, ops
from whimbrel.model import families
from whimbrel.model.count import flops_per_token, total
from whimbrel.model.presets import preset
from whimbrel.ops import cpu
from whimbrel.ops.memory import kept
from whimbrel.ops.segments import Segments
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.step import train_step

TINY = preset("hybrid-tiny")
FIVE = replace(
    TINY,
    pattern="M-M-M*-M-M-",
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    ssm_state_size=32,
)
CHUNK = 32
HALF = "-bfloat16"
PRECISIONS = {"": "float32", HALF: "bfloat16"} if cpu.isa() == "bf16" else {"": "float32"}
"""By what stands behind the name of a way."""


@dataclass(frozen=True)
class Row:
    """Packed random tokens; the target of a token is the next of its sequence."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]


def random_row(vocabulary: int, lengths: tuple[int, ...], seed: int) -> Row:
    """Tokens of sequences of these lengths."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, sum(lengths))
    targets = np.roll(tokens, -1)
    targets[np.cumsum(lengths) - 1] = -100
    return Row(tokens, targets, lengths)


def masked_conv(
    x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, segments: Segments, initial: Tensor | None = None
) -> tuple[Tensor, None]:
    """The convolution through torch's depth-wise conv1d; sequences of one length, nothing before them."""
    assert initial is None and len(set(segments.lengths)) == 1
    x_BIL = x_TI.unflatten(0, (segments.count, -1)).transpose(1, 2)
    y_BIL = F.conv1d(F.pad(x_BIL, (weight_IW.shape[1] - 1, 0)), weight_IW[:, None], bias_I, groups=x_TI.shape[1])
    return F.silu(y_BIL).transpose(1, 2).flatten(0, 1), None


def masked_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor,
    segments: Segments,
    initial: Tensor | None = None,
    keep: tuple[int, ...] = (),
) -> tuple[Tensor, None, None]:
    """The scan as in listing 1 of arXiv 2405.21060: B and C repeated, one decay matrix a head. K chunks of C tokens."""
    assert initial is None and not keep and all(n % CHUNK == 0 for n in segments.lengths)
    heads, shape = x_THP.shape[1], (segments.count, -1, CHUNK)
    x_BKCHP, dt_BKCH = x_THP.unflatten(0, shape), dt_TH.unflatten(0, shape)
    b, c = (v.repeat_interleave(heads // v.shape[1], 1).unflatten(0, shape) for v in (b_TGN, c_TGN))
    total_BHKC = (dt_BKCH * a_H).permute(0, 3, 1, 2).cumsum(-1)
    gaps = total_BHKC[..., :, None] - total_BHKC[..., None, :]
    before = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    decay_BHKCC = gaps.masked_fill(~before, -math.inf).exp()
    u_BKCHP = x_BKCHP * dt_BKCH[..., None]
    inside = torch.einsum("bklhn,bkshn,bhkls,bkshp->bklhp", c, b, decay_BHKCC, u_BKCHP)
    to_end_BHKC = (total_BHKC[..., -1:] - total_BHKC).exp()
    states_BKHPN = torch.einsum("bklhn,bhkl,bklhp->bkhpn", b, to_end_BHKC, u_BKCHP)
    carried = [torch.zeros_like(states_BKHPN[:, 0])]
    for k in range(states_BKHPN.shape[1] - 1):
        fade_BH = total_BHKC[:, :, k, -1].exp()
        carried.append(carried[-1] * fade_BH[..., None, None] + states_BKHPN[:, k])
    across = torch.einsum("bklhn,bkhpn,bhkl->bklhp", c, torch.stack(carried, 1), total_BHKC.exp())
    return (inside + across + x_BKCHP * d_H[:, None]).flatten(0, 2), None, None


@contextmanager
def form(name: str) -> Iterator[None]:
    """Run the operations as `native`, `torch` or `masked` (the other operations then as `torch`), the last two under
    autocast if the name says so.
    """
    name, _, half = name.partition("-")
    if name == "native":
        yield
        return
    ops._FORMS["masked"] = SimpleNamespace(conv=masked_conv, ssd=masked_scan)  # type: ignore[assignment]
    with ops.using("torch"), ops.using(name), autocast(bool(half)):
        yield


def autocast(on: bool) -> torch.autocast:
    """torch's bfloat16 over float32 weights."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


@contextmanager
def clocks() -> Iterator[Counter[str]]:
    """Seconds of each native call, by name."""
    seconds: Counter[str] = Counter()
    beside = [module for name, module in sys.modules.items() if name.startswith("whimbrel.ops.cpu.")]
    modules = [module for module in beside if hasattr(module, "call") and module is not cpu.library]
    before = cpu.library.call

    def call(name: str, *structures: Any) -> None:
        begin = time.perf_counter()
        before(name, *structures)
        if name != "matmul":  # it is among the products
            seconds[name.removesuffix("_forward").removesuffix("_backward")] += time.perf_counter() - begin

    for module in modules:
        module.call = call
    try:
        yield seconds
    finally:
        for module in modules:
            module.call = before


def product_seconds(model: LanguageModel, tokens: int, repeats: int, half: str = "") -> float:
    """Seconds of the matrix products of a step, each timed at its own shape: x W^T, and both gradients."""
    dtype = torch.bfloat16 if half else torch.float32
    shapes: dict[tuple[int, ...], int] = defaultdict(int)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shapes[tuple(module.weight.shape)] += 1
    shapes[(model.config.vocab_size, model.config.hidden_size)] += 1
    seconds = 0.0
    for (outputs, inputs), count in shapes.items():
        x, weight, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        y, dx, dw = torch.ones(tokens, outputs), torch.ones(tokens, inputs), torch.ones(outputs, inputs)
        for a, b, out in ((x, weight.t(), y), (dy, weight, dx), (dy.t(), x, dw)):
            theirs = [v.to(dtype) for v in (a, b, out)]
            ways: dict[str, Callable[[], object]] = {"torch": partial(torch.mm, *theirs[:2], out=theirs[2])}
            if cpu.isa():
                ways["native"] = partial(cpu.matmul.product, a, b, out)
            with ops.rounding(bool(half)):
                seconds += count * min(min(runs) for runs in in_turns(ways, repeats, warm_up=1).values())
    return seconds


def stepper(model: LanguageModel, row: Row, precision: str = "float32") -> Callable[[], float]:
    """One training step of ours; gives the loss."""
    optimizer = adamw(model, OptimizerSettings(learning_rate=1e-4))
    return lambda: train_step(model, CrossEntropy(), [row], optimizer, clip=1.0, precision=precision).loss


def small(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """A small hybrid, in three forms of the same step, each in what the processor multiplies."""
    row = random_row(config.vocab_size, (64,) * 16, 0)
    steps = {
        name + half: stepper(LanguageModel(config).initialise(0), row, precision if name == "native" else "float32")
        for name in ("native", "torch", "masked")
        for half, precision in PRECISIONS.items()
    }

    def run(name: str) -> float:
        with form(name):
            return steps[name]()

    first = {name: run(name) for name in steps}
    exact = [loss for name, loss in first.items() if not name.endswith(HALF)]
    assert max(exact) - min(exact) < 1e-4, f"not the same loss: {first}"
    assert max(first.values()) - min(first.values()) < 1e-2, f"not nearly the same loss: {first}"
    with kept():  # as in the loop; all forms alike, for they share one heap
        seconds = in_turns({name: partial(run, name) for name in steps}, options.repeats, warm_up=5)
    parts: dict[str, dict[str, float]] = {}
    for half in PRECISIONS:
        products = product_seconds(LanguageModel(config).initialise(0), len(row.tokens_T), 10, half)
        with kept(), clocks() as native:
            for _ in range(20):
                run("native" + half)
        parts["native" + half] = {"products": products} | {name: spent / 20 for name, spent in native.items()}
    return {"parameters": total(config), "sequences": "16 x 64"} | figures(seconds, len(row.tokens_T), parts)


def figures(seconds: dict[str, list[float]], tokens: int, parts: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a row records. `parts`: seconds of parts of our steps."""
    times = {name: summary(runs) for name, runs in seconds.items()}
    median = {name: t["median"] for name, t in times.items()}
    others = [name for name in median if name not in parts]
    ratio = {name: median[name] / median["native" + HALF * name.endswith(HALF)] for name in others}
    shares = {}
    for name, spent in parts.items():
        shares[name] = {part: s / median[name] for part, s in spent.items()}
        shares[name]["rest"] = 1 - sum(shares[name].values())
    return {
        "seconds": times,
        "tokens_per_second": {name: tokens / m for name, m in median.items()},
        "ratio": ratio,
        "best": min(median[name] for name in others) / min(median[name] for name in parts),
        "product_seconds": {name: spent["products"] for name, spent in parts.items()},
        "shares": shares,
    }


def peer_of(model: LanguageModel) -> nn.Module:
    """transformers' model over the very parameters of ours, its clamp of step sizes as the checkpoint says."""
    import transformers

    config = model.config
    theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**families.config_to_hf(config)))
    table = families.names(config)
    for name, parameter in model.named_parameters():
        owner, _, leaf = table[name].replace("backbone.", "model.").rpartition(".")
        shaped = parameter.view(families.disk_shape(name, parameter.shape)).detach()
        same = shaped.shape == parameter.shape
        setattr(theirs.get_submodule(owner), leaf, parameter if same else nn.Parameter(shaped))
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    return theirs.train()


def large(options: argparse.Namespace) -> dict[str, Any]:
    """The 290M hybrid beside transformers."""
    import transformers

    config = preset("hybrid-290m")
    model = LanguageModel(config).initialise(0)
    theirs = peer_of(model)
    row = random_row(config.vocab_size, (options.tokens,), 0)
    tokens_BL = torch.from_numpy(row.tokens_T)[None]
    both = list(dict.fromkeys([*model.parameters(), *theirs.parameters()]))
    optimizer = torch.optim.AdamW(both, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def peer_step(ids: Tensor, half: str = "") -> float:
        with autocast(bool(half)):
            loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    short = random_row(config.vocab_size, (64,), 1)
    ids = torch.from_numpy(short.tokens_T)[None]
    with torch.no_grad():  # both compute the same
        mine = CrossEntropy()(model, short)["loss"]
        other = theirs(input_ids=ids, labels=ids, use_cache=False).loss.item()
        assert abs(mine.sum.item() / mine.count - other) < 1e-3, (mine.sum.item() / mine.count, other)
    train_step(model, CrossEntropy(), [short], optimizer, clip=1.0)  # makes the moments of both
    peer_step(ids)
    parts = {"native" + half: {"products": product_seconds(model, options.tokens, 1, half)} for half in PRECISIONS}
    seconds: dict[str, list[float]] = {}
    for half in PRECISIONS:
        way = {"transformers" + half: partial(peer_step, tokens_BL, half)}
        seconds |= in_turns(way, options.large_repeats, warm_up=2)

    def step(precision: str) -> float:
        return train_step(model, CrossEntropy(), [row], optimizer, clip=1.0, precision=precision).loss

    with kept():  # as in the loop
        for half, precision in PRECISIONS.items():
            step(precision)
            with clocks() as native:
                seconds |= in_turns({"native" + half: partial(step, precision)}, options.large_repeats, warm_up=0)
            parts["native" + half] |= {name: spent / options.large_repeats for name, spent in native.items()}
    return {
        "parameters": total(config),
        "tokens": options.tokens,
        "peer": f"transformers {transformers.__version__} nemotron_h, torch path, sdpa, fused AdamW",
        "flops": flops_per_token(config, options.tokens / 2, training=True) * options.tokens,
    } | figures(seconds, options.tokens, parts)


ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "hybrid-290m": large,
    "hybrid-0.3m": partial(small, TINY),
    "hybrid-5m": partial(small, FIVE),
}


def main() -> None:
    """Measure the rows that were asked for, print each and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--repeats", type=int, default=30, help="of the small hybrids")
    parser.add_argument("--large-repeats", type=int, default=2, help="of the large one")
    parser.add_argument("--tokens", type=int, default=2048, help="in the row of the large one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for row in options.rows:
        result = ROWS[row](options)
        print(json.dumps({row: result}, indent=2), flush=True)
        record_row("cpu_training", row, result)


if __name__ == "__main__":
    main()
