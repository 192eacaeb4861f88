"""Pairs: drawn from the model, ranked by the verifier; prompts that tell nothing make none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import vocabulary, write

from whimbrel import config
from whimbrel.align import pairs
from whimbrel.align.pairs import PairsSettings
from whimbrel.align.rollout import read_prompts, reward
from whimbrel.align.tuning import load, read_rows
from whimbrel.engine import Engine
from whimbrel.engine.answer import Answer
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.verify import check

SMALL = {"answers": 6, "max_tokens": 40, "device": "cpu"}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_rows(folder, name, [])


@pytest.fixture(scope="module")
def made(taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The stage's folder and figures on the taught model."""
    out = tmp_path_factory.mktemp("pairs")
    return out, pairs.run(config.parse(PairsSettings, SMALL), taught, out, silent)


def test_pairs_are_what_the_verifier_makes_of_the_answers(
    taught: dict[str, Path], made: tuple[Path, dict[str, Any]]
) -> None:
    """Drawn once more by hand: a pair where an answer is right and one wrong, of the first of each; ties make none."""
    out, figures = made
    asked = rows(taught["prompts"], "prompts")
    model, tokenizer = load(taught["model"], torch.device("cpu"))
    settings = config.parse(PairsSettings, SMALL)
    answers = list(Engine(model, tokenizer, max_sequences=256, prefill_tokens=8192).generate(
        [row["prompt"] for row in asked], [settings.sampling(number) for number in range(len(asked))]
    ))  # fmt: skip
    wanted, rated, total = [], 0, 0.0
    for number, row in enumerate(asked):
        group = answers[6 * number : 6 * number + 6]
        total += sum(reward(row, answer) for answer in group)
        whole = [answer for answer in group if answer.finish == "stop" and answer.text.strip()]
        rated += len(whole)
        right = [a.text.strip() for a in whole if check("exact", a.text, row["answer"])]
        wrong = [a.text.strip() for a in whole if not check("exact", a.text, row["answer"])]
        if right and wrong:
            wanted.append((row["prompt"], right[0], wrong[0]))
    found = rows(out, "pairs")
    assert [(pair["prompt"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in found] == wanted
    assert 0 < len(wanted) < len(asked), "every prompt made a pair, or none: ties were not seen"
    assert all((pair["chosen_reward"], pair["rejected_reward"]) == (1.0, 0.0) for pair in found)
    own = [entry["messages"][-1]["content"] for entry in rows(out, "conversations")]
    assert own == [entry["messages"][-1]["content"] for entry in rows(out, "rated")
                   if entry["attributes"]["correctness"] == 4]  # fmt: skip
    counts = {"pairs": len(wanted), "rated": rated, "conversations": len(own)}
    assert figures == counts | {"reward": pytest.approx(total / (6 * len(asked)))}


def test_a_pair_is_encoded_as_it_was_drawn(taught: dict[str, Path], made: tuple[Path, dict[str, Any]]) -> None:
    """What `dpo` learns from a chosen answer is the text that the model wrote, thought and end of turn included."""
    tokenizer = vocabulary()
    for pair in rows(made[0], "pairs"):
        for side in ("chosen", "rejected"):
            ids, learn = tokenizer.encode_chat([*pair["prompt"], *pair[side]])
            told = tokenizer.decode([i for i, on in zip(ids, learn, strict=True) if on], skip_special=False)
            thought, content = pair[side][0]["thinking"], pair[side][0]["content"]
            assert told == (f"{thought}\n</think>\n\n" if thought else "") + f"{content}\n<SPECIAL_12>"
    assert any(pair["chosen"][0]["thinking"] for pair in rows(made[0], "pairs"))


def test_every_finished_answer_is_rated(taught: dict[str, Path], made: tuple[Path, dict[str, Any]]) -> None:
    truth = {row["prompt"][0]["content"]: row["answer"] for row in rows(taught["prompts"], "prompts")}
    seen = set()
    for row in rows(made[0], "rated"):
        question, answer = row["messages"]
        right = check("exact", answer["content"], truth[question["content"]])
        assert row["attributes"]["correctness"] == 4.0 * right
        assert 0 < row["attributes"]["verbosity"] <= 4
        seen.add(right)
    assert seen == {True, False}


def test_the_same_seed_draws_the_same_and_another_others(
    taught: dict[str, Path], made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        pairs.run(config.parse(PairsSettings, SMALL | {"seed": seed}), taught, tmp_path / name, silent)
    rated = (made[0] / "rated.jsonl").read_bytes()
    assert (tmp_path / "same" / "rated.jsonl").read_bytes() == rated
    assert (tmp_path / "other" / "rated.jsonl").read_bytes() != rated


@pytest.mark.parametrize("answer", ["never", None])
def test_without_a_pair_there_is_a_way_out_and_no_file(
    taught: dict[str, Path], tmp_path: Path, answer: str | None
) -> None:
    """Nothing right, or nothing wrong, where every number is right."""
    asked = rows(taught["prompts"], "prompts")[:2]
    every = [str(number) for number in range(-30, 31)]
    inputs = taught | {"prompts": write(tmp_path / "p.jsonl", [row | {"answer": answer or every} for row in asked])}
    with pytest.raises(UserError, match="no prompt was answered both rightly and wrongly; raise answers or prompts"):
        pairs.run(config.parse(PairsSettings, SMALL | {"answers": 2}), inputs, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_answers_that_were_cut_are_no_side_of_a_pair(taught: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt was answered both"):
        pairs.run(config.parse(PairsSettings, SMALL | {"max_tokens": 4}), taught, tmp_path, silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": 1}, "answers is 1, of which no pair can be made; set answers to 2"),
        ({"temperature": 0}, "temperature is 0, which draws the same answer each time"),
        ({"prompts": 0}, "set prompts to 1 or more"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"device": "gpu"}, "set device to auto, cpu or cuda"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse(PairsSettings, changes)


def test_rows_without_a_truth_are_refused(taught: dict[str, Path], tmp_path: Path) -> None:
    bad = write(tmp_path / "p.jsonl", [{"prompt": "What is 1+1?", "verifier": "exact"}])
    with pytest.raises(UserError, match="line 1 has no 'answer'; give every row prompt, answer, verifier"):
        pairs.run(PairsSettings(device="cpu"), taught | {"prompts": bad}, tmp_path, silent)
    odd = write(tmp_path / "q.jsonl", [json.loads('{"prompt": "a", "answer": "b", "verifier": "exakt"}')])
    with pytest.raises(UserError, match="verifier is 'exakt'; did you mean 'exact'"):
        pairs.run(PairsSettings(device="cpu"), taught | {"prompts": odd}, tmp_path, silent)
    rule = {"instructions": ["punctuation:no_coma"], "arguments": [{}]}
    none = write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": rule, "verifier": "instructions"}])
    with pytest.raises(UserError, match=r"row 1: the verifier instructions cannot judge by .*no_coma"):
        pairs.run(PairsSettings(device="cpu"), taught | {"prompts": none}, tmp_path, silent)


def test_rules_that_ask_for_a_language_can_be_rewards(tmp_path: Path) -> None:
    """The verifier `instructions` is given the identifier of languages, as in `evaluate`."""
    rule = {"instructions": ["change_case:english_lowercase"], "arguments": [{}]}
    row = {"prompt": "a", "answer": rule, "verifier": "instructions"}
    (row,) = read_prompts(write(tmp_path / "p.jsonl", [row]), "prompts")
    said = "the tide was out and the mud shone in the sun"
    for text, gain in ((said, 1.0), (said.title(), 0.0)):
        answer = Answer(0, 0, text, "", (), (), "stop", None, "off", 3, 0, 0, None, None, 0.0, 0.0, 0.0)
        assert reward(row, answer) == gain
