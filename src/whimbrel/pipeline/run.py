"""Work through a recipe: one process a stage, skip what stands, continue what was begun.

FOLDER/STAGE/            a finished stage and its manifest.json
FOLDER/STAGE.partial/    work in progress; work.json in it holds its key
FOLDER/old/STAGE-KEY8/   what a changed recipe has replaced; nothing is deleted
FOLDER/logs/STAGE.log    what the stage printed
FOLDER/recipe.yaml       the resolved recipe, which can be run again
FOLDER/report.html       what came out
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from whimbrel.errors import UserError
from whimbrel.files import atomic_write, fsync_folder
from whimbrel.pipeline import manifest, report
from whimbrel.pipeline.child import Job, StageError
from whimbrel.pipeline.console import Display, duration, figure
from whimbrel.pipeline.hosts import Hosts, Leader, follow, leading
from whimbrel.pipeline.lock import locked
from whimbrel.pipeline.recipe import Node, Recipe
from whimbrel.units import format_bytes

WORK = "work.json"


class Stopped(Exception):
    """The user stopped a run; the message says how to go on."""


def run(recipe: Recipe, folder: Path, display: Display, hosts: Hosts = Hosts()) -> Path:  # noqa: B008 - frozen
    """Run what is not finished yet and write the report; returns its path. Of several hosts all call it.

    Raises UserError for what a user can mend, StageError for a stage that failed or died, Stopped after Ctrl-C.
    """
    place = ""
    hosts.check(recipe)
    try:
        if hosts.rank:
            with terminable():
                follow(hosts, recipe, folder, display)
            return folder / "report.html"
        with terminable(), leading(hosts, recipe, folder, display) as leader, locked(folder) as lock:
            with atomic_write(folder / "recipe.yaml") as file:
                file.write(recipe.text())
            outside = manifest.FileKeys(folder / ".keys.json")
            done: dict[str, dict[str, Any]] = {}
            for node in recipe.nodes:
                place = node.name
                done[node.name] = _stage(node, folder, outside, done, lock, display, leader)
            place = "the report"
            return report.write(folder, recipe, [done[node.name] for node in recipe.nodes])
    except KeyboardInterrupt as stop:
        said = f"{stop}" or "stopped; what was finished is kept, and the same command goes on from there"
        raise Stopped(f"{place or folder}: {said}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for {folder} (in {place}); free some, then the same command goes on"
            ) from error
        raise


def _stage(
    node: Node,
    folder: Path,
    outside: manifest.FileKeys,
    done: Mapping[str, dict[str, Any]],
    lock: int,
    display: Display,
    leader: Leader,
) -> dict[str, Any]:
    """Bring one stage to its end; returns its manifest."""
    inputs = {name: _input(source, outside, done) for name, source in node.inputs.items()}
    keys = {name: entry["key"] for name, entry in inputs.items()}
    key = manifest.stage_key(node.kind, node.stage.version, node.binding, keys)
    final, partial = folder / node.name, folder / f"{node.name}.partial"
    made = _standing(final, key, display)
    if made is not None:
        display.say(f"{node.name}: done before ({duration(made['wall_seconds'])}), nothing has changed")
        return made
    work = _begin(partial, key, display)
    display.start(node.name)
    paths = {name: folder / source if isinstance(source, str) else source for name, source in node.inputs.items()}
    job = Job(node, paths, partial, folder / "logs" / f"{node.name}.log", lock)
    started = time.monotonic()

    def note(event: dict[str, Any]) -> None:
        display.event(event)
        # Not for other events: those may come from a signal handler, in the middle of this very write.
        if event.get("event") == "progress" and time.monotonic() - started - work["noted"] > 5:
            _note(partial, work, started)

    try:
        last = leader.attend(job, note)
    finally:
        display.stop()
        if partial.exists():
            _note(partial, work, started)
    made = _manifest(node, key, inputs, work, last)
    _finish(partial, final, made)
    display.say(
        f"{node.name}: {duration(made['wall_seconds'])}, {format_bytes(made['peak_memory_bytes'])} at most{_told(made)}"
    )
    return made


def _manifest(
    node: Node, key: str, inputs: Mapping[str, Any], work: Mapping[str, Any], last: Mapping[str, Any]
) -> dict[str, Any]:
    """What manifest.json says, but for the files."""
    return {
        "schema": manifest.SCHEMA,
        "name": node.name,
        "stage": node.kind,
        "version": node.stage.version,
        "key": key,
        "config": node.resolved,
        "inputs": inputs,
        "seed": node.resolved.get("seed"),
        "commit": manifest.commit(),
        "machine": manifest.machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(work["wall_seconds"], 3),
        "sessions": work["sessions"],
        "peak_memory_bytes": last["peak_memory_bytes"],
        "metrics": last["metrics"],
        "model": node.stage.model,
        "probe": last["probe"],
    }


def _input(source: str | Path, outside: manifest.FileKeys, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """How a manifest names an input: the stage or file, and its key."""
    if isinstance(source, str):
        return {"stage": source, "key": done[source]["key"]}
    return {"file": str(source), "key": outside.key(source)}


def _standing(final: Path, key: str, display: Display) -> dict[str, Any] | None:
    """The manifest of a finished stage that still stands; one that does not is moved aside."""
    if not final.exists():
        return None
    made = manifest.read(final)
    trouble = "it has no manifest" if made is None else manifest.damage(final, made)
    if made is not None and trouble is None:
        if made["key"] == key:
            return made
        trouble = "its settings, inputs or code have changed"
    display.say(
        f"{final.name}: {trouble}; the old one is now {_aside(final, made['key'] if made else 'unknown')}", "yellow"
    )
    return None


def _begin(partial: Path, key: str, display: Display) -> dict[str, Any]:
    """Make `STAGE.partial`, or take up the one that is there if its key fits; returns what work.json says."""
    work = _read_work(partial)
    if work is not None and work["key"] == key:
        display.say(f"{partial.stem}: going on with what was begun ({duration(work['wall_seconds'])} so far)")
        work["sessions"] += 1
    else:
        if partial.exists():
            old = _aside(partial, work["key"] if work else "unknown")
            display.say(f"{partial.stem}: begun with other settings, inputs or code; that work is now {old}", "yellow")
        partial.mkdir()
        work = {"key": key, "sessions": 1, "wall_seconds": 0.0}
    work |= {"noted": 0.0}
    manifest.write_json(partial / WORK, work)
    return work


def _read_work(partial: Path) -> dict[str, Any] | None:
    path = partial / WORK
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _note(partial: Path, work: dict[str, Any], started: float) -> None:
    """Write down the time spent so far, so that a killed stage knows what it has cost."""
    spent = time.monotonic() - started
    work["wall_seconds"] += spent - work["noted"]
    work["noted"] = spent
    manifest.write_json(partial / WORK, work)


def _aside(path: Path, key: str) -> Path:
    """Move a folder into `old/`, under a name that is free; returns where it is now."""
    old = path.parent / "old"
    old.mkdir(exist_ok=True)
    stem = f"{path.name}-{key[:8]}"
    names = (old / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 10_000))
    target = next(name for name in names if not name.exists())
    os.rename(path, target)
    return target


def _finish(partial: Path, final: Path, made: dict[str, Any]) -> None:
    """Flush everything a stage wrote, add the manifest, and give the folder its name.

    work.json goes last: as long as the folder is partial, a killed run must find the key in it.
    """
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    sizes = manifest.listing(partial)
    made["files"] = {name: number for name, number in sizes.items() if name not in (WORK, manifest.NAME)}
    manifest.write_json(partial / manifest.NAME, made)
    os.rename(partial, final)
    fsync_folder(final.parent)
    (final / WORK).unlink()


def _told(made: Mapping[str, Any]) -> str:
    """The metrics of a stage that fit on a line."""
    plain = {name: value for name, value in made["metrics"].items() if isinstance(value, (int, float))}
    return "".join(f", {name.replace('_', ' ')} {figure(value)}" for name, value in list(plain.items())[:4])


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM means what Ctrl-C means."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["Hosts", "StageError", "Stopped", "run"]
