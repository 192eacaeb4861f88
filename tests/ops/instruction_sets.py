"""What the tests of native operations share."""

from contextlib import contextmanager

from whimbrel.ops import cpu

WIDEST = cpu.isa()
ISAS = [name for name in ("bf16", "vnni", "avx512", "avx2", "baseline") if cpu.load()[0] is not None and cpu.use(name)]
if WIDEST is not None:
    cpu.use(WIDEST)  # asking has changed it, for every test of this process


@contextmanager
def instruction_set(name):
    """Run the library in one instruction set inside the block."""
    before = cpu.isa()
    assert cpu.use(name)
    try:
        yield
    finally:
        assert cpu.use(before)


def gap(got, expected, scale=None):
    """The largest difference, as a share of the largest value (at least 0.1) or of a stated scale."""
    scale = expected.detach().abs().max().clamp(min=0.1) if scale is None else scale
    return ((got - expected).detach().abs() / scale).max().item()
