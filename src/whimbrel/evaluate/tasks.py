"""Problems to answer: benchmark files as their authors publish them, and JSONL of `{"prompt", "answer", "verifier"}`.

Nothing is downloaded: files lie under the stage's input `tasks`, in the folders that `FORMS` names unless `path` says
otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.errors import UserError, nearest
from whimbrel.verify import known
from whimbrel.verify.math import ASK


class TaskSettings(Settings):
    """One set of problems."""

    form: str | None = None
    """`gsm8k`, `aime24`, `mgsm`, `ifeval` or `jsonl`; the task's own name if it is one of these, else `jsonl`."""
    path: str | None = None
    """File (of `mgsm`: folder) under the input `tasks`; the form's usual place if not given."""
    limit: int | None = Field(default=None, ge=1)
    """Problems at most, the first ones; of `mgsm` in each language."""
    languages: tuple[str, ...] = ()
    """Of `mgsm` alone: which of its languages; none: all there are."""
    group: str | None = None
    """Of `jsonl` alone: the key of a row by whose values figures are also given apart."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an answer at most, thought included; None: what holds for all tasks."""


@dataclass(frozen=True)
class Item:
    """One problem. Items of a `cluster` stand and fall together (a problem's translations); `group` splits figures."""

    id: str
    prompt: str | list[dict[str, Any]]
    expected: Any
    verifier: str
    cluster: str
    group: str = ""


def read(name: str, settings: TaskSettings, root: Path) -> list[Item]:
    """The items of a task; `UserError` names the file, the line and what would work."""
    form = settings.form or (name if name in FORMS else "jsonl")
    if form not in FORMS:
        raise UserError(f"tasks.{name}.form is {form!r}; {nearest(form, FORMS)}")
    for setting, owner in (("languages", "mgsm"), ("group", "jsonl")):
        if getattr(settings, setting) and form != owner:
            raise UserError(f"tasks.{name}.{setting} is set, but the form {form} has none; leave it out")
    place, reader = FORMS[form]
    if root.is_file() and settings.path is None:
        path = root
    else:
        path = root / (settings.path or place or f"{name}.jsonl")
    if not path.exists():
        raise UserError(f"tasks.{name}: {path} is not there; set tasks.{name}.path to a place in {root}")
    try:
        items = list(reader(path, settings))
    except UnicodeDecodeError as error:
        raise UserError(f"tasks.{name}: {path} is not UTF-8 ({error.reason}); convert it") from error
    if not items:
        raise UserError(f"tasks.{name}: {path} holds no problems; set tasks.{name}.path to a file that does")
    twice = [item for item, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise UserError(f"tasks.{name}: {path} has the id {twice[0]!r} more than once; give every problem its own")
    return items


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every line of a JSONL file that is not empty."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not an object; write one object a line")
                yield number, row


def _made(path: Path, limit: int | None, make: Callable[[int, dict[str, Any]], Item]) -> Iterator[Item]:
    """Items from the first rows of a file; a key that a row lacks is named with its line."""
    for number, row in islice(rows(path), limit):
        try:
            yield make(number, row)
        except KeyError as error:
            raise UserError(
                f"{path}, line {number}: no key {error}; is the file of the form this task reads?"
            ) from None
        except (AttributeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: a value of the wrong kind ({error}); write texts") from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _gsm8k(path: Path, settings: TaskSettings) -> Iterator[Item]:
    def make(number: int, row: dict[str, Any]) -> Item:
        answer = row["answer"].rpartition("####")[2].strip()
        return Item(str(number), row["question"] + ASK, answer, "math", str(number))

    return _made(path, settings.limit, make)


def _aime24(path: Path, settings: TaskSettings) -> Iterator[Item]:
    def make(number: int, row: dict[str, Any]) -> Item:
        return Item(str(row["id"]), row["problem"] + ASK, row["expected_answer"], "math", str(number))

    return _made(path, settings.limit, make)


def _ifeval(path: Path, settings: TaskSettings) -> Iterator[Item]:
    def make(number: int, row: dict[str, Any]) -> Item:
        rules = {"instructions": row["instruction_id_list"], "arguments": row["kwargs"]}
        return Item(str(row["key"]), row["prompt"], rules, "instructions", str(number))

    return _made(path, settings.limit, make)


def _mgsm(path: Path, settings: TaskSettings) -> Iterator[Item]:
    files = {file.stem.removeprefix("mgsm_"): file for file in sorted(path.glob("mgsm_*.tsv"))}
    for language in settings.languages or files:
        if language not in files:
            raise UserError(f"languages names {language!r}; {nearest(language, files)} (in {path})")
        lines = files[language].read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines[: settings.limit], 1):
            question, tab, answer = line.rpartition("\t")
            if not tab or not question.strip() or not answer.strip():
                raise UserError(f"{files[language]}, line {number}: not question, tab, answer; mend it or set limit")
            yield Item(f"{language}-{number}", question + ASK, answer.strip(), "math", str(number), language)


def _jsonl(path: Path, settings: TaskSettings) -> Iterator[Item]:
    def make(number: int, row: dict[str, Any]) -> Item:
        group = "" if settings.group is None else f"{settings.group} {row[settings.group]}"
        prompt = row["messages"] if "messages" in row else row["prompt"]
        if not prompt or not isinstance(prompt, str | list):
            raise UserError(f"the prompt is {prompt!r}; write a text or a list of messages")
        return Item(str(row.get("id", number)), prompt, row["answer"], known(row["verifier"]), str(number), group)

    return _made(path, settings.limit, make)


FORMS: Mapping[str, tuple[str, Callable[[Path, TaskSettings], Iterator[Item]]]] = {
    "gsm8k": ("gsm8k/test.jsonl", _gsm8k),
    "aime24": ("aime24/test.jsonl", _aime24),
    "ifeval": ("ifeval/input_data.jsonl", _ifeval),
    "mgsm": ("mgsm", _mgsm),
    "jsonl": ("", _jsonl),
}
"""Usual place and reader of each form."""
