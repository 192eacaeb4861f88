"""Commands that hold a model: what is typed arrives in the engine, results go where they should, a whole life works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from whimbrel import LanguageModel, ModelConfig, Tokenizer, cli

CONFIG = ModelConfig(
    pattern="M*-",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=6,
    mamba_head_dim=8,
    ssm_state_size=10,
    n_groups=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a vocabulary of bytes."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["whimbrel"], CONFIG.vocab_size)
    tokenizer.save(place / "words")
    LanguageModel(CONFIG).initialise(1).save(place / "tiny", place / "words")
    return place / "tiny"


@pytest.fixture
def talked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reached the conversation, which itself is tested in tests/serve."""
    seen: dict[str, Any] = {}

    def listen(engine: Any, sampling: Any, **options: Any) -> int:
        seen.update(options, engine=engine, sampling=sampling)
        return 7

    monkeypatch.setattr("whimbrel.serve.chat.chat", listen)
    return seen


def test_what_chat_is_given_arrives(folder: Path, tmp_path: Path, talked: dict[str, Any]) -> None:
    assert cli.main(["chat", str(folder)]) == 7
    assert (talked["once"], talked["system"]) == (None, None)
    assert talked["engine"].dtype == torch.float32 and talked["engine"].state_dtype == "float32"
    (tmp_path / "s.yaml").write_text("temperature: 0.5\nmax_tokens: 9\n")
    words = ["--once", "Hi", "--system", "Be brief.", "--config", str(tmp_path / "s.yaml"), "--dtype", "float64"]
    words += ["--state-dtype", "float16"]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["chat", str(folder), "max_tokens=5", 'stop=["a", "b"]', *words, "--threads", "2"]) == 7
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (talked["once"], talked["system"]) == ("Hi", "Be brief.")
    assert talked["engine"].dtype == torch.float64 and talked["engine"].state_dtype == "float16"
    assert talked["engine"].max_sequences == 1
    sampling = talked["sampling"]
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (5, 0.5, ("a", "b"))
    assert cli.main(["chat", str(folder), "--dtype", "fp8"]) == 7
    assert {m.form for m in talked["engine"].model.modules() if hasattr(m, "form")} == {"fp8"}


def answers(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of answers without what a clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_generate_answers_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two", "id": "b"}\n')
    command = [
        "generate",
        str(folder),
        str(prompts),
        "-o",
        "out/a.jsonl",
        "max_tokens=4",
        "seed=3",
        "--dtype",
        "float64",
    ]
    assert cli.main(command) == 0
    rows = answers(Path("out/a.jsonl"))
    assert [row.get("id") for row in rows] == [None, "b"]
    out, err = capsys.readouterr()
    assert out.startswith("out/a.jsonl: prompts 2, answers 2")
    assert "generate" in err
    Path("out/a.jsonl").write_bytes(Path("out/a.jsonl").read_bytes()[:-7])  # torn
    assert cli.main(command) == 0
    assert answers(Path("out/a.jsonl")) == rows
    assert "answers 1" in capsys.readouterr().out


def test_a_pipe_gets_answers_alone(folder: Path) -> None:
    command = [sys.executable, "-m", "whimbrel", "chat", str(folder), "max_tokens=6", "thinking_budget=0"]
    done = subprocess.run(command, input="Hello\n/bogus\nAgain\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens" not in done.stdout
    assert done.stderr.count("6 tokens, ") == 2
    assert "'/bogus'" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("chat", "MODEL", "--device", "cuda:99"), "set --device to cpu"),
        (("chat", "MODEL", "--device", "toaster"), "set --device to cpu"),
        (("chat", "MODEL", "--dtype", "float31"), "did you mean 'float32'?"),
        (("chat", "MODEL", "--threads", "-1"), "--threads"),
        (("generate", "MODEL", "GOOD", "--state-dtype", "float8"), "set state_dtype to float32 or float16"),
        (("chat", "smolm2"), "did you mean 'smollm2'?"),
        (("chat", "MODEL", "max_tokens=0"), "max_tokens"),
        (("chat", "MODEL", "--config", "none.yaml"), "none.yaml does not exist"),
        (("generate", "MODEL", "EMPTY"), "EMPTY"),
        (("generate", "MODEL", "TORN"), "line 2: not JSON"),
        (("generate", "MODEL", "MISSPELT"), "did you mean 'prompt'?"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TORN").write_text('{"prompt": "a"}\n{"prompt"\n')
    Path("GOOD").write_text('{"prompt": "a"}\n')
    Path("MISSPELT").write_text('{"promt": "a"}\n')
    code = cli.main([str(folder) if word == "MODEL" else word for word in words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert part in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_model_that_is_cut_short_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert cli.main(["chat", str(broken), "--once", "x"]) == 2
    err = capsys.readouterr().err
    assert ".safetensors" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_from_pages_to_a_talk(tmp_path: Path) -> None:
    """Every stage by its own command, as real processes, from a few texts to a model that is talked with."""
    words = (Path(__file__).parent / "data" / "corcovado.txt").read_text(encoding="utf-8").split()
    texts = [" ".join(words[start : start + 250]) for start in range(0, 560, 20)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def whimbrel(*words: str, said: str | None = None, noted: str = "") -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "whimbrel", *words],
            input=said,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert noted in done.stderr
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

    documents = whimbrel("data", "--input", "pages=pages.jsonl", "workers=1", "languages=[]")
    tokenizer = whimbrel("tokenizer", "--input", f"documents={documents}", "vocab_size=400")
    tokens = whimbrel("tokens", "--input", f"documents={documents}", "--input", f"tokenizer={tokenizer}", "heldout=0.1")
    shape = ["model.preset=hybrid-tiny", "length=64", "batch_rows=2", "train.steps=6", "train.schedule.warmup_steps=1"]
    inputs = ["--input", f"tokens={tokens}", "--input", f"tokenizer={tokenizer}"]
    trained = whimbrel("pretrain", *inputs, *shape)
    assert (tmp_path / trained / "model" / "config.json").is_file()
    again = whimbrel("pretrain", *inputs, *shape)
    assert again == trained
    sampled = whimbrel("sample", "--input", f"model={trained}", 'prompts=["The whimbrel"]', "max_tokens=8")
    assert json.loads((tmp_path / sampled / "samples.json").read_text())["samples"][0]["trained"]["tokens"] == 8
    whimbrel("chat", f"{trained}/model", "max_tokens=8", "ignore_eos=true", said="Who flies?\n", noted="8 tokens")
    made = json.loads((tmp_path / trained / "manifest.json").read_text())
    assert made["metrics"]
