"""What the tests of Triton kernels share: the interpreter, or a GPU, and comparisons with float64."""

import numpy as np
import pytest
import torch

tl = pytest.importorskip("triton.language", reason="triton is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def mend_interpreter():
    """Four faults of triton 3.6: it makes indices of arrays of one element by int(), which numpy 2.4 refuses; it
    multiplies bfloat16 matrices by the whole numbers that stand for them; rounding to FP8 loses carries; float32 is cut
    off to bfloat16, where a GPU rounds to the nearest.
    """
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def wide(builder, v):
        return builder.cast_impl(v, tl.float32) if v.dtype.scalar == tl.bfloat16 else v

    convert = interpreter.InterpreterBuilder.create_fp_to_fp

    def to_fp8(builder, src, kind, rounding):
        if kind.scalar != tl.float8e4nv or src.dtype.scalar != tl.float32:
            return convert(builder, src, kind, rounding)
        codes = torch.from_numpy(src.data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(codes, kind.scalar)

    cast = interpreter.InterpreterBuilder.cast_impl

    def to_bfloat16(builder, src, kind):
        if src.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(builder, src, kind)
        codes = torch.from_numpy(np.array(src.data, np.float32)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(codes, kind.scalar)

    interpreter.InterpreterBuilder.cast_impl = to_bfloat16
    interpreter.InterpreterBuilder.create_fp_to_fp = to_fp8
    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest)


if not CUDA:
    mend_interpreter()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apart(x, extra=3):
    """The same numbers as columns of a wider tensor: rows lie apart."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + extra), float("nan"))
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def run(function, leaves, seed=0, like=None):
    """Outputs, and gradients of a fixed random sum of them for every leaf that takes one; its weights are rounded as
    outputs `like` are, or these.
    """
    outputs = [y for y in function(*leaves) if y.numel()]
    kinds = [y.dtype for y in like or outputs]
    weights = [
        normal(*y.shape, seed=seed + k).to(kind).to(y) for k, (y, kind) in enumerate(zip(outputs, kinds, strict=True))
    ]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    wanting = [v for v in leaves if v is not None and v.requires_grad]
    return outputs, torch.autograd.grad(total, wanting) if wanting else []


def gap(got, expected):
    """The largest difference, as a share of the largest value (at least 0.1)."""
    got, expected = got.detach().cpu().double(), expected.detach().double()
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=0.1)).item()


def compare(kernel, true, leaves, dtype=torch.float32, most=2e-5, seed=0, kept=()):
    """A kernel in `dtype` against the definition in float64 on the same rounded inputs, also of the gradient of the
    outputs; leaves `kept` stay float32.

    `most`: the largest gap of an output or gradient.
    """
    kinds = [torch.float32 if place in kept else dtype for place in range(len(leaves))]
    low = [v if v is None or not v.is_floating_point() else v.to(kind) for v, kind in zip(leaves, kinds, strict=True)]
    exact = [v if v is None or not v.is_floating_point() else v.double().requires_grad_() for v in low]
    given = [v if v is None else v.detach().to(DEVICE) for v in low]
    given = [
        v
        if v is None or not v.is_floating_point()
        else apart(v).requires_grad_()
        if v.dim() > 1
        else v.requires_grad_()
        for v in given
    ]
    outputs, gradients = run(kernel, given, seed)
    expected, expected_gradients = run(true, exact, seed, outputs)
    for place, (y, e) in enumerate(zip(outputs, expected, strict=True)):
        assert gap(y, e) < most, f"output {place}"
    for place, (y, e) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert gap(y, e) < most, f"gradient {place}"
