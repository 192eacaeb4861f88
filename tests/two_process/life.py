"""Runs that stop, go on elsewhere and end: `life.py FOLDER`, run by every rank."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small import HYBRID, Rows, model

from whimbrel.model.language import LanguageModel
from whimbrel.parallel import Axes, applied
from whimbrel.train import checkpointing
from whimbrel.train.interrupt import Stopped
from whimbrel.train.loop import TrainSettings, pretrain
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.schedule import ScheduleSettings

SETTINGS = TrainSettings(
    steps=6,
    accumulate=4,
    threads=1,
    validate_every=3,
    validate_batches=3,
    checkpoint_every=2,
    keep=9,
    tensorboard=False,
    optimizer=OptimizerSettings(learning_rate=0.003),
    schedule=ScheduleSettings(warmup_steps=2),
)
STOP = 3


class Watched(Rows):
    """Rows that remember which were asked for while a step was computed."""

    asked: list[int]

    def batch(self, index: int) -> Any:
        self.__dict__.setdefault("asked", []).append(index)
        return super().batch(index)


def run(folder: Path, axes: Axes, stop: int = 0, asynchronous: bool = False, source: Rows | None = None) -> Any:
    """Train in a folder, or go on there; with `stop` ask for a stop after that step. Returns the model."""
    made = model(HYBRID)

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and "loss" in event and event["step"] == stop:
            os.kill(os.getpid(), signal.SIGINT)  # only the first rank reports: the others must learn of it

    settings = replace(SETTINGS, parallel=axes, asynchronous=asynchronous)
    try:
        pretrain(settings, source or Rows(), Rows(1), made, folder, hear)
        assert not stop, "it did not stop"
    except Stopped:
        assert stop
    return made


def copy(checkpoint: Path, to: Path, axes: Axes) -> None:
    """Load a checkpoint and write it again, on these ranks."""
    made = model(HYBRID, seed=7)
    with applied(made, axes):
        adam = adamw(made, OptimizerSettings())
        checkpointing.load(checkpoint, made, adam)
        checkpointing.save(to, checkpointing.TrainState(STOP, 1, {}), made, adam, keep=9)


def whole(checkpoint: Path, made: LanguageModel | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in one process; into another model than the small one if it is of that."""
    made = made or model(HYBRID, seed=8)
    adam = adamw(made, OptimizerSettings())
    checkpointing.load(checkpoint, made, adam)
    return checkpointing.training_tensors(made, adam)


def main(folder: Path) -> None:
    """What two ranks do."""
    torch.set_num_threads(1)
    first = os.environ["RANK"] == "0"
    sharded, cut, pieces = Axes(fsdp=2), Axes(tensor=2), Axes(context=2)
    seen = Watched()
    run(folder / "through", sharded, source=seen).save(folder / "through" / "model")
    run(folder / "stopped", sharded, stop=STOP, asynchronous=True)
    checkpoint = checkpointing.path_of(folder / "stopped" / "checkpoints", STOP)
    if first:
        for name in ("same", "cut", "one"):
            shutil.copytree(folder / "stopped", folder / name)
    torch.distributed.barrier()
    run(folder / "same", sharded, asynchronous=True)
    run(folder / "cut", cut).save(folder / "cut" / "model")
    for name, axes in (("copy-cut", cut), ("copy-pieces", pieces), ("copy-sharded", sharded)):
        copy(checkpoint, folder / name, axes)
    (folder / f"asked-{os.environ['RANK']}.txt").write_text(" ".join(map(str, seen.asked)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
