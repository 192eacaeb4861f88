"""Errors in one line with a way out, and the exit code: 2 for what the user can mend, 1 otherwise, 130 after Ctrl-C."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whimbrel.errors import UserError


def explain(error: BaseException, commands: Sequence[str] = ()) -> tuple[str, int]:
    """One line for an error, with a way out, and the exit code."""
    if hasattr(error, "format_message"):  # typer's usage errors, whose classes it keeps to itself
        return _usage(error, commands), 2
    if isinstance(error, UserError):
        return str(error), 2
    if type(error).__name__ in ("Stopped", "StageError"):  # whimbrel.pipeline, not imported for an error's sake
        return str(error), 130 if type(error).__name__ == "Stopped" else 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped; what was finished is kept, and the same command goes on from there", 130
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory; make the batch, the context or the model smaller (`whimbrel plan` says what fits)", 1
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"this is a fault of ours: {what} (add --traceback to see where, and please report it)", 1


def _usage(error: Any, commands: Sequence[str]) -> str:
    """Typer's sentence on one line, with the nearest command or the way to write a setting."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "whimbrel"
    message = " ".join(str(error.format_message()).split()).rstrip(".?")
    if message.startswith("No such command") and "Did you mean" not in message:
        message += f"; known: {', '.join(commands)}"
    option = str(getattr(error, "option_name", "") or "")
    if option.startswith("--") and context is not None and any(p.name == "overrides" for p in context.command.params):
        message += f"; settings are written without dashes: {option.strip('-').replace('-', '_')}=VALUE"
    return f"{message}; see: {command} --help"


def _system(error: OSError) -> tuple[str, int]:
    place = f"{error.filename}" if error.filename else "a file"
    ways: dict[int | None, tuple[str, int]] = {
        errno.ENOENT: (f"{place} does not exist (looked in {Path.cwd()})", 2),
        errno.EACCES: (
            f"{place} may not be read or written by this user; choose another place or change its rights",
            2,
        ),
        errno.EPERM: (f"{place} may not be changed by this user; choose another place or change its rights", 2),
        errno.EISDIR: (f"{place} is a folder; name a file", 2),
        errno.ENOTDIR: (f"{place} goes through a file as if it were a folder; choose another path", 2),
        errno.EROFS: (f"{place} is on a read-only disk; choose another place", 2),
        errno.ENOSPC: (f"no space left on the disk for {place}; free some, then the same command goes on", 1),
        errno.EDQUOT: (f"the disk quota is spent ({place}); free some space, then the same command goes on", 1),
    }
    return ways.get(error.errno, (f"{error.strerror or error} ({place})", 1))
