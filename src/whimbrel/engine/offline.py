"""A file of prompts in, a file of answers out, in the same order; stopped anywhere, it goes on where it stopped.

A prompt is one JSON line, `{"prompt": text or ids}` or `{"messages": […]}`, beside it perhaps `"id"` and `"sampling":
{…}` for this row alone. An answer is one JSON line too. The answers of finished prompts are always a beginning of the
file: a restart keeps them, cuts off what was torn, and refuses a file that other prompts or settings made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from whimbrel.engine.engine import Engine
from whimbrel.engine.prompt import Prompt
from whimbrel.engine.sampling import Sampling
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report, silent

_KEYS = ("prompt", "messages", "id", "sampling")
BEGINNINGS = (b'{"id": ', b'{"index": ')
"""How a line of answers begins."""


@dataclass(frozen=True)
class Row:
    """One prompt of a file; `key` changes with anything that changes its answer's distribution."""

    line: int
    prompt: Prompt
    sampling: Sampling
    id: Any
    key: str


def read_rows(path: str | Path, sampling: Sampling, name: str = "") -> Iterator[Row]:
    """The prompts of a JSONL file, empty lines skipped. An unusable row raises `UserError` with file and line.

    `name` is the model's; `sampling` holds where a row does not override it.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            if line.strip():
                try:
                    yield _row(number, json.loads(line), sampling, name)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from error
                except UserError as error:
                    raise UserError(f"{path}, line {number}: {error}") from error


def _row(number: int, row: Any, sampling: Sampling, name: str) -> Row:
    if not isinstance(row, dict):
        raise UserError('a row must be an object; write {"prompt": "…"}')
    for key in row:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; {nearest(key, _KEYS)}")
    if ("prompt" in row) == ("messages" in row):
        raise UserError('a row needs either "prompt" or "messages"')
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if not prompt or not isinstance(prompt, str | list) or ("messages" in row and not _are_messages(prompt)):
        raise UserError('"prompt" must be text or ids, "messages" a list of {"role", "content"}')
    settings = row.get("sampling", {})
    if not isinstance(settings, dict):
        raise UserError('"sampling" must be an object; write {"sampling": {"max_tokens": 64}}')
    settings = sampling.override(settings)
    text = json.dumps([name, prompt, row.get("id"), asdict(settings)], sort_keys=True)
    return Row(number, prompt, settings, row.get("id"), hashlib.sha256(text.encode()).hexdigest()[:16])


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def check_files(prompts: str | Path, out: str | Path) -> None:
    """Refuse what cannot be read or must not be written, before a model is loaded."""
    if not Path(prompts).is_file():
        raise UserError(f'{prompts} is no file; write prompts to it, one JSON object a line: {{"prompt": "…"}}')
    if Path(out).exists() and not Path(out).is_file():
        raise UserError(f"{out} is not a file that answers can be kept in; set --out to a name like answers.jsonl")
    if Path(out).exists() and Path(out).samefile(prompts):
        raise UserError(f"{out} is the file of the prompts; set --out to another name")


def generate_file(
    engine: Engine,
    prompts: str | Path,
    out: str | Path,
    sampling: Sampling | None = None,
    *,
    name: str = "",
    report: Report = silent,
) -> dict[str, float]:
    """Answer every prompt of `prompts` into `out` and return counts and speed of this run. `name` tells models apart
    on a restart, beside the dtypes of weights and states.

    Rows of `out`: `Answer.to_dict`, the row's `id`, and `key`. One run at a time holds the file; a second is refused.
    """
    sampling = sampling or Sampling()
    forms = {getattr(part, "form", "") for part in engine.model.modules()} & {"fp8"}
    kinds = (str(engine.dtype).removeprefix("torch."), *forms, f"state {engine.state_dtype}")
    name = " ".join([name, *(kind for kind in kinds if not kind.endswith("float32"))])
    check_files(prompts, out)
    samples = [
        row.sampling.n for row in read_rows(prompts, sampling, name)
    ]  # every row is checked before the first is computed
    if not samples:
        raise UserError(f'{prompts} holds no prompt; write one JSON object a line: {{"prompt": "…"}}')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run writes {out}; wait for it or choose another file") from error
        done = _keep_finished(file, out, read_rows(prompts, sampling, name))
        if done:
            report({"event": "log", "text": f"{out} holds {done} of {len(samples)} answers; going on"})
        return _answer(engine, read_rows(prompts, sampling, name), file, done, len(samples), prompts, report)


def _keep_finished(file: IO[bytes], out: str | Path, rows: Iterator[Row]) -> int:
    """Cut the file to the answers of whole prompts and count those; UserError if other prompts made it."""
    file.seek(0)
    *lines, torn = file.read().split(b"\n")  # what follows the last line break was cut off while it was written
    if torn and not torn.startswith(BEGINNINGS) and not any(b.startswith(torn) for b in BEGINNINGS):
        raise UserError(f"{out} holds something else than answers; choose another file")
    done = used = 0
    for row in rows:
        group = lines[used : used + row.sampling.n]
        for place, line in enumerate(group, used + 1):
            if _key(line) != row.key:
                raise UserError(
                    f"{out}, line {place} does not answer line {row.line} of the prompts with these settings; "
                    "remove the file or choose another"
                )
        if len(group) < row.sampling.n:
            break
        done, used = done + 1, used + len(group)
    else:
        if used < len(lines):
            raise UserError(f"{out} holds more answers than there are prompts; remove the file or choose another")
    file.truncate(sum(len(line) + 1 for line in lines[:used]))
    return done


def _key(line: bytes) -> str | None:
    try:
        return json.loads(line).get("key")
    except (ValueError, AttributeError):
        return None


def _answer(
    engine: Engine, rows: Iterator[Row], file: IO[bytes], done: int, total: int, path: str | Path, report: Report
) -> dict[str, float]:
    """Compute the rows after the first `done`; each answer is on disk before the next is counted."""
    started, tokens, answers = time.perf_counter(), 0, 0
    taken: list[Row] = []

    def remaining() -> Iterator[tuple[Prompt, Sampling]]:
        for place, row in enumerate(rows):
            if place >= done:
                taken.append(row)
                yield row.prompt, row.sampling

    try:
        for answer in engine.generate_pairs(remaining()):
            row = taken[answer.index]
            line = {"id": row.id} if row.id is not None else {}
            line |= answer.to_dict() | {"index": done + answer.index, "key": row.key}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            tokens, answers = tokens + len(answer.ids), answers + 1
            rate = tokens / (time.perf_counter() - started)
            if answer.sample == row.sampling.n - 1:
                finished = done + answer.index + 1
                text = f"{rate:.0f} tokens/s"
                report({"event": "progress", "done": finished, "total": total, "unit": "prompts", "text": text})
    except UserError as error:
        raise UserError(f"{path}, line {taken[-1].line}: {error}" if taken else str(error)) from error
    seconds = time.perf_counter() - started
    return {
        "prompts": total - done,
        "answers": answers,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
