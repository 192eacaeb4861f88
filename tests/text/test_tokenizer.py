"""The tokenizer: what it promises about bytes, digits, reserved slots, saved folders, streams and broken files."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from whimbrel.errors import UserError
from whimbrel.text import Tokenizer

VOCABULARY = 512

texts = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["hello", " ", "  ", "\n", "\r\n", "\t", "42", "🐦", "❤️", "é", "e\u0301", "鸟", "</think>", "<s>", "\0"]
    ),
    max_size=20,
).map("".join)


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@given(text=texts)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode_batch([text, "x"], special=False)[0] == tokenizer.encode(text, special=False)


def test_merges_happen_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("The whimbrel crosses the ocean")) <= 10
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("a1234567890b x=42")]
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list("123456789042")
    for i in range(tokenizer.vocab_size):
        entry = tokenizer.decode([i])
        assert not re.search(r"\d", entry) or len(entry) == 1, f"entry {i} {entry!r} joins a digit with something"


def test_reserved_slots(tokenizer: Tokenizer) -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 64))]
    assert [tokenizer.encode(name) for name in names] == [[i] for i in range(64)]
    assert [tokenizer.encode(f"<SPECIAL_{i}>") for i in (10, 11, 12)] == [[10], [11], [12]]
    assert all(i >= 64 for name in names for i in tokenizer.encode(name, special=False))
    assert tokenizer.decode([10, 11, 12, 1]) == ""
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (VOCABULARY, 1, (2, 12), 0)


def test_the_beginning_is_added_once_and_only_when_asked_for(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("bird")
    assert 1 not in plain
    assert tokenizer.encode("bird", bos=True) == [1, *plain]
    assert tokenizer.encode("<s>bird", bos=True) == [1, *plain]
    assert tokenizer.encode_batch(["bird", "<s>bird"], bos=True) == [[1, *plain]] * 2
    assert not tokenizer.adds_bos


def test_a_folder_whose_model_wants_the_beginning(llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(llama_folder)
    assert tokenizer.adds_bos
    assert tokenizer.encode("the ocean")[0] != 1
    assert tokenizer.encode("<s>the ocean", bos=tokenizer.adds_bos).count(1) == 1
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(llama_folder)
    for text in ("the ocean", " naïve\n bird", ""):
        assert tokenizer.encode(text, bos=tokenizer.adds_bos) == theirs(text)["input_ids"]


def test_training_is_deterministic(tokenizer: Tokenizer, pages: list[str]) -> None:
    """Also in another process, with other hash seeds and one thread."""
    script = f"from whimbrel.text import Tokenizer\nprint(Tokenizer.train({pages!r}, {VOCABULARY})._backend.to_str())"
    other = subprocess.run(
        [sys.executable, "-c", script],
        env={"RAYON_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == tokenizer._backend.to_str()
    assert Tokenizer.train(pages, VOCABULARY)._backend.to_str() == tokenizer._backend.to_str()


def test_the_vocabulary_is_exact_or_refused(pages: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"vocab_size=5000: they give (\d+) entries; set vocab_size to \1 or less"
    ) as found:
        Tokenizer.train(pages, 5000)
    works = int(re.search(r"give (\d+)", str(found.value)).group(1))  # type: ignore[union-attr]
    assert Tokenizer.train(pages, works).vocab_size == works
    with pytest.raises(UserError, match="set vocab_size to 320 or more"):
        Tokenizer.train(pages, 319)
    with pytest.raises(UserError, match="set vocab_size to 320 or less"):
        Tokenizer.train([], 400)
    with pytest.raises(UserError, match="set reserved to 13 or more"):
        Tokenizer.train(pages, 400, reserved=12)
    assert Tokenizer.train([], 269, reserved=13).vocab_size == 269


def test_half_a_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 2 of the text"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(UserError, match="surrogate"):
        Tokenizer.train(["\udfff"], 400)


@given(text=texts)
def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text), skip_special=False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 0, VOCABULARY)


def test_saved_is_loaded(tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "chat_template.jinja").write_text("of another model")
    loaded = Tokenizer.load(saved)
    loaded.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for one in (loaded, again):
        assert one._backend.to_str() == tokenizer._backend.to_str()
        assert (one.bos_id, one.eos_ids, one.pad_id, one.chat_template) == (1, (2, 12), 0, tokenizer.chat_template)


def test_end_tokens_of_the_folder(saved: Path, tmp_path: Path) -> None:
    Tokenizer.load(saved).save(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.load(tmp_path).eos_ids == (2, 7, 12)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert Tokenizer.load(tmp_path).eos_ids == (2, 9, 12)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 512}')
    with pytest.raises(UserError, match="eos_token_id 512 is outside the vocabulary of 512"):
        Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        Tokenizer.load(tmp_path)


def test_truncation_in_the_file_is_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=30)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer_config.json", None, r"tokenizer_config\.json is missing"),
        ("tokenizer.json", '{"version": "1.0", "mod', r"tokenizer\.json is broken"),
        ("tokenizer.json", '{"model": {"type": "Riddle"}}', r"tokenizer\.json is broken"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', r"eos_token '<end>' .* is not in tokenizer\.json"),
        ("config.json", "x", r"config\.json is not JSON"),
    ],
)
def test_broken_folders(tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | None, words: str) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        Tokenizer.load(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


@given(ids=st.lists(st.integers(0, VOCABULARY + 5), max_size=40))
@settings(max_examples=300)
def test_a_stream_of_any_ids_equals_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        stream = tokenizer.stream(skip_special=skip)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


@given(text=texts)
def test_a_stream_never_gives_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream(skip_special=False)
    ids = tokenizer.encode(text)
    parts = [stream.push(i) for i in ids]
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.finish() == text


def test_a_stream_gives_a_character_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦉")
    assert len(ids) > 1, "no page has an owl, so it takes several entries"
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == [*[""] * (len(ids) - 1), "🦉"]
    assert stream.push(2) == ""
    assert stream.push(tokenizer.encode("a")[0]) == "a"


@given(ids=st.lists(st.integers(0, 320) | st.integers(259, 320), max_size=40))
def test_a_stream_of_a_sentencepiece_vocabulary(llama_folder: Path, ids: list[int]) -> None:
    spm = load(llama_folder)
    stream = spm.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == spm.decode(ids)


def test_the_mask_of_a_sentencepiece_vocabulary(llama_folder: Path) -> None:
    spm = load(llama_folder)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the ocean"}]
    ids, mask = spm.encode_chat(messages)
    assert ids == spm.encode(spm.render(messages, generation=False))
    trained = [i for i, used in zip(ids, mask, strict=True) if used]
    assert spm.decode(trained, skip_special=False) == "the ocean </s>"
    assert trained[-1] == 2


def test_a_token_across_the_start_of_a_turn_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    load(llama_folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "a bi"}, {"role": "assistant", "content": "rd"}]
    with pytest.raises(UserError, match="a token of this tokenizer spans the end of the prompt"):
        Tokenizer.load(tmp_path).encode_chat(messages)
