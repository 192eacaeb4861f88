"""The Mamba-2 scan, forward and backward: ours beside transformers' torch path, in one run.

Shape: batch 2, length 2,048, 16 heads of 64, 8 groups, state 64, float32. Run: python benchmarks/scan.py
"""

from __future__ import annotations

import argparse
import json

import torch
import transformers
from side_by_side import in_turns, record_row, summary
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from whimbrel import ops
from whimbrel.ops.machine import bandwidth, matmul_peak
from whimbrel.ops.segments import Segments

B, L, H, P, G, N, CHUNK, OURS = 2, 2048, 16, 64, 8, 64, 64, 32


def inputs() -> list[torch.Tensor]:
    """x, dt (after softplus), a, b, c, d: leaves that want gradients."""
    torch.manual_seed(0)
    x, dt = torch.randn(B * L, H, P), torch.nn.functional.softplus(torch.randn(B * L, H) - 3)
    row = [x, dt, -(1 + 15 * torch.rand(H)), torch.randn(B * L, G, N), torch.randn(B * L, G, N), torch.randn(H)]
    return [v.requires_grad_() for v in row]


def ours(row: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of our scan."""
    y = ops.ssd(*row, Segments.of([L] * B))[0]
    return [y, *torch.autograd.grad(y, row, upstream)]


def theirs(row: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The same through transformers."""
    x, dt, a, b, c, d = (v.unflatten(0, (B, L)) if v.dim() > 1 else v for v in row)
    y = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=CHUNK, D=d)
    y = (y[0] if isinstance(y, tuple) else y).reshape(B * L, H, P)
    return [y, *torch.autograd.grad(y, row, upstream)]


def flops() -> int:
    """Multiply-adds times two of the form that needs fewest: chunks of OURS, of them only what lies before each token,
    nothing computed twice. Whole chunks of CHUNK and states computed again would be 1.7 times as many.
    """
    inside_group, inside_head, carry = OURS * N * G, OURS * H * P, 2 * H * P * N
    forward = inside_group + inside_head + 2 * carry
    backward = 3 * inside_group + 2 * inside_head + 4 * carry
    return B * L * (forward + backward)


def main() -> None:
    """Check that both compute the same, then time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--isa", default=ops.cpu.isa(), help="of ours: avx512, avx2 or baseline")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not ops.cpu.use(args.isa):
        parser.error(f"--isa is {args.isa}, which this processor does not have; leave it out")
    row, upstream = inputs(), torch.randn(B * L, H, P)
    for mine, other in zip(ours(row, upstream), theirs(row, upstream), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    seconds = in_turns(
        {"ours": lambda: ours(row, upstream), "transformers": lambda: theirs(row, upstream)}, args.repeats
    )
    peak = matmul_peak()
    moved = 3 * sum(v.nbytes for v in row) + 2 * upstream.nbytes
    floor = max(flops() / peak, moved / bandwidth())
    times = {name: summary(runs) for name, runs in seconds.items()}
    result = {
        "shape": {"batch": B, "length": L, "heads": H, "width": P, "groups": G, "state": N},
        "peer": f"transformers {transformers.__version__}, torch path, chunk {CHUNK}",
        "seconds": times,
        "floor_seconds": floor,
        "share_of_floor": {name: floor / t["median"] for name, t in times.items()},
        "ratio": times["transformers"]["median"] / times["ours"]["median"],
    }
    print(json.dumps(result, indent=2))
    record_row("scan", args.isa or "torch", result)


if __name__ == "__main__":
    main()
