"""GGUF of the llama architecture: weights in the right order, config and tokenizer from metadata, refusals by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, RopeScaling, checkpoint
from whimbrel.model.gguf import GGUF
from whimbrel.model.gguf_tokenizer import write_tokenizer
from whimbrel.model.positions import frequencies
from whimbrel.text import Tokenizer

TEXT = "The whimbrel didn't land: 11680 km, 8 days\n\n  (2026) — naïve 東京 x²"


def assert_same(one, other, tolerance=0.0):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_come_back_exactly(tmp_path, llama, write_gguf, tied, bias):
    model = llama()
    config = replace(model.config, tie_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = llama(config)
    loaded = LanguageModel.load(write_gguf(tmp_path / "model.gguf", model))
    assert loaded.config == config
    assert_same(loaded, model)


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_1", 0.15), ("Q4_0", 0.2)])
def test_quantised_weights_come_back_within_their_step(tmp_path, llama, write_gguf, kind, tolerance):
    model = llama()
    assert_same(model, LanguageModel.load(write_gguf(tmp_path / "model.gguf", model, kind)), tolerance)


def test_a_k_quant_is_decoded_as_its_layout_says(tmp_path, llama):
    """Q6_K, from random bytes: 256 numbers of six bits, 16 scales of eight, one factor."""
    gguf = pytest.importorskip("gguf")
    raw = np.random.default_rng(0).integers(0, 256, (320, 210), dtype=np.uint8)
    raw[:, 208:] = np.array([0.01], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name, value in (("block_count", 1), ("embedding_length", 256), ("feed_forward_length", 8), ("head_count", 4)):
        getattr(writer, f"add_{name}")(value)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    low, high, scales = (
        raw[:, :128].reshape(-1, 2, 64),
        raw[:, 128:192].reshape(-1, 2, 32),
        raw[:, 192:208].view(np.int8),
    )
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    twos = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    numbers = (nibbles | (twos << 4)).reshape(320, 256).astype(np.float32) - 32
    expected = np.float32(np.float16(0.01)) * np.repeat(scales, 16, axis=1).astype(np.float32) * numbers
    assert np.allclose(GGUF(tmp_path / "a.gguf").read("token_embd.weight").numpy(), expected, rtol=1e-6)


def test_a_folder_with_one_gguf_is_a_model_and_saves_as_a_hugging_face_folder(tmp_path, llama, write_gguf):
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in" / "model.gguf", llama())
    model = checkpoint.load(tmp_path / "in", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    model.save(tmp_path / "out")
    assert_same(checkpoint.load(tmp_path / "out", dtype="bfloat16"), model)
    write_gguf(tmp_path / "in" / "other.gguf", llama())
    with pytest.raises(UserError, match=r"several \.gguf files"):
        checkpoint.load(tmp_path / "in")


def test_rotary_divisors_become_llama_3_scaling(tmp_path, llama, write_gguf):
    plain = replace(llama().config, head_dim=64)
    scaled = replace(plain, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    cpu = torch.device("cpu")
    divisors = (frequencies(plain, cpu) / frequencies(scaled, cpu)).float()
    key = {"llama.attention.key_length": ("uint32", 64), "llama.rope.dimension_count": ("uint32", 64)}
    file = write_gguf(tmp_path / "a.gguf", llama(plain), fields=key, tensors={"rope_freqs.weight": divisors})
    assert LanguageModel.load(file).config == scaled
    file = write_gguf(tmp_path / "b.gguf", llama(plain), fields=key, tensors={"rope_freqs.weight": divisors.sqrt()})
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        LanguageModel.load(file)


def test_every_end_of_turn_ends_a_text(tmp_path, llama, write_gguf):
    file = write_gguf(tmp_path / "a.gguf", llama(), fields={"tokenizer.ggml.eot_token_id": ("uint32", 3)})
    assert checkpoint.load_config(file).eos_token_ids == (2, 3)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"llama.expert_count": ("uint32", 8)}, "llama.expert_count 8"),
        ({"llama.attention.sliding_window": ("uint32", 64)}, "sliding_window"),
        ({"llama.rope.scaling.type": ("string", "yarn")}, "yarn"),
        ({"llama.rope.dimension_count": ("uint32", 8)}, "rotates 8 of 16"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(tmp_path, llama, write_gguf, fields, word):
    with pytest.raises(UserError) as error:
        GGUF(write_gguf(tmp_path / "a.gguf", llama(), fields=fields))
    assert word in str(error.value)


def test_a_missing_tensor_a_cut_file_and_another_file_are_named(tmp_path, llama, write_gguf):
    one = llama(replace(llama().config, attention_bias=True))
    del one.layers[2].mixer.v_proj.bias
    file = write_gguf(tmp_path / "a.gguf", one)
    with pytest.raises(UserError, match=r"lacks tensor blk\.1\.attn_v\.bias"):
        checkpoint.load(file)
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:100], b"no such thing"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.gguf is cut off or is no GGUF file"):
            checkpoint.load(file)


DIGITS = {"gpt-2": ["11680"], "smollm": ["1", "1", "6", "8", "0"], "llama-bpe": ["116", "80"], "qwen2": [*"11680"]}


@pytest.mark.parametrize("cut", sorted(DIGITS))
def test_the_tokenizer_cuts_text_as_its_kind_does(tmp_path, llama, write_gguf, vocabulary, cut):
    write_tokenizer(GGUF(write_gguf(tmp_path / "a.gguf", llama(), pre=cut)), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    words = vocabulary[0]
    assert all(words[i] == tokenizer.decode([i], skip_special=False) for i in tokenizer.encode("land") if i > 300)
    from tokenizers import Tokenizer as Backend

    pieces = Backend.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("km 11680")
    digits = [piece.lstrip("Ġ") for piece, _ in pieces if any(c.isdigit() for c in piece)]
    assert digits == DIGITS[cut]


def test_special_tokens_template_and_ids_go_along(tmp_path, llama, write_gguf):
    write_tokenizer(GGUF(write_gguf(tmp_path / "a.gguf", llama())), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("<|user|></s>") == [3, 2]
    assert tokenizer.encode("</s>", special=False) != [2]
    assert tokenizer.render([{"role": "user", "content": "hi"}], generation=False) == "<|user|>hi</s>"
    assert tokenizer.encode("hi") == tokenizer.encode("hi", special=False)  # no bos unless the file says so


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path, llama, write_gguf):
    file = GGUF(write_gguf(tmp_path / "a.gguf", llama(), pre="tekken"))
    with pytest.raises(UserError, match="tekken"):
        write_tokenizer(file, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_transformers_reads_the_same_model_from_the_file(tmp_path, llama, write_gguf, kind):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = write_gguf(tmp_path / "model.gguf", llama(), kind)
    config = transformers.LlamaConfig(**load_gguf_checkpoint(file)["config"])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"])
    tokens = torch.randint(0, 320, (2, 33))
    with torch.no_grad():
        expected, ours = theirs(tokens).logits, LanguageModel.load(file)(tokens)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
