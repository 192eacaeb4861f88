"""A step waits for the device once, for its ids. Here no device is: tensors that would lie on a GPU are of a class of
their own, the kernels run in Triton's interpreter, and every call that makes a host wait for a GPU is written down.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("triton")

from whimbrel import ops
from whimbrel.engine import Engine, Sampling
from whimbrel.engine.graphs import DecodeGraphs
from whimbrel.engine.pool import Pool
from whimbrel.model import fewbits
from whimbrel.model.linear import pack_model
from whimbrel.ops.triton import cuts


class There(Tensor):
    """A tensor that lies on a GPU, as far as anybody is told."""


READ = {getattr(Tensor, name) for name in (
    "tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
)} | {
    torch.nonzero, torch.masked_select, torch.unique, torch.equal, torch.allclose, torch.is_nonzero, torch.bincount,
}  # fmt: skip
MOVES = (Tensor.to, Tensor.copy_)
HIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount"}


def far(value) -> bool:
    return isinstance(value, There | nn.Parameter)


class Inside(TorchDispatchMode):
    """What torch does inside of one call: a number that is fetched, places of a mask that are counted."""

    def __init__(self, watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.watch.paused and name in HIDDEN and any(far(v) for v in tree_leaves((args, kwargs))):
            self.watch.note(f"aten.{name}")
        return func(*args, **(kwargs or {}))


class Watch(TorchFunctionMode):
    """Says `is_cuda` of what lies there, and writes down what waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.paused, self.waits = False, list[str]()

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/whimbrel/" in f.filename or "test_syncs" in f.filename]
        own = [f for f in frames if f.name not in ("note", "__torch_function__", "__torch_dispatch__", "look", "check")]
        self.waits.append(f"{what} in {own[-1].filename.rpartition('/')[2]}:{own[-1].lineno} {own[-1].name}")

    def check(self, func, args, kwargs) -> None:
        name, leaves = getattr(func, "__name__", ""), tree_leaves((args, kwargs))
        there = [v for v in leaves if far(v)]
        here = [v for v in leaves if isinstance(v, Tensor) and not far(v)]
        device = kwargs.get("device") or next((v for v in args[1:] if isinstance(v, torch.device | str)), None)
        if func in READ and there:
            self.note(name)
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and not there:
            self.note(f"{name} with device")
        elif func is Tensor.to and here and device is not None and not kwargs.get("non_blocking"):
            self.note("to, blocking")
        elif func is Tensor.copy_ and there and here and not kwargs.get("non_blocking"):
            self.note("copy_, blocking")
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if far(args[0]) and any(isinstance(v, list | range) for v in index):
                self.note("a list as an index")
            if far(args[0]) and any(isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in index):
                self.note("a mask as an index")
            if there and any(v.dim() for v in here):
                self.note("tensors of host and device together")
        elif name in ("repeat_interleave",) and there and kwargs.get("output_size") is None:
            self.note("repeat_interleave of unknown size")
        elif there and func not in MOVES and any(v.dim() for v in here):
            self.note(f"{name} of host and device together")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if self.paused:
                return func(*args, **kwargs)
            if func == Tensor.is_cuda.__get__:  # a new one each time
                return far(args[0])
            self.check(func, args, kwargs)
            result = func(*args, **kwargs)
            place = kwargs.get("device") is not None or (func is Tensor.to and isinstance(args[1], torch.device | str))
            if place or any(far(v) for v in tree_leaves((args, kwargs))):
                plain = (func is Tensor.cpu) or (isinstance(result, Tensor) and func is Tensor.numpy)
                wrap = lambda v: v.as_subclass(There) if type(v) is Tensor and not plain else v  # noqa: E731
                result = wrap(result) if isinstance(result, Tensor) else tree_map(wrap, result)
            return result


@contextmanager
def watching(monkeypatch):
    """Everything made inside with a `device` lies there; kernels run unwatched."""
    from triton.runtime.interpreter import GridExecutor

    watch, launch = Watch(), GridExecutor.__call__

    def run(self, *args, **kwargs):
        before, watch.paused = watch.paused, True
        try:
            return launch(self, *args, **kwargs)
        finally:
            watch.paused = before

    def mask(n, m):  # torch's own is a class of tensors too
        return torch.ones(n, m, dtype=torch.bool, device="cpu").tril(m - n)

    monkeypatch.setattr(GridExecutor, "__call__", run)
    monkeypatch.setattr(sys.modules["whimbrel.ops.torch.attention"], "causal_lower_right", mask)
    cuts.cut.cache_clear()
    try:
        with ops.using("triton"), watch, Inside(watch):
            yield watch
    finally:
        cuts.cut.cache_clear()


