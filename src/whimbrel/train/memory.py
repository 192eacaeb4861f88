"""What training takes in memory, before it takes it: weights by count, activations by a dry run without numbers."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model.config import ATTENTION, ModelConfig
from whimbrel.model.language import LanguageModel, Layer
from whimbrel.model.layout import Layout
from whimbrel.parallel import local
from whimbrel.parallel.tensor import local_config
from whimbrel.units import format_bytes


def training_bytes(model: LanguageModel, lengths: Sequence[int], precision: str, recompute: bool) -> dict[str, int]:
    """Bytes of weights, gradients, AdamW's two moments, and activations of a micro-batch cut into these lengths.

    On this rank. The first three are exact. Activations are what autograd keeps between forward and backward; what a
    single operation needs for itself while it runs, and the head's chunk of logits, come on top.
    """
    weights = sum(local(p).nbytes for p in model.parameters())
    trained = sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
    config = model.config if model.share is None else local_config(model.config, model.share.axes.tensor)
    activations = activation_bytes(config, lengths, getattr(torch, precision), recompute)
    return {"weights": weights, "gradients": trained, "moments": 2 * trained, "activations": activations}


def activation_bytes(config: ModelConfig, lengths: Sequence[int], dtype: torch.dtype, recompute: bool) -> int:
    """Bytes kept for the backward in `dtype`, found by running one layer of each kind on torch's meta device.

    With `recompute` it is the input of every layer, and everything of the largest one.
    """
    tokens = sum(lengths)
    kept = {}
    for letter in set(config.pattern):
        if letter == ATTENTION:
            # The meta device has only the attention that keeps all scores, a n + b n². Real ones keep a n.
            one, two = (_kept(config, letter, (n,), dtype) for n in (64, 128))
            kept[letter] = tokens * (4 * one - two) // 128
        else:
            kept[letter] = _kept(config, letter, lengths, dtype)
    row = tokens * config.hidden_size * torch.float32.itemsize  # the residual stream stays in float32
    ends = 3 * row  # embedded tokens, input and output of the last norm
    if recompute:
        return ends + config.layers * row + max(kept.values())
    return ends + sum(kept[letter] for letter in config.pattern)


def _kept(config: ModelConfig, letter: str, lengths: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the different tensors that autograd keeps for one layer of this kind, its parameters left out."""
    layer = Layer(config, config.pattern.index(letter), "meta", dtype)
    own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    x_TD = torch.empty(sum(lengths), config.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x_TD * 1, Layout.of(lengths, device="meta"), None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, in bytes: the allocator's on a GPU, this process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss survives exec on Linux and would show the parent's size
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine_memory(device: torch.device) -> int:
    """Bytes this process can hope for: the GPU's own, or the RAM, or what a container is allowed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def check_memory(parts: dict[str, int], device: torch.device, report: Report) -> None:
    """Say what training will take, and refuse what cannot fit. `parts`: bytes by name; `activations` is an estimate.

    Weights, gradients and moments are counted, so when they alone exceed the machine it is a `UserError`. With the
    estimate on top it is a warning.
    """
    room = machine_memory(device)
    total, sure = sum(parts.values()), sum(size for name, size in parts.items() if name != "activations")
    listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    summary = f"training takes about {format_bytes(total)} ({listing}); the machine has {format_bytes(room)}"
    if sure > room:
        raise UserError(f"{summary}; set model to a smaller one, or use a machine with {format_bytes(total)}")
    if total > room:
        report(
            {"event": "warning", "text": f"{summary}; if it runs out, set train.recompute=true or take smaller batches"}
        )
    else:
        report({"event": "log", "text": summary})
