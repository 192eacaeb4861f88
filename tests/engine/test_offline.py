"""Prompts file to answers file: rows, mistakes with their line, and stopping anywhere."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace

import pytest

from whimbrel.engine import Engine, Sampling
from whimbrel.engine.offline import generate_file, read_rows
from whimbrel.errors import UserError
from whimbrel.model import fewbits

SAMPLING = Sampling(max_tokens=6, temperature=1.0, seed=3)


@pytest.fixture
def engine(hybrid, tokenizer):
    return Engine(hybrid, tokenizer, max_sequences=3, kv_tokens=512)


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": "one"},
        {
            "messages": [{"role": "user", "content": "two\u2028lines"}],
            "id": "b",
            "sampling": {"n": 2, "thinking_budget": 2},
        },
        {"prompt": [70, 71]},
        {"prompt": "four", "sampling": {"max_tokens": 2}, "id": 4},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_rows_come_out_in_order_with_ids_and_their_own_settings(engine, prompts, tmp_path):
    out, events = tmp_path / "new" / "out.jsonl", []
    metrics = generate_file(engine, prompts, out, SAMPLING, report=events.append)
    rows = read(out)
    assert [(row["index"], row["sample"], row.get("id")) for row in rows] == [
        (0, 0, None), (1, 0, "b"), (1, 1, "b"), (2, 0, None), (3, 0, 4),
    ]  # fmt: skip
    assert rows[4]["tokens"] <= 2 and rows[1]["key"] == rows[2]["key"] != rows[0]["key"]
    assert (
        metrics["prompts"] == 4 and metrics["answers"] == 5 and metrics["tokens"] == sum(row["tokens"] for row in rows)
    )
    assert [event["done"] for event in events if event["event"] == "progress"] == [1, 2, 3, 4]
    alone = next(engine.generate(["one"], SAMPLING))
    assert rows[0]["text"] == alone.text


def test_cut_anywhere_it_goes_on_to_the_same_file(engine, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    generate_file(engine, prompts, out, SAMPLING)
    whole = out.read_bytes()
    expected = without_times(read(out))
    lines = whole.split(b"\n")
    places = {0, 1, len(whole) - 1, len(whole)} | {
        sum(len(line) + 1 for line in lines[:n]) + d for n in range(5) for d in (0, 7)
    }
    for place in sorted(places):
        out.write_bytes(whole[:place])
        metrics = generate_file(engine, prompts, out, SAMPLING)
        assert without_times(read(out)) == expected
    assert metrics["prompts"] == 0 and out.read_bytes() == whole, "a finished file is left as it is"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"promt": "x"}', "unknown key 'promt'.*'prompt'"),
        ('{"prompt": "x", "messages": []}', "either"),
        ("{}", "either"),
        ('{"prompt": ""}', "must be text or ids"),
        ('{"messages": "x"}', "must be text or ids"),
        ('{"messages": [{"content": "x"}]}', "must be text or ids"),
        ('{"prompt": "x", "sampling": 3}', "must be an object"),
        ('{"prompt": "x", "sampling": {"temperatur": 1}}', "'temperature'"),
        ('{"prompt": "x", "sampling": {"top_p": 2}}', "top_p=2"),
        ('{"prompt": "x", "sampling": {"max_tokens": 4096}}', "kv_tokens"),
        ('{"prompt": [9999]}', "9999"),
    ],
)
def test_a_bad_row_names_its_line(engine, tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"prompts.jsonl, line 3: .*{words}"):
        generate_file(engine, path, tmp_path / "out.jsonl", Sampling(max_tokens=2))


def test_a_file_without_a_prompt_is_refused(engine, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt; write one JSON object a line"):
        generate_file(engine, tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_answers_of_other_dtypes_are_not_mixed(make_model, hybrid, engine, tokenizer, prompts, tmp_path):
    """float32 keeps the keys that files have had so far."""
    out = tmp_path / "out.jsonl"
    generate_file(engine, prompts, out, SAMPLING, name="a")
    assert read(out)[0]["key"] == next(read_rows(prompts, SAMPLING, "a")).key
    half = Engine(hybrid, tokenizer, max_sequences=3, kv_tokens=512, state_dtype="float16")
    wide = Engine(make_model(hybrid.config, 0).double(), tokenizer, max_sequences=3, kv_tokens=512)
    few = make_model(replace(hybrid.config, intermediate_size=64, mamba_num_heads=8), 3)
    fewbits.to_fp8(few)
    for other in (half, wide, Engine(few, tokenizer, max_sequences=3, kv_tokens=512)):
        with pytest.raises(UserError, match=r"out.jsonl, line 1 does not answer line 1"):
            generate_file(other, prompts, out, SAMPLING, name="a")
    assert generate_file(half, prompts, tmp_path / "half.jsonl", SAMPLING, name="a")["answers"] == 5
    assert generate_file(half, prompts, tmp_path / "half.jsonl", SAMPLING, name="a")["answers"] == 0


def test_answers_of_other_prompts_settings_or_models_are_not_mixed(engine, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    generate_file(engine, prompts, out, SAMPLING, name="a")
    before = out.read_bytes()
    for sampling, name in ((Sampling(max_tokens=6, temperature=1.0, seed=4), "a"), (SAMPLING, "b")):
        with pytest.raises(UserError, match=r"out.jsonl, line 1 does not answer line 1"):
            generate_file(engine, prompts, out, sampling, name=name)
    prompts.write_text('{"prompt": "one"}\n')
    with pytest.raises(UserError, match="more answers than"):
        generate_file(engine, prompts, out, SAMPLING, name="a")
    out.write_text("something precious\n")
    with pytest.raises(UserError, match="does not answer"):
        generate_file(engine, prompts, out, SAMPLING, name="a")
    assert out.read_text() == "something precious\n" and before


def test_a_missing_file_and_a_second_run_are_refused(engine, prompts, tmp_path):
    with pytest.raises(UserError, match="is no file"):
        generate_file(engine, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with open(tmp_path / "out.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run writes"):
            generate_file(engine, prompts, tmp_path / "out.jsonl")


def test_a_file_that_holds_something_else_is_left_alone(engine, prompts, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_bytes(b"my precious notes without a line break")
    with pytest.raises(UserError, match="something else than answers"):
        generate_file(engine, prompts, notes)
    assert notes.read_bytes() == b"my precious notes without a line break"
    before = prompts.read_bytes()
    with pytest.raises(UserError, match="the file of the prompts"):
        generate_file(engine, prompts, prompts)
    assert prompts.read_bytes() == before
    with pytest.raises(UserError, match="not a file"):
        generate_file(engine, prompts, tmp_path)


def test_bytes_that_are_no_text_are_named_and_odd_ids_do_not_stop_a_run(engine, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\xff\xfe\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        generate_file(engine, file, tmp_path / "out.jsonl")
    file.write_bytes(b'{"prompt": "a", "id": "\\ud800"}\n')
    assert generate_file(engine, file, tmp_path / "odd.jsonl", Sampling(max_tokens=2))["answers"] == 1


@pytest.mark.parametrize(
    "settings", [{"stop": 5}, {"stop": None}, {"n": 10**7}, {"top_k": 2**70}, {"temperature": 10**400}]
)
def test_settings_that_no_run_can_have_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)
