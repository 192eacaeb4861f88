"""The stage: problems to figures, answers kept by what they depend on, killed and gone on with, scored again."""

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

from whimbrel import config
from whimbrel.data import tasks
from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.evaluate import runner, stages
from whimbrel.evaluate.generations import Generations
from whimbrel.evaluate.results import read_samples
from whimbrel.evaluate.tasks import Item
from whimbrel.events import silent
from whimbrel.model import LanguageModel
from whimbrel.text import Tokenizer

Write = Callable[..., Path]
CLOSE = ("</", "/t", "th", "hi", "in", "nk", "k>")
"""What follows what in the closing tag."""
THINKER = ("\na", "ab", "bc", "cd", "d<", *CLOSE, ">7", "7$")
"""Thinks `abcd`, then says 7."""
SUMS = ("=7", "7$", "?8", "8$", "!x", "xx")
"""Says 7 after `=`, 8 after `?`, and x without end after `!`."""


def problems(folder: Path, *prompts: str, answer: str = "7", verifier: str = "math") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": prompt, "answer": answer, "verifier": verifier} for prompt in prompts]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(model: Path, questions: Path, out: Path, **tree: Any) -> tuple[dict[str, Any], int]:
    """Metrics, and how many answers were generated."""
    inputs = {"model": model, "tasks": questions} | tree.pop("inputs", {})
    made: list[int] = []

    def report(event: dict[str, Any]) -> None:
        if event.get("unit") == "answers":
            made.append(event["done"])

    out.mkdir(exist_ok=True, parents=True)
    tree = {"tasks": {"sums": {}}, "max_tokens": 16, "chat": False, "device": "cpu"} | tree
    return stages.run(config.parse(stages.EvaluateSettings, tree), inputs, out, report), len(made)


