"""Folders: bit-equal round trips, everything checked, nothing re-initialised, memory for the model and one tensor."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, checkpoint, families
from whimbrel.model.presets import preset

ROOT = Path(__file__).parents[2]
HYBRID = families.config_from_hf(
    {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M*-",
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 28,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "mamba_num_heads": 24,
        "mamba_head_dim": 6,
        "ssm_state_size": 12,
        "n_groups": 8,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 512,
    }
)


def random_model(config=HYBRID, dtype=torch.float32, seed=0):
    """Every parameter spread, so that one that was reset, swapped or rounded is seen."""
    torch.manual_seed(seed)
    model = LanguageModel(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.7)
    return model


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def saved(tmp_path):
    """A model, and its folder in several shards."""
    model = random_model()
    checkpoint.save(model, tmp_path / "model", shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return model, tmp_path / "model"


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        checkpoint.load(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
def test_a_round_trip_is_bit_equal_whatever_the_shards(tmp_path, dtype, tied, shard_bytes):
    model = random_model(replace(HYBRID, tie_embeddings=tied), dtype)
    checkpoint.save(model, tmp_path / "a", shard_bytes=shard_bytes)
    loaded = checkpoint.load(tmp_path / "a", dtype=dtype)
    assert loaded.config == model.config
    assert_same(loaded, model)
    assert ("head.weight" in loaded.state_dict()) is not tied
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "nemotron"])
def test_a_round_trip_of_classic_families(tmp_path, family):
    shape = {"llama": "smollm2-135m", "qwen3": "qwen3-8b", "nemotron": "nemotron-4-15b"}[family]
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    model = random_model(replace(preset(shape), pattern="*-*-", vocab_size=50, **sizes, attention_bias=True))
    model.save(tmp_path / "a")
    assert_same(LanguageModel.load(tmp_path / "a"), model)


def test_shards_hold_no_more_than_asked_and_the_index_is_right(saved):
    _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        sizes += size
    assert index["metadata"]["total_size"] == sizes


def test_a_half_precision_load_keeps_the_recurrence_in_float32(saved):
    model, folder = saved
    loaded = checkpoint.load(folder, dtype="bfloat16")
    for name, tensor in loaded.state_dict().items():
        kept = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name


def test_other_prefixes_and_spellings_on_disk_load_the_same(saved):
    model, folder = saved
    for embedding in ("embedding", "embed_tokens", "embeddings"):
        other = folder.with_name(embedding)
        checkpoint.save(model, other)
        tensors = load_file(other / "model.safetensors")
        spelled = {n.replace("backbone.", "model.").replace("embeddings", embedding): t for n, t in tensors.items()}
        spelled["model.layers.3.mixer.rotary_emb.inv_freq"] = torch.ones(4)  # a table of old files
        save_file(spelled, other / "model.safetensors")
        assert_same(checkpoint.load(other), model)


def test_a_missing_tensor_is_named(saved):
    _, folder = saved
    edit(folder, hybrid_override_pattern="M-M*-M", num_hidden_layers=6)
    message = error(folder)
    assert "backbone.layers.5.norm.weight" in message
    assert str(folder) in message


def test_an_unknown_tensor_is_named(saved):
    _, folder = saved
    edit(folder, hybrid_override_pattern="M-M*", num_hidden_layers=4)
    assert "backbone.layers.4" in error(folder)


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    _, folder = saved
    edit(folder, intermediate_size=30)
    message = error(folder)
    assert "backbone.layers.1.mixer.up_proj.weight is [28, 40]" in message
    assert "[30, 40]" in message


def test_a_truncated_shard_names_file_and_tensor(saved):
    _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["lm_head.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    message = error(folder)
    assert str(file) in message
    assert [name for name, shard in index.items() if shard == file.name and name in message]
    file.write_bytes(whole[:20])
    assert f"{file} is cut off in its header" in error(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1")
    assert f"{file} is cut off in its header or is no safetensors file" in error(folder)
    file.unlink()
    assert f"{file} is listed in" in error(folder)


def test_an_index_that_lies_is_caught(saved):
    _, folder = saved
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    index["weight_map"] = {name: last if file == first else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    assert "promises tensor" in error(folder)
    path.write_text("{}")
    assert "not an index" in error(folder)


def test_stored_kinds_that_are_not_plain_floats_are_refused(saved):
    model, folder = saved
    checkpoint.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight is stored as F8_E4M3" in error(folder)


def test_one_tensor_under_two_names_is_refused(saved):
    model, folder = saved
    checkpoint.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm_f.weight"] = tensors["backbone.norm_f.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    message = error(folder)
    assert "backbone.norm_f.weight" in message
    assert "model.norm_f.weight" in message


def test_a_head_that_differs_from_its_tied_embedding_is_refused(saved):
    _, folder = saved
    edit(folder, tie_word_embeddings=True)
    assert "lm_head.weight differs" in error(folder)


def test_pickles_and_other_files_are_refused(tmp_path, saved):
    _, folder = saved
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "no model.safetensors" in error(folder)
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: a pickle can run code" in error(folder)
    assert "pickle" in error(folder / "pytorch_model.bin")
    assert "no model" in error(folder / "config.json")


def test_what_is_no_model_is_said(tmp_path, saved):
    _, folder = saved
    said = "there is no folder or .gguf file {}; `whimbrel fetch` brings models ({})"
    assert error("smollm") == said.format("smollm", "did you mean 'smollm2'?")
    assert error("heron") == said.format("heron", "known: smollm2")
    assert "there is no folder" in error(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json" in error(tmp_path / "empty")
    assert "bfloat16" in error(folder, dtype="bfloat61")
    edit(folder, model_type="gpt2")
    assert "nemotron_h, nemotron, qwen3, llama" in error(folder)
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in error(folder)


def test_a_hub_id_without_a_network_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = error("someone/some-model")
    assert "there is no folder someone/some-model, and the hub did not give" in message
    assert "\n" not in message


def test_saving_never_replaces_what_is_no_model(tmp_path, saved):
    model, folder = saved
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="not a model"):
        model.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"
    model.save(folder)  # a model is replaced, stale shards and all
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_save_that_fails_leaves_the_old_folder(monkeypatch, saved):
    model, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "card", full)
    with pytest.raises(OSError, match="No space"):
        model.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_card_ids_and_tokenizer_go_along(tmp_path, saved):
    model, _ = saved
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    with pytest.raises(UserError, match="tokenizer_folder"):
        model.save(tmp_path / "a", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "secrets.txt"):
        (tokenizer / name).write_text(name)
    line = "pages of the SciPy manual (BSD-3-Clause)"
    checkpoint.save(model, tmp_path / "a", tokenizer, lineage=[line], licence="apache-2.0")
    text = (tmp_path / "a" / "README.md").read_text()
    assert f"* {line}" in text
    assert "license: apache-2.0" in text
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {total:,} |" in text
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "a" / "secrets.txt").exists()
    ids = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_generation_config_decides_what_ends_a_text(saved):
    _, folder = saved
    edit(folder, "generation_config.json", eos_token_id=[2, 12])
    assert checkpoint.load(folder).config.eos_token_ids == (2, 12)


def test_a_probe_tells_weights_apart(saved):
    model, folder = saved
    assert checkpoint.probe(checkpoint.load(folder)) == checkpoint.probe(model)
    with torch.no_grad():
        model.layers[2].mixer.D += 0.01
    assert checkpoint.probe(checkpoint.load(folder)) != checkpoint.probe(model)


@pytest.mark.slow
def test_loading_a_large_folder_needs_the_model_and_one_tensor(tmp_path):
    """1.5 GB of the 9B's own layers; all of the 9B is the same program without options."""
    options = ["--layers", "4", "--vocabulary", "16384", "--folder", tmp_path / "model"]
    command = [sys.executable, ROOT / "benchmarks" / "load_9b.py", *options]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures["weights_bytes"] > 1.4e9
    assert figures["files"] > 1
    assert figures["loaded_bytes"] == figures["weights_bytes"]
    slack = 64 * 2**20  # what the allocator rounds up; the largest tensor is 203 MB
    assert figures["peak_bytes"] <= figures["weights_bytes"] + figures["largest_tensor_bytes"] + slack
