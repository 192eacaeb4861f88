"""Files of problems, in their authors' forms, and what is said of those that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from whimbrel.errors import UserError
from whimbrel.evaluate.tasks import TaskSettings, read
from whimbrel.verify import judge
from whimbrel.verify.math import ASK

BENCHMARKS = Path(os.environ.get("WHIMBREL_BENCHMARKS", Path(__file__).parents[3] / "shared" / "benchmarks"))
ROWS: dict[str, tuple[str, Any]] = {
    "gsm8k": ("gsm8k/test.jsonl", {"question": "2+5?", "answer": "2+5=<<2+5=7>>7\n#### 7"}),
    "aime24": ("aime24/test.jsonl", {"id": "aime24-0", "problem": "2+5?", "expected_answer": "073"}),
    "ifeval": (
        "ifeval/input_data.jsonl",
        {"key": 9, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ),
}


def put(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")


def test_forms_of_the_authors(tmp_path: Path) -> None:
    for path, row in ROWS.values():
        put(tmp_path / path, row)
    put(tmp_path / "mgsm" / "mgsm_de.tsv", "Zwei und fünf?\t7\nUnd?\t1,234\n")
    put(tmp_path / "mgsm" / "mgsm_en.tsv", "Two and five?\t7\nAnd?\t1,234\n")
    (gsm,) = read("gsm8k", TaskSettings(), tmp_path)
    assert (gsm.prompt, gsm.expected, gsm.verifier) == ("2+5?" + ASK, "7", "math")
    (aime,) = read("mine", TaskSettings(form="aime24"), tmp_path)
    assert judge("math", "\\boxed{73}", aime.expected).outcome == "correct"
    (rules,) = read("ifeval", TaskSettings(), tmp_path)
    assert rules.expected == {"instructions": ["punctuation:no_comma"], "arguments": [{}]}
    mgsm = read("mgsm", TaskSettings(), tmp_path)
    assert [(item.id, item.cluster, item.group) for item in mgsm] == [
        ("de-1", "1", "de"), ("de-2", "2", "de"), ("en-1", "1", "en"), ("en-2", "2", "en"),
    ]  # fmt: skip
    assert judge("math", "#### 1234", mgsm[1].expected).outcome == "correct"
    assert [item.id for item in read("mgsm", TaskSettings(languages=("en",), limit=1), tmp_path)] == ["en-1"]


def test_nothing_that_a_prompt_says_is_its_own_answer() -> None:
    assert judge("math", "2+5?" + ASK, "7").outcome == "no answer"


def test_rows_of_our_own(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "2+5?"}]
    put(
        tmp_path / "test.jsonl",
        {"prompt": asked, "answer": "7", "verifier": "exact", "terms": 2},
        "\n",
        {"messages": asked, "answer": "7", "verifier": "math", "terms": 3, "id": "x"},
    )
    items = read("test", TaskSettings(group="terms"), tmp_path)
    assert [(item.id, item.group, item.prompt) for item in items] == [("1", "terms 2", asked), ("x", "terms 3", asked)]
    assert (
        read("short", TaskSettings(path="test.jsonl", limit=1), tmp_path)[0]
        == read("short", TaskSettings(), tmp_path / "test.jsonl")[0]
    )


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (["not json\n"], {}, "line 1: not JSON"),
        (["[1]\n"], {}, "line 1: not an object"),
        ([{"prompt": "a", "answer": "b", "verifier": "exat"}], {}, "line 1: verifier is 'exat'; did you mean 'exact'"),
        (["\n", {"prompt": "a", "verifier": "exact"}], {}, "line 2: no key 'answer'"),
        ([], {}, "holds no problems"),
        ([{"prompt": 5, "answer": "b", "verifier": "exact"}], {}, "line 1: the prompt is 5; write a text or a list"),
        ([{"prompt": "", "answer": "b", "verifier": "exact"}], {}, "line 1: the prompt is ''"),
        (
            [{"question": "a", "answer": 7}],
            {"form": "gsm8k", "path": "sums.jsonl"},
            "line 1: a value of the wrong kind .*rpartition",
        ),
        ([{"id": "x", "prompt": "a", "answer": "b", "verifier": "exact"}] * 2, {}, "has the id 'x' more than once"),
        (["half a li"], {}, "line 1: not JSON"),
        ([], {"languages": ("de",)}, "languages is set, but the form jsonl has none; leave it out"),
        ([], {"form": "gsm8k", "group": "terms"}, "group is set, but the form gsm8k has none"),
        ([], {"form": "gsm"}, "form is 'gsm'; did you mean 'mgsm'"),
        ([], {"path": "other.jsonl"}, r"other\.jsonl is not there; set tasks\.sums\.path"),
    ],
)
def test_what_is_wrong_is_named(rows: list[Any], settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    put(tmp_path / "sums.jsonl", *rows)
    with pytest.raises(UserError, match=said):
        read("sums", TaskSettings(**settings), tmp_path)


def test_files_that_are_no_text_or_no_table(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"sums\.jsonl is not UTF-8"):
        read("sums", TaskSettings(), tmp_path)
    put(tmp_path / "mgsm" / "mgsm_de.tsv", "Zwei und fünf?\t7\nUnd?\n")
    with pytest.raises(UserError, match=r"mgsm_de\.tsv, line 2: not question, tab, answer"):
        read("mgsm", TaskSettings(), tmp_path)
    assert len(read("mgsm", TaskSettings(limit=1), tmp_path)) == 1


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks' files are not here")
def test_the_benchmarks_own_files() -> None:
    for name, count in (("gsm8k", 1319), ("ifeval", 541), ("mgsm", 2750), ("aime24", 30)):
        items = read(name, TaskSettings(), BENCHMARKS)
        assert len(items) == len({item.id for item in items}) == count
        if name != "ifeval":
            assert all(
                judge("math", f"\\boxed{{{item.expected}}}", item.expected).outcome == "correct" for item in items
            )
