"""One stage without a recipe around it: `whimbrel STAGE --config FILE --input NAME=PATH key=value`.

It is run as a recipe of that one stage, so it resumes, locks and keeps a manifest in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whimbrel import config
from whimbrel.errors import UserError, nearest
from whimbrel.pipeline import recipe
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.hosts import Hosts
from whimbrel.pipeline.run import run as work
from whimbrel.pipeline.stages import STAGES, locate


def _settings(kind: str, path: Path | None, overrides: Sequence[str]) -> Any:
    if kind not in STAGES:
        raise UserError(f"there is no stage {kind!r}; {nearest(kind, STAGES)}")
    return config.load(locate(STAGES[kind].settings), path, overrides)


def show(kind: str, path: Path | None, overrides: Sequence[str]) -> str:
    """The settings of a stage as YAML, every default written out."""
    return config.to_yaml(config.to_tree(_settings(kind, path, overrides)))


def run(kind: str, path: Path | None, overrides: Sequence[str], inputs: Sequence[str], out: Path | None) -> Path:
    """Run one stage in a folder (`runs/KIND`); returns the folder of its output. `inputs` are `name=path`."""
    settings = config.to_tree(_settings(kind, path, overrides))
    stage, given = STAGES[kind], {}
    for text in inputs:
        name, _, place = text.partition("=")
        if not place:
            raise UserError(f"--input {text} should be NAME=PATH; {nearest(name, (*stage.inputs, *stage.optional))}")
        given[name] = place
    given = recipe.flat_inputs(given, stage, "--input")
    for name in stage.inputs:
        if name not in {one.partition(".")[0] for one in given}:
            raise UserError(f"{kind} needs {name}; add --input {name}=PATH")
    graph = recipe.build({"name": kind, "stages": {kind: {"stage": kind, "inputs": given, "config": settings}}}, kind)
    folder = out or Path("runs") / kind
    work(graph, folder, Display(), Hosts.of(None, None, None, os.environ))
    return folder / kind
