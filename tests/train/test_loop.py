"""The loop: the same bits with and without interruptions, and a clear word for everything that stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpointing import flip, full_disk, tensors_of
from tiny_run import TinySource, curve, tiny_model, tiny_settings, tiny_train

from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.train.checkpointing import training_tensors
from whimbrel.train.interrupt import Stopped
from whimbrel.train.loop import TrainSettings, pretrain
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.step import NotFinite, accumulate

GOLDEN = Path(__file__).parent / "golden.json"
Events = list[dict[str, Any]]


class Crash(Exception):
    """Something that the loop knows nothing of."""


def at_step(step: int, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """A listener that acts when the training line of a step is written."""

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and event["step"] == step and "loss" in event:
            act()

    return hear


def crash() -> None:
    raise Crash


def assert_same(folder: Path, model: LanguageModel, other_folder: Path, other: LanguageModel) -> None:
    """Parameters, losses and everything else but times are equal bit for bit."""
    assert curve(folder) == curve(other_folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    """A run without interruptions."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny_train(folder)


def test_every_step_and_every_look_at_held_out_data_is_a_line(whole: tuple[Path, LanguageModel]) -> None:
    lines = curve(whole[0])
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 5, 10, 12]
    assert {"loss", "grad_norm", "learning_rate", "tokens"} <= lines[1].keys()
    figures = json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[1])
    assert figures["tokens_per_second"] > 0 and 0 < figures["mfu"] < 1
    batches = [TinySource(0).batch(index) for index in range(24)]
    assert lines[-2]["tokens"] == sum(len(batch.tokens_T) for batch in batches)


def test_a_step_sees_its_own_micro_batches(whole: tuple[Path, LanguageModel]) -> None:
    """The first line is the loss of batches 0 and 1 under the first weights; validation is its own source."""
    first = [TinySource(0).batch(0), TinySource(0).batch(1)]
    held_out = [TinySource(1).batch(0), TinySource(1).batch(1)]
    lines = curve(whole[0])
    assert lines[1]["loss"] == accumulate(tiny_model(), CrossEntropy(), first, learn=False)[0]
    assert lines[0]["validation_loss"] == accumulate(tiny_model(), CrossEntropy(), held_out, learn=False)[0]
    assert lines[-1]["validation_loss"] == accumulate(whole[1], CrossEntropy(), held_out, learn=False)[0]


