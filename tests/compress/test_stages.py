"""The stages: a bound in, a model folder out; what was interrupted goes on; a taught child is better than a cut one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whimbrel import cli, config
from whimbrel.compress.stages import CompressSettings, DistillSettings, run_compress, run_distill
from whimbrel.data import shards
from whimbrel.engine.plan import plan
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.language import LanguageModel
from whimbrel.model.presets import preset
from whimbrel.text import Tokenizer
from whimbrel.train.stages import PretrainSettings
from whimbrel.train.stages import run as pretrain

LOOP = {
    "steps": 4,
    "threads": 1,
    "validate_batches": 2,
    "checkpoint_every": 2,
    "tensorboard": False,
    "optimizer": {"learning_rate": 3e-3},
}
ROWS: dict[str, Any] = {"length": 64, "batch_rows": 4, "device": "cpu"}


def cut_settings(**changes: Any) -> CompressSettings:
    """As a recipe would give them."""
    few = {"share": 0.5, "calibration": 6, "scored": 4, "finalists": 2, "axes": {"layers": [9, 8]}}
    return config.parse(CompressSettings, ROWS | few | {"train": LOOP} | changes)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer, shards whose documents count, and a hybrid-tiny that has read them a little."""
    folder = tmp_path_factory.mktemp("life")
    draw = np.random.default_rng(0)
    texts = [" ".join(str(n + step) for n in range(40)) for step in draw.integers(0, 500, 120).tolist()]
    tokenizer = Tokenizer.train(texts, 64 + 256)
    tokenizer.save(folder / "tokenizer")
    documents = [shards.Tokens([*ids, tokenizer.eos_ids[0]], None, {}) for ids in tokenizer.encode_batch(texts)]
    for name, some in (("train", documents[:100]), ("heldout", documents[100:])):
        shards.write(folder / "tokens" / name, some, tokenizer.vocab_size)
    inputs = {"tokens": folder / "tokens", "tokenizer": folder / "tokenizer"}
    settings = ROWS | {"model": {"preset": "hybrid-tiny"}, "train": LOOP | {"steps": 60}}
    (folder / "parent").mkdir()
    pretrain(config.parse(PretrainSettings, settings), inputs, folder / "parent", lambda event: None)
    return {"model": folder / "parent", "tokens": folder / "tokens"}


