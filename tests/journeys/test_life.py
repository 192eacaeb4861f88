"""recipes/nano-tiny.yaml, made short: every stage of a life; then again, killed at random, to the same figures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastwarc")

from whimbrel.pipeline import manifest, recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "nano-tiny.yaml"
SHORT = [line for line in (ROOT / "scripts" / "short.txt").read_text().splitlines() if not line.startswith("#")]
LOOSE = ("wall_seconds", "peak_memory_bytes", "finished", "sessions", "files", "commit", "machine")
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "seconds_drawing", "seconds_learning", "threads")

pytestmark = pytest.mark.slow


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "whimbrel", "run", str(RECIPE), "--out", str(folder), *SHORT]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def live(folder: Path) -> None:
    done = subprocess.run(command(folder), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("life") / "run"
    live(folder)
    return folder


def manifests(folder: Path) -> dict[str, Any]:
    names = [node.name for node in recipe.read(RECIPE, SHORT).nodes]
    found = {name: manifest.read(folder / name) for name in names}
    assert all(made is not None for made in found.values())
    return found


def test_every_stage_is_in_the_report(lived: Path) -> None:
    page = (lived / "report.html").read_text(encoding="utf-8")
    made = manifests(lived)
    for name, one in made.items():
        assert f"<b>{name}</b>" in page and one["key"][:12] in page
        if one["stage"] != "evaluate":
            continue
        for task, modes in one["metrics"].items():
            for mode in ("think", "off") if task not in ("text", "against") else ():
                assert f"{100 * modes[mode]['accuracy']:.1f}<small>" in page
    for picture in ("What thinking is worth", "How far it reads", "Between two models", "How fast it answers"):
        assert picture in page
    assert "What was claimed" not in page  # the short form claims nothing


def test_every_claim_of_the_recipe_finds_its_figure(lived: Path) -> None:
    """No path of the recipe's claims leads nowhere: measured, whether met or missed."""
    from whimbrel.pipeline.claims import held

    found = held(recipe.read(RECIPE).claims, manifests(lived))
    assert len(found) >= 10
    assert [one["say"] for one in found if one["figure"] is None] == []


def test_the_child_is_what_was_planned(lived: Path) -> None:
    made = manifests(lived)
    planned = made["compress"]["metrics"]["parameters"]
    assert (
        made["compress"]["probe"]["shape"]["parameters"]
        == planned
        == made["distill"]["metrics"].get("parameters", planned)
    )
    assert planned <= 0.62 * made["merge"]["probe"]["shape"]["parameters"]


def test_killed_at_random_it_ends_the_same(lived: Path, tmp_path: Path) -> None:
    """kill -9 of the run and all it has started, again and again; then to the end: the same figures, but for times."""
    folder, draw, kills = tmp_path / "run", random.Random(3), 0
    for _ in range(9):
        process = subprocess.Popen(
            command(folder), env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(8.0, 25.0))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.2)
    assert kills >= 3
    live(folder)
    expected, found = manifests(lived), manifests(folder)
    for name in set(expected) - {"speed"}:
        for made in (expected[name], found[name]):
            for loose in LOOSE:
                made.pop(loose)
            for loose in TIMES:
                made["metrics"].pop(loose, None)
        assert found[name] == expected[name], name
    samples = [(where / "eval-grpo" / "samples.jsonl").read_text().splitlines() for where in (lived, folder)]
    plain = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines] for lines in samples]
    assert plain[0] == plain[1]
    test_every_stage_is_in_the_report(folder)
    test_every_claim_of_the_recipe_finds_its_figure(folder)
    test_the_child_is_what_was_planned(folder)