def bare(folder: Path) -> list[dict[str, Any]]:
    """Samples without the time that they took."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_samples(folder)]


def test_problems_to_figures(write: Write, tmp_path: Path) -> None:
    questions = problems(tmp_path / "tasks", "2+5=", "2+5?", "2+5!")
    metrics, made = evaluate(write(*SUMS), questions, tmp_path / "out")
    assert made == 3
    assert metrics["sums"]["think"]["accuracy"] == 1 / 3
    rows = read_samples(tmp_path / "out")
    assert [row["outcome"] for row in rows] == ["correct", "wrong", "length"]
    assert [row["extracted"] for row in rows] == ["7", "8", None]
    assert [row["finish"] for row in rows] == ["stop", "stop", "length"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    (figures,) = written["tasks"]["sums"]
    assert figures["outcomes"] == {"correct": 1, "wrong": 1, "length": 1}


def test_modes_of_a_tasks_stage(write: Write, tmp_path: Path) -> None:
    """Thinking on, off and cut short, in one run over the test part that the stage `tasks` writes."""
    tasks.run(tasks.TasksSettings(conversations=0, prompts=0, validation=0, test=20), {}, tmp_path, silent)
    metrics, made = evaluate(
        write(*THINKER), tmp_path, tmp_path / "out", tasks={"test": {"group": "terms"}}, budgets=[None, 0, 2, 3],
        thinking_grace=0, max_tokens=24, batch=32,
    )  # fmt: skip
    assert made == 80
    found = dict(metrics["test"])
    curve = found.pop("curve")
    assert curve["well_formed"] == 1 and curve["half_between"] == 0  # it always says 7, however long it thinks
    assert {mode: one["thinking_tokens"] for mode, one in found.items()} == {
        "think": 4, "off": 0, "budget 2": 2, "budget 3": 3,
    }  # fmt: skip
    assert all(one["well_formed"] == 1 and one["problems"] == 20 for one in found.values())
    rows = read_samples(tmp_path / "out")
    assert len({row["accuracy"] for row in found.values()}) == 1  # it always says 7
    assert all((row["outcome"] == "correct") == (row["expected"] == "7") for row in rows)
    assert {(row["budget"], row["thinking_ended"]) for row in rows} == {
        (None, "closed"), (0, "off"), (2, "budget"), (3, "budget"),
    }  # fmt: skip


def test_answers_are_kept_by_what_they_depend_on(write: Write, tmp_path: Path) -> None:
    questions, model, out = problems(tmp_path / "tasks", "2+5=", "2+5?"), write(*SUMS), tmp_path / "out"
    assert evaluate(model, questions, out)[1] == 2
    assert evaluate(model, questions, out)[1] == 0
    assert (
        evaluate(model, questions, tmp_path / "again", threads=2, batch=4)[1] == 0
    )  # the same run's folder of answers
    assert evaluate(model, problems(tmp_path / "tasks", "2+5?", "3+4=", "2+5="), out)[1] == 1
    for change in ({"max_tokens": 15}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"budgets": [3]}):
        assert evaluate(model, questions, out, **change)[1] == 3, change
    assert evaluate(model, questions, out, generations=str(tmp_path / "elsewhere"))[1] == 3
    assert evaluate(write("=8", "8$", "?8", name="other"), questions, out)[1] == 3
    assert evaluate(model, questions, out)[1] == 0


def test_scored_again_without_a_token(write: Write, tmp_path: Path) -> None:
    model, out = write(*SUMS), tmp_path / "out"
    before, _ = evaluate(model, problems(tmp_path / "tasks", "2+5=", "2+5?"), out)
    after, made = evaluate(model, problems(tmp_path / "tasks", "2+5=", "2+5?", answer="8", verifier="exact"), out)
    assert made == 0
    assert [row["outcome"] for row in read_samples(out)] == ["wrong", "correct"]
    assert before["sums"]["think"] == after["sums"]["think"]


def test_samples_are_drawn_by_seed_problem_and_number(write: Write, tmp_path: Path) -> None:
    model = write("=7", "7$")  # after `=` as likely as any other character, with this temperature
    asked = {"temperature": 3.0, "samples": 4, "max_tokens": 6}
    evaluate(model, problems(tmp_path / "tasks", "1=", "2=", "3="), tmp_path / "a", **asked)
    evaluate(model, problems(tmp_path / "tasks", "1=", "2="), tmp_path / "b", **asked, generations=str(tmp_path / "g"))
    rows = bare(tmp_path / "a")
    assert rows[:8] == bare(tmp_path / "b")
    assert len({row["text"] for row in rows}) > 6
    assert len({row["seed"] for row in rows}) == 12
    figures = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["sums"][0]
    assert (figures["k"], list(figures["pass_at"])) == (4, ["1", "2", "4"])


def test_two_models_are_compared_problem_by_problem(write: Write, tmp_path: Path) -> None:
    questions = problems(tmp_path / "tasks", *(f"{number}?" for number in range(8)), "9=")
    evaluate(write(*SUMS), questions, tmp_path / "a")
    metrics, _ = evaluate(
        write("?7", "7$", "=7", name="better"), questions, tmp_path / "b", inputs={"against": tmp_path / "a"}
    )
    found = metrics["against"]["sums"]["think"]
    assert found["difference"] == 8 / 9
    assert found["p"] == 2 / 2**8
    written = json.loads((tmp_path / "b" / "results.json").read_text())["against"]["sums"]
    assert [(one["better"], one["worse"], one["pairs"]) for one in written] == [(8, 0, 9)]


def test_needles_and_text_beside_tasks(write: Write, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("=7" * 40)
    metrics, _ = evaluate(
        write(*SUMS, "s7"), problems(tmp_path / "tasks", "2+5="), tmp_path / "out",
        needle={"lengths": [300, 600], "samples": 3}, text={"length": 20}, inputs={"text": tmp_path / "text"},
    )  # fmt: skip
    assert metrics["needle"]["think"]["problems"] == 6
    assert set(metrics) == {"sums", "needle", "text"}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(written["tasks"]["needle"][0]["groups"]) == ["300 tokens", "600 tokens"]
    assert written["text"]["windows"] == 4


KILLED = """
import json, os, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import test_stages

add = test_stages.Generations.add
def killed(store, rows):
    if len(store) >= 8:
        if {torn}:  # in the middle of the line
            store._file.write(b'[{{"key": "half')
            store._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(store, rows)

