"""Checkpoints of several ranks: the same bits at the same number of ranks, the same state and losses at another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from life import SETTINGS, STOP, run, whole
from small import launch

from whimbrel.model.language import LanguageModel
from whimbrel.parallel import Axes
from whimbrel.train import checkpointing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks did, what one rank made of it, and what one does alone."""
    place = tmp_path_factory.mktemp("life")
    launch("life.py", 2, place)
    run(place / "one", Axes())
    run(place / "alone", Axes()).save(place / "alone" / "model")
    return place


def lines(folder: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "tokens_per_second", "mfu")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def test_a_stop_asked_of_one_rank_stops_all_at_one_step(folder: Path) -> None:
    assert [line["step"] for line in lines(folder / "stopped") if "loss" in line] == list(range(1, STOP + 1))
    assert checkpointing.latest(folder / "stopped" / "checkpoints") == checkpointing.path_of(
        folder / "stopped" / "checkpoints", STOP
    )


def test_at_the_same_number_of_ranks_it_goes_on_bit_for_bit(folder: Path) -> None:
    """One writes its checkpoints at once and never stops, the other writes them asynchronously, stops and goes on."""
    assert lines(folder / "same") == lines(folder / "through")
    ends = [whole(checkpointing.path_of(folder / name / "checkpoints", SETTINGS.steps)) for name in ("same", "through")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("name", ["copy-cut", "copy-pieces", "copy-sharded"])
def test_the_state_is_restored_bit_for_bit_on_other_axes(folder: Path, name: str) -> None:
    before = whole(checkpointing.path_of(folder / "stopped" / "checkpoints", STOP))
    after = whole(checkpointing.path_of(folder / name, STOP))
    assert len(before) > 100 and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert before["optimizer.layers.0.mixer.in_proj.weight/dt.exp_avg"].abs().max() > 0


@pytest.mark.parametrize("name", ["cut", "one", "alone", "same"])
def test_losses_are_the_same_on_any_number_of_ranks(folder: Path, name: str) -> None:
    """1e-5 relative: sums in another order, through six steps."""
    for mine, theirs in zip(lines(folder / name), lines(folder / "through"), strict=True):
        assert mine.keys() == theirs.keys()
        for figure, value in theirs.items():
            assert mine[figure] == pytest.approx(value, rel=1e-5), (mine["step"], figure)


def test_ranks_share_out_the_micro_batches_of_one_and_the_same_order(folder: Path) -> None:
    asked = [set(map(int, (folder / f"asked-{rank}.txt").read_text().split())) for rank in (0, 1)]
    every = set(range(SETTINGS.steps * SETTINGS.accumulate))
    assert asked[0] | asked[1] == every
    last = {step * SETTINGS.accumulate - 1 for step in (2, 4, 6)}  # looked at by all: their digest is in checkpoints
    assert asked[0] & asked[1] <= last | {0}


@pytest.mark.parametrize("name", ["through", "cut"])
def test_the_exported_folder_is_the_state_at_the_end(folder: Path, name: str) -> None:
    saved = LanguageModel.load(folder / name / "model").state_dict()
    state = whole(checkpointing.path_of(folder / name / "checkpoints", SETTINGS.steps))
    parts = ("z", "x", "B", "C", "dt")
    for key, tensor in saved.items():
        pieces = [state[f"model.{key}/{part}"] for part in parts if f"model.{key}/{part}" in state]
        assert torch.equal(tensor, torch.cat(pieces) if pieces else state[f"model.{key}"]), key
    alone = sorted(path.name for path in (folder / "alone" / "model").iterdir())
    assert sorted(path.name for path in (folder / name / "model").iterdir()) == alone
    sizes = [(folder / run / "model" / "model.safetensors").stat().st_size for run in (name, "alone")]
    assert sizes[0] == sizes[1]