def test_a_smaller_model_comes_out(life: dict[str, Path], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    figures = run_compress(cut_settings(), life, tmp_path, events.append)
    parent, child = LanguageModel.load(life["model"]), LanguageModel.load(tmp_path / "model")
    assert count.total(child.config) == figures["parameters"] <= 0.5 * count.total(parent.config)
    assert Tokenizer.load(tmp_path / "model").vocab_size == child.config.vocab_size
    rows = json.loads((tmp_path / "candidates.json").read_text())
    assert len(rows) == figures["candidates"] > 4
    assert rows[0]["config"]["hidden_size"] == child.config.hidden_size
    assert rows[0]["trial_loss"] == min(row["trial_loss"] for row in rows if row["trial_loss"] is not None)
    assert rows[0]["trial_loss"] < rows[0]["cut_loss"] == pytest.approx(figures["cut_loss"])
    assert 0.5 * figures["parent_loss"] < rows[0]["trial_loss"]  # cross-entropy, not the KL that is learned
    assert figures["parent_loss"] < figures["cut_loss"]
    assert sum(row["trial_loss"] is not None for row in rows) == 3  # the best of two depths, then one more
    assert len((tmp_path / "candidates.txt").read_text().splitlines()) == len(rows) + 1
    assert not list((tmp_path / "trials").glob("*/checkpoints"))


def test_an_interrupted_search_ends_the_same(life: dict[str, Path], tmp_path: Path) -> None:
    run_compress(cut_settings(), life, tmp_path / "whole", lambda event: None)
    for when in ("cuts scored", "steps"):

        def stop(event: dict[str, Any], when: str = when) -> None:
            if event["event"] == "progress" and event["unit"] == when and event["done"] == 3:
                raise KeyboardInterrupt

        (tmp_path / "cut").mkdir(exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            run_compress(cut_settings(), life, tmp_path / "cut", stop)
    run_compress(cut_settings(), life, tmp_path / "cut", lambda event: None)
    for name in ("candidates.json", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_memory_is_kept(life: dict[str, Path], tmp_path: Path) -> None:
    whole = plan(LanguageModel.load(life["model"]).config, memory=1, context=512).total_bytes
    settings = cut_settings(share=None, memory=f"{round(0.8 * whole)}B", context=512, finalists=1)
    figures = run_compress(replace(settings, axes=replace(settings.axes, layers=(9,))), life, tmp_path, lambda _: None)
    child = LanguageModel.load(tmp_path / "model").config
    made = plan(child, memory=round(0.8 * whole), context=512)
    assert made.fits and made.total_bytes == figures["bytes"]
    assert not (tmp_path / "trials").exists()
    with pytest.raises(UserError, match=r"nothing fits: .* set memory to \d+MiB"):
        run_compress(replace(settings, memory="10KiB"), life, tmp_path / "none", lambda _: None)


def test_a_taught_child_and_the_control(life: dict[str, Path], tmp_path: Path) -> None:
    run_compress(cut_settings(finalists=1, axes={"layers": [9]}), life, tmp_path / "cut", lambda _: None)
    inputs = {"teacher": life["model"], "student": tmp_path / "cut", "tokens": life["tokens"]}
    for labels in (0.0, 1.0):
        settings = config.parse(DistillSettings, ROWS | {"labels": labels, "train": LOOP | {"steps": 12}})
        out = tmp_path / str(labels)
        out.mkdir()
        figures = run_distill(settings, inputs, out, lambda _: None)
        looks = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        first = next(line["validation_loss"] for line in looks if "validation_loss" in line)
        assert figures["validation_loss"] < first
        assert ("kl" in figures) == (labels == 0)
        assert figures["teacher_loss"] < first
        assert torch.isfinite(LanguageModel.load(out / "model")(torch.zeros(1, 4, dtype=torch.int64))).all()


def test_conversations_stay_whole_and_unmasked_places_teach_nothing(life: dict[str, Path], tmp_path: Path) -> None:
    """The rows of another stage: documents that must not be cut, in a folder of their own, with a mask."""
    tokens = shards.TokenShards(life["tokens"] / "train")
    some = [shards.Tokens(tokens.document(i).tolist(), [i % 2] * len(tokens.document(i)), {}) for i in range(20)]
    shards.write(tmp_path / "sft" / "tokens" / "train", some, 320)
    inputs = {"teacher": life["model"], "student": life["model"], "tokens": tmp_path / "sft"}
    changes = {"whole": True, "length": 256, "batch_rows": 1, "blend": {"sources": {"sft": "tokens/train"}}}
    settings = config.parse(DistillSettings, ROWS | changes | {"train": LOOP | {"steps": 2}})
    figures = run_distill(settings, inputs, tmp_path / "out", lambda _: None)
    assert figures["kl"] == pytest.approx(0, abs=1e-6)  # the student is the teacher
    assert "validation_loss" not in figures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": None, "axes": {}}, "memory and share are null"),
        ({"share": 1.2}, r"share is 1\.2; set share above 0"),
        ({"memory": "22 cows"}, "set memory to a size such as 22GiB"),
        ({"depth_score": "kl"}, "depth_score is 'kl'"),
        ({"finalists": 0}, "finalists is 0"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
        ({"axes": {"layrs": [3]}}, "did you mean axes.layers"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_settings(**changes)
    with pytest.raises(UserError, match=r"labels is -1.* set it from 0 .* to 1"):
        config.parse(DistillSettings, ROWS | {"labels": -1})


def test_the_command_of_the_design(life: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """MODEL and two options are an input and two settings; without MODEL the words are settings."""
    words = ["compress", str(life["model"]), "--memory", "22GiB", "--context", "4096", "finalists=2", "--show"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "memory: 22GiB\ncontext: 4096\n" in shown and "finalists: 2" in shown
    assert cli.main(["compress", "share=0.4", "--show"]) == 0
    assert "share: 0.4" in capsys.readouterr().out
    assert cli.main(["compress", str(life["model"]), "--memory", "22GiB"]) == 2
    assert "compress needs tokens; add --input tokens=PATH" in capsys.readouterr().err
    assert cli.main(["compress", "nowhere", "--memory", "22GiB"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_distilling_a_cut_hybrid_lowers_its_loss(life: dict[str, Path], tmp_path: Path) -> None:
    """A model of the first flight's shape, trained on counting, cut to 60 % and taught: most of the harm is undone."""
    shape = {"preset": "hybrid-1m", "pattern": "M-M-M*-M-", "ssm_state_size": 32}
    tokenizer = {"tokens": life["tokens"], "tokenizer": life["model"] / "model"}
    rows = {"length": 256, "batch_rows": 2, "device": "cpu"}
    loop = LOOP | {"steps": 150, "optimizer": {"learning_rate": 3e-3}, "checkpoint_every": 1000}
    (tmp_path / "parent").mkdir()
    pretrain(
        config.parse(PretrainSettings, rows | {"model": shape, "train": loop}),
        tokenizer,
        tmp_path / "parent",
        lambda _: None,
    )
    inputs = {"model": tmp_path / "parent", "tokens": life["tokens"]}
    cut = config.parse(CompressSettings, rows | {"share": 0.6, "finalists": 1, "axes": {"layers": [9]}, "train": loop})
    made = run_compress(cut, inputs, tmp_path / "cut", lambda _: None)
    assert made["parameters"] <= 0.6 * made["parent_parameters"]
    inputs = {"teacher": tmp_path / "parent", "student": tmp_path / "cut", "tokens": life["tokens"]}
    learn = config.parse(DistillSettings, rows | {"train": loop | {"steps": 100}})
    figures = run_distill(learn, inputs, tmp_path / "taught", lambda _: None)
    harm, left = made["cut_loss"] - made["parent_loss"], figures["validation_loss"] - made["parent_loss"]
    print(made, figures)
    assert harm > 0.05
    assert left < 0.5 * harm


def test_presets_of_every_letter_have_grids() -> None:
    from whimbrel.compress.search import Axes

    for name in ("smollm2-135m", "nemotron-4-15b", "qwen3-8b", "nemotron-nano-12b-v2"):
        values = Axes().values(preset(name))
        assert all(values.values()) and len(values["hidden_size"]) == 9
