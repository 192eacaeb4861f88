"""The training state on disk: the same bits back, whole or absent, and never trusted unchecked."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinySource, tiny_model
from torch import nn

from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.train import checkpointing
from whimbrel.train.checkpointing import TrainState
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.step import train_step


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_model()
    optimizer = adamw(model, OptimizerSettings())
    for step in range(steps):
        train_step(model, CrossEntropy(), [TinySource().batch(step)], optimizer, clip=1.0)
    return model, optimizer


def state(step: int) -> TrainState:
    return TrainState(step, threads=1, identity={"train": {"clip": 1.0}})


def saved(folder: Path, *steps: int, keep: int = 9) -> Path:
    model, optimizer = trained()
    for step in steps:
        checkpointing.save(folder, state(step), model, optimizer, keep)
    return folder


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may grow beyond `room` bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.manual_seed(5)
    random = torch.get_rng_state()
    path = checkpointing.save(tmp_path, state(3), model, optimizer, keep=1)
    torch.manual_seed(6)
    other, fresh = tiny_model(seed=9), None
    fresh = adamw(other, OptimizerSettings())
    checkpointing.load(path, other, fresh)
    assert torch.equal(torch.get_rng_state(), random)
    wanted = checkpointing.training_tensors(model, optimizer)
    got = checkpointing.training_tensors(other, fresh)
    assert wanted.keys() == got.keys()
    assert {"model.layers.0.mixer.A_log", "optimizer.layers.0.mixer.A_log.exp_avg_sq"} <= wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]) and tensor.dtype == got[name].dtype, name
    assert got["optimizer.norm_f.weight.step"] == 3


def test_moments_of_a_fresh_optimizer_are_those_it_would_make() -> None:
    """Making the moments before the first step changes nothing about it."""
    plain, prepared = tiny_model(), tiny_model()
    for model in (plain, prepared):
        optimizer = adamw(model, OptimizerSettings())
        if model is prepared:
            checkpointing.training_tensors(model, optimizer)
        train_step(model, CrossEntropy(), [TinySource().batch(0)], optimizer, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), prepared.parameters(), strict=True))


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "FILE_BYTES", 20_000)
    model, optimizer = trained()
    path = checkpointing.save(tmp_path, state(1), model, optimizer, keep=1)
    assert len(list(path.glob("*.safetensors"))) > 3
    other = tiny_model(seed=9)
    checkpointing.load(path, other, adamw(other, OptimizerSettings()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 15, 100_000_000, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-100000000"]
    found = checkpointing.newest(tmp_path, silent)
    assert found is not None and found[1].step == 100_000_000


def test_no_checkpoint_is_no_mistake(tmp_path: Path) -> None:
    assert checkpointing.newest(tmp_path / "absent", silent) is None


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    with full_disk(20_000), pytest.raises(UserError, match=r"step-00000010 could not be written: file too large"):
        saved(tmp_path, 10, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    found = checkpointing.newest(tmp_path, silent)
    assert found is not None and found[1].step == 5


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def tensors_of(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit of the tensors": lambda path: flip(tensors_of(path)),
    "tensors cut short": lambda path: tensors_of(path).write_bytes(tensors_of(path).read_bytes()[:-9]),
    "tensors gone": lambda path: tensors_of(path).unlink(),
    "state gone": lambda path: (path / "train_state.json").unlink(),
    "state cut short": lambda path: (path / "train_state.json").write_text('{"step": 10, "schema": 2'),
    "state without files": lambda path: (path / "train_state.json").write_text('{"step": 10, "schema": 2}'),
    "state of something else": lambda path: (path / "train_state.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 5, 10)
    DAMAGES[damage](tmp_path / "step-00000010")
    events: list[dict[str, Any]] = []
    found = checkpointing.newest(tmp_path, events.append)
    assert found is not None and found[1].step == 5
    assert events[0]["event"] == "warning" and "step-00000010 is damaged" in events[0]["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010.damaged"]


def test_starting_anew_after_damage_is_the_users_decision(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    flip(tensors_of(tmp_path / "step-00000005"))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; remove"):
        checkpointing.newest(tmp_path, silent)


def test_another_schema_is_refused_not_set_aside(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    file = tmp_path / "step-00000005" / "train_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99, this version reads 2"):
        checkpointing.newest(tmp_path, silent)
    assert file.exists()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / ".step-00000010.4711.tmp").mkdir()
    checkpointing.newest(tmp_path, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_changed_settings_are_named() -> None:
    before = {"train": {"clip": 1.0, "steps": 9}, "model": {"time_step_limit": [0.0, float("inf")], "pattern": "M-"}}
    checkpointing.refuse_changes(Path("x"), json.loads(json.dumps(before)), before)
    now = {"train": {"clip": 2.0, "steps": 9}, "model": {"time_step_limit": (0.0, float("inf")), "pattern": "M*"}}
    with pytest.raises(
        UserError, match=r"model.pattern was 'M-' and is 'M\*', train.clip was 1.0 and is 2.0; set it back"
    ):
        checkpointing.refuse_changes(Path("runs/x"), before, now)
