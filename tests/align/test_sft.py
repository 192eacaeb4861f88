"""Conversations in three modes: what is shown, what of it is learned, and that packed ones do not see each other."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import LOOP, lines, network, vocabulary, write

from whimbrel import config
from whimbrel.align.sft import ChatTokensSettings, SftSettings, encode, modes, run_chat_tokens, shorten, write_rows
from whimbrel.align.sft import run as tune
from whimbrel.data import shards
from whimbrel.data.pack import IGNORE, Source, WholeDocuments
from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.step import accumulate

HEAD = "<SPECIAL_10>System\n\n<SPECIAL_11>User\nWhat is 7+5-9?\n<SPECIAL_11>Assistant\n<think>"
ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "What is 7+5-9?"},
        {"role": "assistant", "thinking": "7+5=12\n-9=3", "content": "3"},
    ]
}


def parts(row: dict[str, Any], mode: Any, seed: int = 0) -> list[tuple[str, bool]]:
    """Stretches of text, and whether each is learned."""
    tokenizer = vocabulary()
    ids, learn = encode(tokenizer, row, mode, np.random.default_rng(seed))
    cuts = [0, *(np.flatnonzero(np.diff(learn)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b], skip_special=False), learn[a]) for a, b in pairwise(cuts)]


def test_with_a_thought_everything_that_the_assistant_wrote_is_learned() -> None:
    told = "7+5=12\n-9=3\n</think>\n\n3\n<SPECIAL_12>"
    assert parts(ROW, "on") == [(HEAD + "\n", False), (told, True), ("\n", False)]


def test_without_a_thought_the_empty_tags_are_given() -> None:
    assert parts(ROW, "off") == [(HEAD + "</think>", False), ("3\n<SPECIAL_12>", True), ("\n", False)]


def test_a_cut_thought_is_closed_by_somebody_else_and_the_answer_stays() -> None:
    """The rest after the tag is learned: the answer is to follow whoever closed the thought."""
    seen = {json.dumps(parts(ROW, "cut", seed)) for seed in range(60)}
    for thought in ("7+5=12", "7+5=12\n-9=3"):
        told = [(HEAD + "\n", False), (thought + "\n", True), ("</think>", False), ("\n\n3\n<SPECIAL_12>", True)]
        assert json.dumps([*told, ("\n", False)]) in seen
    assert len(seen) == 2


def test_a_thought_without_line_breaks_is_cut_anywhere_alike() -> None:
    tokenizer, thought = vocabulary(), "abcdefghij"
    found = Counter(shorten(tokenizer, thought, np.random.default_rng(seed)) for seed in range(900))
    assert set(found) == {thought[:length] for length in range(1, 10)}
    assert min(found.values()) > 60 and max(found.values()) < 150  # 100 each


def test_a_cut_never_splits_a_character() -> None:
    for seed in range(30):
        assert "\ufffd" not in shorten(vocabulary(), "äöü½", np.random.default_rng(seed))


def test_only_the_last_turn_of_a_conversation_is_learned() -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "thinking": "hm", "content": "Hello"}]
    row = {"messages": [*before, *ROW["messages"]]}
    learned = [text for text, learn in parts(row, "on") if learn]
    assert learned == ["7+5=12\n-9=3\n</think>\n\n3\n<SPECIAL_12>"]
    assert "hm" not in "".join(text for text, _ in parts(row, "on"))


def test_modes_have_their_shares_whatever_is_held_out() -> None:
    settings = SftSettings(off=0.3, cut=0.1, heldout=0.05)
    chosen, held = modes(settings, 20_000)
    assert Counter(chosen)["off"] == pytest.approx(6000, rel=0.05)
    assert Counter(chosen)["cut"] == pytest.approx(2000, rel=0.1)
    assert sum(held) == pytest.approx(1000, rel=0.1)
    assert (chosen, held) == modes(settings, 20_000)
    assert chosen != modes(SftSettings(off=0.3, cut=0.1, seed=1), 20_000)[0]


def test_shards_hold_the_ids_and_masks_of_every_conversation(tmp_path: Path) -> None:
    settings, tokenizer = SftSettings(off=0.3, cut=0.3, heldout=0.2), vocabulary()
    answers = [{"role": "assistant", "thinking": "a\nb\nc", "content": str(n)} for n in range(40)]
    rows = [{"messages": [{"role": "user", "content": f"What is {n}?"}, answer]} for n, answer in enumerate(answers)]
    counts = write_rows(settings, rows, tokenizer, tmp_path, silent)
    chosen, held = modes(settings, 40)
    assert counts == dict(Counter(chosen)) and sum(counts.values()) == 40
    for name, wanted in (("train", False), ("heldout", True)):
        tokens = shards.TokenShards(tmp_path / name)
        for place, number in enumerate(n for n in range(40) if held[n] == wanted):
            ids, learn = encode(tokenizer, rows[number], chosen[number], np.random.default_rng([0, 2, number]))
            start, stop = tokens.starts_D1[place : place + 2].tolist()
            assert tokens.read(start, stop).tolist() == ids
            assert tokens.learn(start, stop).tolist() == learn


def packed(tmp_path: Path, rows: list[dict[str, Any]], length: int) -> Source:
    """A source of rows of these conversations."""
    write_rows(SftSettings(off=0.0, cut=0.0, heldout=0.0), rows, vocabulary(), tmp_path, silent)
    return Source(WholeDocuments(shards.TokenShards(tmp_path / "train"), length, 0), 1)


def test_packed_conversations_do_not_see_each_other(tmp_path: Path) -> None:
    """The loss of a row is that of its conversations alone, and the target of a token is the next of the same one."""
    other = {"messages": [{"role": "user", "content": "Say x"}, {"role": "assistant", "content": "x" * 9}]}
    rows, model = [ROW, other], network()
    batch = packed(tmp_path, rows, 400).batch(0)
    assert len(batch.lengths) == 2
    loss, _ = accumulate(model, CrossEntropy(), [batch], learn=False)
    total, count = 0.0, 0
    for row in rows:
        ids, learn = encode(vocabulary(), row, "on", np.random.default_rng(0))
        logp_LV = model(torch.tensor([ids]))[0].log_softmax(-1)
        places = [place for place, learned in enumerate(learn) if learned]
        total -= sum(logp_LV[place - 1, ids[place]].item() for place in places)
        count += len(places)
    assert loss == pytest.approx(total / count, rel=1e-5)
    first = batch.lengths[0]
    changed = torch.from_numpy(batch.tokens_T.copy())
    changed[:first] = 7
    layout = Layout.of(batch.lengths)
    after = [model(tokens, layout)[first:] for tokens in (torch.from_numpy(batch.tokens_T), changed)]
    assert torch.equal(*after)
    assert batch.targets_T[first - 1] == IGNORE


def test_a_conversation_longer_than_a_row_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"length is 40, the longest document has \d+ tokens; set length to that"):
        packed(tmp_path, [ROW], 40)


def test_the_tuned_model_answers_in_form_and_learns(taught: dict[str, Path]) -> None:
    out = taught["model"]
    looks = lines(out, "validation_loss")
    assert looks[-1] < 0.3 * looks[0]
    engine = Engine(LanguageModel.load(out / "model"), vocabulary())
    question = [{"role": "user", "content": "What is 7+2?"}]
    (thinking,) = engine.generate([question], Sampling(40))
    assert thinking.thinking_ended == "closed" and "=" in thinking.thinking and thinking.finish == "stop"
    (direct,) = engine.generate([question], Sampling(40, thinking_budget=0))
    assert direct.thinking_ended == "off" and direct.text.strip().lstrip("-").isdigit()


def test_a_stage_that_was_cut_short_ends_in_the_same_bits(world: dict[str, Path], tmp_path: Path) -> None:
    said = {"length": 256, "device": "cpu", "heldout": 0.05, "train": LOOP | {"steps": 6, "checkpoint_every": 2}}
    settings = config.parse(SftSettings, said)
    tune(settings, world, tmp_path / "whole", silent)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(settings, world, tmp_path / "cut", stop)
    tune(settings, world, tmp_path / "cut", silent)
    name = "model/model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"off": 0.8, "cut": 0.3}, r"off 0\.8 and cut 0\.3 are more than all; set cut to 0\.2 or less"),
        ({"off": -0.1}, "set off between 0 and 1"),
        ({"length": 0}, "set length to 1 or more"),
        ({"lora": {"rank": 0}}, "set lora.rank to 1 or more"),
        ({"lora": {"targets": ["qproj"]}}, "did you mean 'q_proj'"),
        ({"device": "gpu"}, "set device to auto, cpu or cuda"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse(SftSettings, changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n{"messages"', "line 2: not JSON"),
        ('{"message": []}', "line 1 has no 'messages'"),
        ("", "is empty"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "conversations.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        tune(SftSettings(), {"conversations": file, "model": write(tmp_path / "m", [])}, tmp_path, silent)
    with pytest.raises(UserError, match="does not exist"):
        tune(SftSettings(), {"conversations": tmp_path / "x"}, tmp_path, silent)


def test_chat_tokens_are_the_shards_of_sft_without_its_training(tmp_path: Path) -> None:
    answer = {"role": "assistant", "thinking": "2", "content": "1"}
    rows = [{"messages": [{"role": "user", "content": f"{number}?"}, answer]} for number in range(40)]
    vocabulary().save(tmp_path / "words")
    inputs = {"tokenizer": tmp_path / "words", "conversations": write(tmp_path / "c.jsonl", rows)}
    settings = ChatTokensSettings(off=0.3, cut=0.1, heldout=0.2, seed=5)
    figures = run_chat_tokens(settings, inputs, tmp_path / "out", silent)
    same = SftSettings(off=0.3, cut=0.1, heldout=0.2, seed=5)
    counts = write_rows(same, rows, vocabulary(), tmp_path / "sft", silent)
    assert figures == {"tokens": shards.TokenShards(tmp_path / "sft" / "train").tokens} | counts
    for name in ("train.bin", "train.mask.bin", "heldout.bin", "heldout.mask.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "sft" / name).read_bytes()
    with pytest.raises(UserError, match=r"set cut to 0\.3 or less"):
        ChatTokensSettings(off=0.7, cut=0.5)
