"""What a run shows while it works: a bar on a terminal, plain lines into a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from whimbrel.units import format_count


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07 min`, `2:05 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def figure(value: float) -> str:
    """A measured number with as many digits as a reader wants: `3,104`, `48.1k`, `4.213`, `0.00031`."""
    if isinstance(value, int) and abs(value) < 100_000:
        return f"{value:,}"
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"


class Rate:
    """Units per second over the last `span` seconds, and the seconds that remain at that rate."""

    def __init__(self, span: float = 15.0) -> None:
        self.span = span
        self.seen: list[tuple[float, float]] = []

    def add(self, done: float, now: float) -> float:
        """Note how much is done; returns the rate, 0.0 where it is not known yet."""
        if self.seen and done < self.seen[-1][1]:
            self.seen.clear()
        self.seen.append((now, done))
        while len(self.seen) > 2 and now - self.seen[1][0] > self.span:
            self.seen.pop(0)
        (start, before), elapsed = self.seen[0], now - self.seen[0][0]
        return (done - before) / elapsed if elapsed > 0 and now > start else 0.0


class Display:
    """Shows one stage at a time. A pipe gets a line every `every` seconds, a terminal a bar that moves."""

    def __init__(self, console: Console | None = None, every: float = 10.0) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.every = every
        self.progress: Progress | None = None
        self.name, self.rate, self.last = "", Rate(), 0.0

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        self.console.print(Text(text, style))

    def start(self, name: str) -> None:
        """A stage begins."""
        self.name, self.rate, self.last = name, Rate(), time.monotonic()
        if self.console.is_terminal:
            note = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            bar = BarColumn(bar_width=28 if self.console.width >= 120 else 10)
            label = TextColumn("{task.description:<10}")
            self.progress = Progress(SpinnerColumn(), label, bar, note, console=self.console, transient=True)
            self.progress.add_task(name, total=None, note="")
            self.progress.start()
        else:
            self.say(f"{name} ...")

    def stop(self) -> None:
        """Take the bar away, whatever happened to the stage."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Show an event of the stage that runs."""
        kind = event.get("event")
        if kind == "warning":
            self.say(f"  warning: {event.get('text', '')}", "yellow")
        elif kind == "log":
            self.say(f"  {event.get('text', '')}", "dim")
        elif kind == "progress":
            self.advance(event)

    def advance(self, event: Mapping[str, Any]) -> None:
        """Move the bar, or write a line if the last one is old enough."""
        done, total, now = float(event.get("done", 0)), event.get("total"), time.monotonic()
        rate = self.rate.add(done, now)
        unit = event.get("unit", "")
        note = f"{format_count(done)}{f' of {format_count(total)}' if total else ''} {unit}".rstrip()
        if rate > 0 and "left" not in str(event.get("text")):  # training says itself how fast it is and what is left
            note += f" · {figure(rate)}/s"
            if total and total > done:
                note += f" · {duration((total - done) / rate)} left"
        if event.get("text"):
            note += f" · {event['text']}"
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, total=total, note=note)
        elif now - self.last >= self.every:
            self.last = now
            self.say(f"  {self.name}: {note}")