SETTINGS = [{}, {"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.8}, {"repetition_penalty": 1.4},
            {"temperature": 0.9, "top_k": 7, "repetition_penalty": 0.8}]  # fmt: skip
LENGTHS = (3, 18, 1, 2, 1, 3, 1, 2)


def serve(engine, watch=None, **more):
    """Sequences of unlike lengths and settings, the last ones while others decode; (recorded, waits) of each step."""
    steps, queue = [], list(enumerate(LENGTHS))
    running = []
    while queue or any(sequence.finish is None for sequence in running):
        some = 2 if len(queue) > 6 else 6
        for number, length in queue[:some]:
            said = Sampling(max_tokens=4, seed=number, ignore_eos=True, **SETTINGS[number % len(SETTINGS)], **more)
            running += engine.add([70 + number] * length, said)
        queue = queue[some:]
        graphed = [sequence.cached for sequence in running if sequence.finish is None]
        if watch is not None:
            watch.waits = []
        engine.step()
        steps.append((bool(graphed) and all(graphed), list(watch.waits) if watch is not None else []))
    return steps, [sequence.answer().ids for sequence in running]


def build(model, tokenizer):
    """An engine that decodes in buckets, as on a GPU."""
    engine = Engine(model, tokenizer, max_sequences=8, kv_tokens=512, prefill_tokens=16).start()
    spare = Pool(
        model.config, slots=8, kv_tokens=512, block_size=16, dtype=engine.dtype, device=engine.device, spare=True
    )
    engine._scheduler.pool, engine._graphs = spare, DecodeGraphs(model, spare)
    return engine


@pytest.mark.parametrize(("pattern", "logprobs", "bits"), [("M*", None, None), ("*-", 2, None), ("*", None, 8)])
def test_a_step_waits_for_its_ids_alone(make_model, hybrid, tokenizer, monkeypatch, pattern, logprobs, bits):
    """Prompts, decoding and both together, all kinds of draws; with log-probabilities for those once more."""
    model = make_model(replace(hybrid.config, pattern=pattern), 0)
    if bits:
        pack_model(model, bits)
        fewbits.settle(model, torch.float32)
    _, wanted = serve(build(model, tokenizer))
    with watching(monkeypatch) as watch:
        for part in model.modules():
            part._buffers.update(
                {name: held.as_subclass(There) for name, held in part._buffers.items() if held is not None}
            )
        engine = build(model, tokenizer)
        serve(engine, watch, logprobs=logprobs)  # buckets are made
        steps, ids = serve(engine, watch, logprobs=logprobs)
    assert ids == wanted
    assert {recorded for recorded, _ in steps} == {False, True}
    wrong = {wait for _, waits in steps for wait in waits if not wait.startswith("tolist")}
    assert not wrong
    allowed = 1 if logprobs is None else 2
    assert max(len(waits) for _, waits in steps) == allowed, [waits for _, waits in steps if len(waits) > allowed]


PLANTED = {
    "a number": lambda x: float(x.sum()),
    "a truth": lambda x: bool((x > 0).all()),
    "a list": lambda x: x[0, :2].tolist(),
    "a copy": lambda x: x.cpu(),
    "a mask": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "rows by a list": lambda x: x[[0]],
    "rows by the host's": lambda x: x[torch.tensor([0])],
    "a tensor made there": lambda x: torch.tensor([1.0], device=x.device),
    "a tensor sent there": lambda x: torch.zeros(2).to(x.device),
    "lengths unknown": lambda x: torch.repeat_interleave(torch.ones(2, dtype=torch.int64, device=x.device)),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_waits_is_seen(make_model, hybrid, tokenizer, monkeypatch, what):
    model = make_model(replace(hybrid.config, pattern="*"), 0)
    with watching(monkeypatch) as watch:
        engine = build(model, tokenizer)
        hook = model.norm_f.register_forward_pre_hook(lambda module, args: (PLANTED[what](args[0]), None)[1])
        try:
            engine.add([70, 71], Sampling(max_tokens=2, ignore_eos=True))
            engine.step()
            watch.waits = []
            engine.step()
        finally:
            hook.remove()
    assert [wait for wait in watch.waits if "<lambda>" in wait], watch.waits
