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
    `optional` may be. `model` is where in the output a checkpoint lies, if there is one. `free` names settings
    (dotted) that say how the work is done and not what comes out: changing one leaves the key as it is.
    """

    settings: str
    run: str
    version: int
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    model: str | None = None
    free: tuple[str, ...] = ()


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
    ),
    "tokens": Stage(
        settings="whimbrel.data.stages:TokensSettings",
        run="whimbrel.data.stages:run_tokens",
        version=1,
        inputs=("documents", "tokenizer"),
    ),
    "pretrain": Stage(
        settings="whimbrel.train.stages:PretrainSettings",
        run="whimbrel.train.stages:run",
        version=1,
        inputs=("tokens", "tokenizer"),
        model="model",
        free=(
            "train.threads",
            "train.recompute",
            "train.validate_every",
            "train.validate_batches",
            "train.checkpoint_every",
            "train.keep",
            "train.tensorboard",
        ),
    ),
    "evaluate": Stage(
        settings="whimbrel.evaluate.stages:EvaluateSettings",
        run="whimbrel.evaluate.stages:run",
        version=1,
        inputs=("model",),
        optional=("tasks", "text", "baseline"),
        free=("threads", "generations"),
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