def test_two_runs_are_equal_bit_for_bit(whole: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    assert_same(*whole, tmp_path, tiny_train(tmp_path))


def test_losses_are_those_recorded(tmp_path: Path) -> None:
    """Within 1e-4 of golden.json on any machine.

    `python tests/train/golden.py` records new ones, with a reason in the commit.
    """
    recorded = json.loads(GOLDEN.read_text())
    tiny_train(tmp_path, steps=len(recorded["loss"]))
    lines = curve(tmp_path)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(recorded["loss"], rel=1e-4)
    looks = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert looks == pytest.approx(recorded["validation_loss"], rel=1e-4)
    assert recorded["loss"][-1] < 0.75 * recorded["loss"][0]


@pytest.mark.parametrize("step", [2, 5, 9, 11])
def test_a_crash_costs_nothing_but_time(whole: tuple[Path, LanguageModel], tmp_path: Path, step: int) -> None:
    """Lines behind the last checkpoint are cut off and written again."""
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(step, crash))
    assert max(line["step"] for line in curve(tmp_path)) == step
    assert_same(*whole, tmp_path, tiny_train(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    whole: tuple[Path, LanguageModel], tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"{number.name}: stopped after step 7, saved .*step-00000007; the same command"):
        tiny_train(tmp_path, at_step(7, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    assert_same(*whole, tmp_path, tiny_train(tmp_path))


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_train(tmp_path, at_step(7, twice))
    assert not isinstance(caught.value, Stopped)


@pytest.mark.parametrize(("seed", "kills"), [(0, 2), pytest.param(1, 12, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    whole: tuple[Path, LanguageModel], tmp_path: Path, seed: int, kills: int
) -> None:
    script = Path(__file__).parent / "killed_run.py"
    command = [sys.executable, str(script), str(tmp_path), str(seed), str(kills)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == kills
    tensors = load_file(tensors_of(tmp_path / "checkpoints" / "step-00000012"))
    state = training_tensors(whole[1], adamw(whole[1], OptimizerSettings()))
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    assert sum(t.numel() for t in weights.values()) == sum(t.numel() for t in whole[1].state_dict().values())
    for name, tensor in weights.items():
        assert torch.equal(tensor, tensors[name]), name
    assert curve(tmp_path) == curve(whole[0])


def test_a_finished_run_is_not_run_again(whole: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    tiny_train(tmp_path)
    events: Events = []
    model = tiny_train(tmp_path, events.append)
    assert not [event for event in events if event["event"] == "progress"]
    assert_same(*whole, tmp_path, model)


def test_a_damaged_checkpoint_costs_nothing_but_time(whole: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(11, crash))
    flip(tensors_of(tmp_path / "checkpoints" / "step-00000010"))
    events: Events = []
    model = tiny_train(tmp_path, events.append)
    assert "step-00000010 is damaged" in events[0]["text"] and "step-00000005" in events[1]["text"]
    assert_same(*whole, tmp_path, model)


def test_a_full_disk_stops_the_run_and_loses_nothing(whole: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(6, crash))
    with (
        full_disk(20_000),
        pytest.raises(UserError, match=r"step-00000010 could not be written.*the same command goes on"),
    ):
        tiny_train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert_same(*whole, tmp_path, tiny_train(tmp_path))


def test_a_disk_too_full_for_a_line_is_said(tmp_path: Path) -> None:
    with full_disk(300), pytest.raises(UserError, match=r"metrics\.jsonl could not be written"):
        tiny_train(tmp_path)


def test_metrics_that_somebody_removed_are_missed(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(11, crash))
    (tmp_path / "metrics.jsonl").unlink()
    events: Events = []
    tiny_train(tmp_path, events.append)
    assert "metrics.jsonl has lost" in next(event["text"] for event in events if event["event"] == "warning")
    assert [line["step"] for line in curve(tmp_path)] == [10, 11, 12, 12]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 14}, "train.steps was 12 and is 14"),
        ({"clip": 0.5}, "train.clip was 1.0 and is 0.5"),
        ({"optimizer": OptimizerSettings(learning_rate=0.02)}, "train.optimizer.learning_rate was 0.01 and is 0.02"),
    ],
)
def test_a_changed_setting_that_matters_is_refused(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(6, crash))
    with pytest.raises(UserError, match=f"{name}; set it back"):
        tiny_train(tmp_path, **change)


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(6, crash))
    with pytest.raises(UserError, match="the data are not those it was trained on"):
        pretrain(tiny_settings(), TinySource(2), None, tiny_model(), tmp_path)


def test_settings_that_change_no_result_may_change(whole: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    """Recomputation, checkpoints, TensorBoard: the same bits."""
    with pytest.raises(Crash):
        tiny_train(tmp_path, at_step(6, crash))
    model = tiny_train(tmp_path, recompute=True, checkpoint_every=2, keep=1, tensorboard=True)
    assert_same(*whole, tmp_path, model)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_number_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = tiny_model()

    def spoil() -> None:
        with torch.no_grad():
            model.head.weight[0, 0] = float("inf")

    with pytest.raises(NotFinite) as caught:
        pretrain(tiny_settings(), TinySource(0), None, model, tmp_path, at_step(7, spoil))
    message = str(caught.value)
    assert message.startswith("step 8: the term 'loss' of the loss is ")
    assert "step-00000005" in message and "batches 14 to 15" in message and "learning_rate (now 0.01)" in message
    assert [line["step"] for line in curve(tmp_path)][-1] == 7


def test_progress_says_what_a_person_wants_to_know(tmp_path: Path) -> None:
    events: Events = []
    tiny_train(tmp_path, events.append, steps=3)
    progress = [event for event in events if event["event"] == "progress"]
    assert [(event["done"], event["total"], event["unit"]) for event in progress] == [
        (n, 3, "steps") for n in (1, 2, 3)
    ]
    assert all(word in progress[0]["text"] for word in ("loss", "tokens/s", "MFU", "left"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "train.steps is 0; set train.steps to 1 or more"),
        ({"keep": 0}, "train.keep"),
        ({"clip": -1.0}, "train.clip"),
        ({"precision": "bf16"}, "set it to auto, float32 or bfloat16"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**wrong)


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (TrainSettings().precision_on(cpu), TrainSettings().precision_on(gpu)) == ("float32", "bfloat16")
    assert TrainSettings(precision="float32").precision_on(gpu) == "float32"
    for isa in ("bf16", "avx2"):
        monkeypatch.setattr("whimbrel.ops.cpu.isa", lambda isa=isa: isa)
        assert TrainSettings(precision="bfloat16").precision_on(cpu) == "bfloat16"
    for isa in ("baseline", None):
        monkeypatch.setattr("whimbrel.ops.cpu.isa", lambda isa=isa: isa)
        with pytest.raises(UserError, match="needs a GPU, or a processor with AVX2"):
            TrainSettings(precision="bfloat16").precision_on(cpu)
