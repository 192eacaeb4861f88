"""The Mamba-2 scan, forward and backward: ours beside transformers' torch path, in one run.

Shapes: 2 sequences of 2,048 tokens in float32, 8 groups, heads of width 64. hybrid-290m, as the model of
`cpu_training.py`: 32 heads, state 128. small: 16 heads, state 64. The peer's chunk of 64 is its fastest of 32, 64,
128 and 256 for both. Run: python benchmarks/scan.py [--shapes small]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from side_by_side import in_turns, record_row, summary
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from whimbrel import ops
from whimbrel.ops.machine import bandwidth, matmul_peak
from whimbrel.ops.segments import Segments

CHUNK, OURS = 64, 32
"""Tokens of a chunk, of the peer and of ours."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one scan."""

    batch: int = 2
    length: int = 2048
    heads: int = 32
    width: int = 64
    groups: int = 8
    state: int = 128

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.batch * self.length


SHAPES = {"hybrid-290m": Shape(), "small": Shape(heads=16, state=64)}


def inputs(of: Shape) -> list[torch.Tensor]:
    """x, dt (after softplus), a, b, c, d: leaves that want gradients."""
    torch.manual_seed(0)
    x_THP, dt_TH = torch.randn(of.tokens, of.heads, of.width), torch.randn(of.tokens, of.heads)
    b_TGN, c_TGN = (torch.randn(of.tokens, of.groups, of.state) for _ in range(2))
    a_H, d_H = -(1 + 15 * torch.rand(of.heads)), torch.randn(of.heads)
    row = [x_THP, torch.nn.functional.softplus(dt_TH - 3), a_H, b_TGN, c_TGN, d_H]
    return [v.requires_grad_() for v in row]


def ours(of: Shape, row: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of our scan."""
    y = ops.ssd(*row, Segments.of([of.length] * of.batch))[0]
    return [y, *torch.autograd.grad(y, row, upstream)]


def theirs(of: Shape, row: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The same through transformers."""
    x, dt, a, b, c, d = (v.unflatten(0, (of.batch, of.length)) if v.dim() > 1 else v for v in row)
    y = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=CHUNK, D=d)
    y = (y[0] if isinstance(y, tuple) else y).reshape(upstream.shape)
    return [y, *torch.autograd.grad(y, row, upstream)]


def flops(of: Shape) -> int:
    """Multiply-adds times two of the form that needs fewest: chunks of OURS, of them only what lies before each token,
    nothing computed twice. Whole chunks of CHUNK and states computed again would be 1.7 times as many.
    """
    inside_group, inside_head = OURS * of.state * of.groups, OURS * of.heads * of.width
    carry = 2 * of.heads * of.width * of.state
    forward = inside_group + inside_head + 2 * carry
    backward = 3 * inside_group + 2 * inside_head + 4 * carry
    return of.tokens * (forward + backward)


def measure(of: Shape, repeats: int) -> dict[str, Any]:
    """Check that both compute the same, then time them in turns."""
    row, upstream = inputs(of), torch.randn(of.tokens, of.heads, of.width)
    for mine, other in zip(ours(of, row, upstream), theirs(of, row, upstream), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    ways = {"ours": partial(ours, of, row, upstream), "transformers": partial(theirs, of, row, upstream)}
    times = {name: summary(runs) for name, runs in in_turns(ways, repeats).items()}
    moved = 3 * sum(v.nbytes for v in row) + 2 * upstream.nbytes
    floor = max(flops(of) / matmul_peak(), moved / bandwidth())
    return {
        "shape": asdict(of),
        "peer": f"transformers {transformers.__version__}, torch path, chunk {CHUNK}",
        "seconds": times,
        "floor_seconds": floor,
        "share_of_floor": {name: floor / t["median"] for name, t in times.items()},
        "ratio": times["transformers"]["median"] / times["ours"]["median"],
    }


def main() -> None:
    """Measure the shapes that were asked for, print each and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--isa", default=ops.cpu.isa(), help="of ours: avx512, avx2 or baseline")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not ops.cpu.use(args.isa):
        parser.error(f"--isa is {args.isa}, which this processor does not have; leave it out")
    for name in args.shapes:
        result = measure(SHAPES[name], args.repeats)
        print(json.dumps({name: result}, indent=2), flush=True)
        record_row("scan", f"{name}-{args.isa or 'torch'}", result)


if __name__ == "__main__":
    main()
