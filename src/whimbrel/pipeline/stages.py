"""The table of stages: what can stand behind `stage:` in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from whimbrel.events import Report

Run = Callable[[Any, Mapping[str, Path], Path, Report], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One kind of stage. Code is named "module:name" and imported where it is used, so that a table costs nothing.

    `run(settings, inputs, out, report) -> metrics` fills the folder `out`, in which it may find work of its own to
    continue. `version` grows whenever the same settings give another output. `inputs` must be given in a recipe,
    `optional` may be; those in `several` may be a group, `{one: STAGE, other: STAGE}`, which reaches `run` as
    `name.one` and `name.other`. `model` is where in the output a checkpoint lies, if there is one. `free` names
    settings (dotted) that say how the work is done and not what comes out: changing one leaves the key as it is.
    `spread`: it can run in several processes, which `train.parallel` of its settings asks for.
    """

    settings: str
    run: str
    version: int
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    model: str | None = None
    free: tuple[str, ...] = ()
    spread: bool = False


LOOP = (
    *("train.threads", "train.recompute", "train.parallel", "train.validate_every", "train.validate_batches"),
    *("train.checkpoint_every", "train.keep", "train.asynchronous", "train.tensorboard"),
)
"""What is free wherever `train` is the loop's settings."""

STAGES: Mapping[str, Stage] = {
    "data": Stage(
        settings="whimbrel.data.stages:DataSettings",
        run="whimbrel.data.stages:run_data",
        version=1,
        inputs=(),
        optional=("pages",),
        free=("workers",),
    ),
    "tokenizer": Stage(
        settings="whimbrel.data.stages:TokenizerSettings",
        run="whimbrel.data.stages:run_tokenizer",
        version=1,
        inputs=("documents",),
        several=("documents",),
    ),
    "tokens": Stage(
        settings="whimbrel.data.stages:TokensSettings",
        run="whimbrel.data.stages:run_tokens",
        version=1,
        inputs=("documents", "tokenizer"),
    ),
    "farqa": Stage(
        settings="whimbrel.data.farqa:FarqaSettings",
        run="whimbrel.data.farqa:run",
        version=1,
        inputs=("documents",),
    ),
    "pretrain": Stage(
        settings="whimbrel.train.stages:PretrainSettings",
        run="whimbrel.train.stages:run",
        version=1,
        inputs=("tokens", "tokenizer"),
        optional=("model",),
        several=("tokens",),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "compress": Stage(
        settings="whimbrel.compress.stages:CompressSettings",
        run="whimbrel.compress.stages:run_compress",
        version=1,
        inputs=("model", "tokens"),
        several=("tokens",),
        model="model",
        free=tuple(name for name in LOOP if name != "train.validate_batches"),
    ),
    "distill": Stage(
        settings="whimbrel.compress.stages:DistillSettings",
        run="whimbrel.compress.stages:run_distill",
        version=1,
        inputs=("teacher", "student", "tokens"),
        several=("tokens",),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "quantize": Stage(
        settings="whimbrel.compress.stages:QuantizeSettings",
        run="whimbrel.compress.stages:run_quantize",
        version=1,
        inputs=("model",),
        model="model",
    ),
    "tasks": Stage(settings="whimbrel.data.tasks:TasksSettings", run="whimbrel.data.tasks:run", version=1, inputs=()),
    "sft": Stage(
        settings="whimbrel.align.sft:SftSettings",
        run="whimbrel.align.sft:run",
        version=1,
        inputs=("model", "conversations"),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "chat-tokens": Stage(
        settings="whimbrel.align.sft:ChatTokensSettings",
        run="whimbrel.align.sft:run_chat_tokens",
        version=1,
        inputs=("tokenizer", "conversations"),
    ),
    "pairs": Stage(
        settings="whimbrel.align.pairs:PairsSettings",
        run="whimbrel.align.pairs:run",
        version=2,
        inputs=("model", "prompts"),
        free=("threads",),
    ),
    "dpo": Stage(
        settings="whimbrel.align.preference:PreferenceSettings",
        run="whimbrel.align.preference:run",
        version=1,
        inputs=("model", "pairs"),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "reward": Stage(
        settings="whimbrel.align.reward:RewardSettings",
        run="whimbrel.align.reward:run",
        version=1,
        inputs=("model", "rated"),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "grpo": Stage(
        settings="whimbrel.align.grpo:GrpoSettings",
        run="whimbrel.align.grpo:run",
        version=1,
        inputs=("model", "prompts"),
        optional=("validation",),
        model="model",
        free=LOOP,
        spread=True,
    ),
    "merge": Stage(
        settings="whimbrel.align.merge:MergeSettings",
        run="whimbrel.align.merge:run",
        version=1,
        inputs=("first", "second", "validation"),
        optional=("validation_other",),
        model="model",
        free=("threads",),
    ),
    "evaluate": Stage(
        settings="whimbrel.evaluate.stages:EvaluateSettings",
        run="whimbrel.evaluate.stages:run",
        version=1,
        inputs=("model",),
        optional=("tasks", "text", "against"),
        several=("tasks",),
        free=("threads", "generations"),
    ),
    "speed": Stage(
        settings="whimbrel.pipeline.speed:SpeedSettings",
        run="whimbrel.pipeline.speed:run",
        version=1,
        inputs=("model",),
        free=("threads",),
    ),
    "sample": Stage(
        settings="whimbrel.pipeline.sample:SampleSettings",
        run="whimbrel.pipeline.sample:run",
        version=1,
        inputs=("model",),
    ),
}


def locate(name: str) -> Any:
    """Import what "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
