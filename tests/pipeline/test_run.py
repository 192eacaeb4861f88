"""Skip what stands, continue what was begun, survive what kills, say what went wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from short_stages import TABLE, CountSettings, count

from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.pipeline import manifest
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.recipe import read
from whimbrel.pipeline.run import StageError, run

RECIPE = """
name: flock
stages:
  a: {stage: count, config: {steps: 6, pause: 0.02}}
  b: {stage: count, inputs: {start: a}, config: {steps: 3, seed: 3}}
  j: {stage: join, inputs: {left: a, right: b}, config: {separator: "-"}}
"""
DRIVER = """
import sys
from pathlib import Path
from short_stages import TABLE
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.recipe import read
from whimbrel.pipeline.run import Stopped, run
try:
    run(read(sys.argv[1], sys.argv[3:], TABLE), Path(sys.argv[2]), Display())
except Stopped as stop:
    sys.exit(str(stop))
"""


@pytest.fixture
def fly(tmp_path: Path) -> Callable[..., str]:
    """Run the recipe in tmp_path/run with overrides; returns what was shown."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def go(*overrides: str) -> str:
        shown = io.StringIO()
        display = Display(Console(file=shown, soft_wrap=True), every=0.01)
        try:
            run(read(path, overrides, TABLE), tmp_path / "run", display)
        finally:
            fly.shown = shown.getvalue()  # type: ignore[attr-defined]
        return shown.getvalue()

    return go


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    words = [sys.executable, "-c", DRIVER, str(folder / "recipe.yaml"), str(folder / "run"), *overrides]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(happened: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (seen := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return seen


def step(folder: Path) -> int:
    path = folder / "run" / "a.partial" / "state.json"
    try:
        return int(json.loads(path.read_text())["step"])
    except FileNotFoundError:
        return 0


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    found = {name: manifest.read(folder / "run" / name) for name in ("a", "b", "j")}
    return {name: made for name, made in found.items() if made is not None}


def timeless(folder: Path) -> dict[str, dict[str, Any]]:
    loose = ("finished", "wall_seconds", "sessions", "peak_memory_bytes")
    return {name: {k: v for k, v in made.items() if k not in loose} for name, made in manifests(folder).items()}


def test_a_manifest_says_what_was_made_of_what(tmp_path: Path, fly: Callable[..., str]) -> None:
    fly()
    made = manifests(tmp_path)
    (tmp_path / "alone").mkdir()
    expected = count(CountSettings(steps=6), {}, tmp_path / "alone", silent)
    assert made["a"]["metrics"] == expected
    assert made["a"]["schema"] == 1 and made["a"]["version"] == 1 and made["a"]["seed"] == 1 and made["b"]["seed"] == 3
    assert made["a"]["config"] == {"steps": 6, "pause": 0.02, "seed": 1, "trouble": ""}
    assert made["j"]["inputs"]["left"] == {"stage": "a", "key": made["a"]["key"]}
    assert made["j"]["files"] == {"deep/joined.txt": (tmp_path / "run" / "j" / "deep" / "joined.txt").stat().st_size}
    assert 0.12 < made["a"]["wall_seconds"] < 30
    assert 5e6 < made["a"]["peak_memory_bytes"] < 500e6
    assert made["a"]["machine"]["cores"] >= 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0 and made["a"]["commit"]:
        assert made["a"]["commit"].rstrip("+") == head.stdout.strip()
    assert not list((tmp_path / "run").glob("*.partial"))


def test_unchanged_stages_are_not_run_again(tmp_path: Path, fly: Callable[..., str]) -> None:
    fly()
    before = manifests(tmp_path)
    shown = fly()
    assert shown.count("nothing has changed") == 3
    assert manifests(tmp_path) == before
    shown = fly("b.steps=4")  # a stands, b and what needs it do not; the old ones are kept
    after = manifests(tmp_path)
    assert (
        after["a"] == before["a"]
        and after["b"]["key"] != before["b"]["key"]
        and after["j"]["key"] != before["j"]["key"]
    )
    kept = tmp_path / "run" / "old" / f"b-{before['b']['key'][:8]}"
    assert str(kept) in shown and manifest.read(kept) == before["b"]


def test_a_stage_of_a_newer_version_is_run_again(
    tmp_path: Path, fly: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    fly()
    before = manifests(tmp_path)
    monkeypatch.setitem(TABLE, "join", dataclasses.replace(TABLE["join"], version=2))
    fly()
    after = manifests(tmp_path)
    assert after["b"] == before["b"] and after["j"]["key"] != before["j"]["key"]


def test_a_damaged_stage_is_run_again(tmp_path: Path, fly: Callable[..., str]) -> None:
    fly()
    (tmp_path / "run" / "a" / "state.json").write_text("{}")
    shown = fly()
    assert "state.json has 2 bytes" in shown
    assert manifests(tmp_path)["a"]["metrics"]["steps"] == 6
    assert shown.count("nothing has changed") == 2  # same key, so what was made from it stands


def test_a_changed_input_file_changes_the_key(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("one")
    keys = manifest.FileKeys(tmp_path / "keys.json")
    first, folder = keys.key(page), keys.key(tmp_path)
    assert manifest.FileKeys(tmp_path / "keys.json").key(page) == first
    page.write_text("two")
    assert keys.key(page) != first and keys.key(tmp_path) != folder


def test_failure_is_one_line_and_the_same_command_goes_on(tmp_path: Path, fly: Callable[..., str]) -> None:
    for trouble, kind, words in [
        ("kill", StageError, ["stage a", "SIGKILL", "a.log"]),
        ("disk", UserError, ["stage a", "no space left"]),
        ("memory", UserError, ["stage a", "out of memory"]),
        ("user", UserError, ["stage a", "steps is 2; set it to 3"]),
        ("helper", StageError, ["stage a", "SIGKILL"]),  # and what it forked does not keep the run waiting
        ("wheel", StageError, ["stage a", "RuntimeError: the wheel came off", "a.log"]),
    ]:
        with pytest.raises(kind) as caught:
            fly(f"a.trouble={trouble}")
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), caught.value
    assert "RuntimeError: the wheel came off" in (tmp_path / "run" / "logs" / "a.log").read_text()
    assert step(tmp_path) == 2
    fly("a.trouble=wheel")  # the trouble is at step 2, which is behind it now
    made = manifests(tmp_path)["a"]
    assert made["metrics"]["steps"] == 6 and made["sessions"] == 2


def test_work_begun_with_other_settings_is_moved_aside(tmp_path: Path, fly: Callable[..., str]) -> None:
    with pytest.raises(StageError):
        fly("a.trouble=wheel")
    shown = fly()
    assert "begun with other settings" in shown
    assert len(list((tmp_path / "run" / "old").glob("a.partial-*"))) == 1
    assert manifests(tmp_path)["a"]["sessions"] == 1


def test_ctrl_c_stops_at_a_step_and_the_same_command_goes_on(tmp_path: Path, fly: Callable[..., str]) -> None:
    process = launch(tmp_path, "a.steps=60")
    until(lambda: step(tmp_path) > 3)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "the same command goes on" in shown and "Traceback" not in shown
    reached = step(tmp_path)
    assert 3 < reached < 60
    shown = fly("a.steps=60")
    assert "going on with what was begun" in shown
    assert manifests(tmp_path)["a"]["metrics"]["steps"] == 60 and manifests(tmp_path)["a"]["sessions"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_never_reports_is_stopped_by_the_second_signal(tmp_path: Path, number: signal.Signals) -> None:
    process = launch(tmp_path, "a.trouble=deaf")
    until(lambda: step(tmp_path) == 2)
    time.sleep(0.2)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.3)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=20)
    assert "stopping at the next safe point" in shown and "the same command goes on" in shown
    assert step(tmp_path) == 2


def test_free_settings_do_not_change_the_key(
    tmp_path: Path, fly: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    monkeypatch.setitem(TABLE, "count", dataclasses.replace(TABLE["count"], free=("pause",)))
    fly()
    before = manifests(tmp_path)
    assert fly("a.pause=0.5").count("nothing has changed") == 3
    assert manifests(tmp_path) == before
    assert "pause" in before["a"]["config"]


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_it_ends_the_same(tmp_path: Path, fly: Callable[..., str], seed: int) -> None:
    """kill -9 of the run, of its stage, or of both, at random moments, until it is through."""
    draw = random.Random(seed)
    for _ in range(3):
        process = launch(tmp_path)
        time.sleep(draw.uniform(0.2, 0.7))
        victims = draw.choice([["run"], ["stage"], ["run", "stage"]])
        stages = children(process.pid)
        for pid in [process.pid] * ("run" in victims) + stages * ("stage" in victims):
            with_luck(pid)
        process.communicate(timeout=20)
        assert until(lambda pids=stages: not any(alive(pid) for pid in pids))
    fly()
    killed = timeless(tmp_path)
    other = tmp_path / "whole"
    other.mkdir()
    process = launch(other)
    process.communicate(timeout=30)
    whole = timeless(other)
    differing = {(stage, key): (made[key], whole[stage][key]) for stage, made in killed.items()
                 for key in made if made[key] != whole[stage][key]}  # fmt: skip
    assert killed == whole, differing
    assert (tmp_path / "run/j/deep/joined.txt").read_text() == (other / "run/j/deep/joined.txt").read_text()


def children(pid: int) -> list[int]:
    """Stages of a run; not the `git` that says, for a moment, which commit it is (killed, it leaves none)."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [one for one in found if b"whimbrel.pipeline.worker" in command(one)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def with_luck(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_second_run_of_a_folder_is_refused(tmp_path: Path, fly: Callable[..., str]) -> None:
    process = launch(tmp_path, "a.steps=400")
    until(lambda: step(tmp_path) > 0)
    with pytest.raises(UserError) as caught:
        fly("a.steps=400")
    assert str(process.pid) in str(caught.value) and "in use" in str(caught.value)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    fly()


def test_a_disk_that_is_full_for_the_run_itself(
    tmp_path: Path, fly: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write_json", full)
    with pytest.raises(UserError, match=r"no space left for .*in a"):
        fly()


def test_plain_lines_show_rate_and_time_left(tmp_path: Path, fly: Callable[..., str]) -> None:
    shown = fly("a.pause=0.05")
    line = next(line for line in shown.splitlines() if "a: 5 of 6 steps" in line)
    assert "/s" in line and "left" in line and "sum" in line
    assert "warning: joined" in shown
    made = manifests(tmp_path)["a"]["metrics"]
    assert f"steps {made['steps']}" in shown