test_stages.Generations.add = killed
test_stages.evaluate(Path({model!r}), Path({tasks!r}), Path({out!r}), batch=2, temperature=2.0)
"""


@pytest.mark.parametrize("torn", [False, True])
def test_killed_it_goes_on_and_ends_the_same(torn: bool, write: Write, tmp_path: Path) -> None:
    questions, model = problems(tmp_path / "tasks", *(f"{number}=" for number in range(20))), write(*SUMS)
    evaluate(model, questions, tmp_path / "whole", batch=2, temperature=2.0, generations=str(tmp_path / "other"))
    places = {"model": str(model), "tasks": str(questions), "out": str(tmp_path / "cut")}
    code = KILLED.format(here=str(Path(__file__).parent), torn=torn, **places)
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "samples.jsonl").exists()
    _, made = evaluate(model, questions, tmp_path / "cut", batch=2, temperature=2.0)
    assert made == 12  # of 20, parts of 8
    assert bare(tmp_path / "cut") == bare(tmp_path / "whole")
    assert (tmp_path / "cut" / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Generations(tmp_path / "one.jsonl"), pytest.raises(UserError, match="another run writes"):
        Generations(tmp_path / "one.jsonl")


def test_what_the_engine_refuses_is_said_and_tried_again(write: Write, tmp_path: Path) -> None:
    folder = write(*SUMS)
    engine = Engine(LanguageModel.load(folder), Tokenizer.load(folder), max_sequences=2)
    items = [Item("1", "2+5=", "7", "math", "1"), Item("2", "", "7", "math", "2")]
    wanted = list(runner.requests("sums", items, Sampling(max_tokens=4), False, "model"))
    with Generations(tmp_path / "one.jsonl") as store:
        refused = runner.generate(engine, wanted, store, silent)
        rows = [runner.score(one, store.get(one.key), refused.get(one.key), lambda text: "en") for one in wanted]
        assert list(store) == [wanted[0].key]
    assert [row["outcome"] for row in rows] == ["correct", runner.DOWN]
    assert "the prompt is empty" in rows[1]["error"]


@pytest.mark.parametrize("line", [b"garbage", b"7", b'[{"text": "7"}]', b"\0\0\0"])
def test_a_damaged_line_among_the_kept_answers_is_named(write: Write, tmp_path: Path, line: bytes) -> None:
    """Only the last line can be torn by a death; any other is somebody's work. What is taken out is made again."""
    questions, model = problems(tmp_path / "tasks", "2+5=", "2+5?"), write(*SUMS)
    evaluate(model, questions, tmp_path / "out")
    (kept,) = (tmp_path / "generations").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(line + b"\n" + whole)
    with pytest.raises(UserError, match=r"\.jsonl, line 1, is damaged; remove that line"):
        evaluate(model, questions, tmp_path / "out")
    kept.write_bytes(whole)
    assert evaluate(model, questions, tmp_path / "out")[1] == 0


def test_another_model_under_the_same_name_answers_for_itself(write: Write, tmp_path: Path) -> None:
    questions, out = problems(tmp_path / "tasks", "2+5="), tmp_path / "out"
    first, _ = evaluate(write(*SUMS), questions, out)
    second, made = evaluate(write("=8", "8$"), questions, out)  # the same folder, other weights
    assert (first["sums"]["think"]["accuracy"], second["sums"]["think"]["accuracy"], made) == (1, 0, 1)


def test_a_comparison_with_nothing_in_common_is_refused_before_a_token(write: Write, tmp_path: Path) -> None:
    model = write(*SUMS)
    evaluate(model, problems(tmp_path / "tasks", "2+5="), tmp_path / "a")
    for changes in ({"budgets": [4]}, {"tasks": {"other": {"path": "sums.jsonl"}}}):
        with pytest.raises(UserError, match="answers none of these problems under these budgets"):
            evaluate(model, tmp_path / "tasks", tmp_path / "b", inputs={"against": tmp_path / "a"}, **changes)
    assert not (tmp_path / "b" / "samples.jsonl").exists()
    with pytest.raises(UserError, match="answers none"):
        asked = problems(tmp_path / "more", "3+4=")
        evaluate(model, asked, tmp_path / "b", inputs={"against": tmp_path / "a"}, max_tokens=15)
    (kept,) = (tmp_path / "generations").iterdir()
    assert len(kept.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"tasks": {}}, "there is nothing to evaluate; set tasks"),
        ({"samples": 4}, "samples is 4 with temperature 0, all the same; set temperature"),
        ({"tasks": {"sum": {}}}, r"sum\.jsonl is not there; set tasks\.sum\.path"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"inputs": {"against": Path("nowhere")}}, r"nowhere is no evaluation"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(tree: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path / "no model", problems(tmp_path / "tasks", "2+5="), tmp_path / "out", **tree)


def test_tasks_without_their_input_are_refused() -> None:
    with pytest.raises(UserError, match="no input tasks is given for it; add --input tasks=FOLDER"):
        stages.check(config.parse(stages.EvaluateSettings, {"tasks": {"gsm8k": {}}}), {})
