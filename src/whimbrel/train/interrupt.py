"""Ctrl-C and SIGTERM as a wish: the loop finishes its step, writes a checkpoint, and then stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Training stopped at a safe point because it was asked to. The message says how to go on."""


class Wish:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal, None as long as nobody asked."""

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal is a wish, the second one does not wait."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


@contextmanager
def stop_politely() -> Iterator[Wish]:
    """Inside, signals become a wish. Python delivers signals to the main thread only, so elsewhere nothing changes."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish.hear) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
