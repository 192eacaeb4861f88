"""GGUF out: what is written comes back, is laid out as llama.cpp reads it, and gives its logits; refusals by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch import nn

from whimbrel import cli
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig, RopeScaling, checkpoint
from whimbrel.model.fetch import fetched
from whimbrel.model.gguf import GGUF
from whimbrel.model.gguf_tokenizer import CUTS, write_tokenizer
from whimbrel.model.gguf_write import write
from whimbrel.text import Tokenizer

gguf = pytest.importorskip("gguf")

HYBRID = ModelConfig(  # nothing is a power of two, and M, * and - come in every order
    pattern="M-MM*--M*-",
    vocab_size=331,
    hidden_size=72,
    intermediate_size=88,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    mamba_num_heads=6,
    mamba_head_dim=12,
    ssm_state_size=10,
    n_groups=3,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EVEN = replace(  # rows of whole blocks, so that every matrix is quantised
    HYBRID, pattern="*-M-*M", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32,
    mamba_num_heads=8, mamba_head_dim=16, n_groups=2, conv_kernel=3,
)  # fmt: skip
LLAMA = ModelConfig(
    pattern="*-*-", vocab_size=331, hidden_size=60, intermediate_size=88, mlp="swiglu", num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, rope_theta=5e4, max_position_embeddings=256, rescale_prenorm_residual=False,
    bos_token_id=1, eos_token_id=2, family="llama",
)  # fmt: skip
STRETCHED = replace(
    LLAMA, attention_bias=True, mlp_bias=True, tie_embeddings=True, head_dim=64,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)  # fmt: skip
QWEN = replace(LLAMA, qk_norm=True, hidden_size=64, intermediate_size=96, head_dim=32, family="qwen3")
SHAPES = {
    "hybrid": HYBRID,
    "hybrid, tied": replace(HYBRID, tie_embeddings=True, conv_bias=False, mlp_bias=True),
    "hybrid, even": EVEN,
    "llama": LLAMA,
    "llama, stretched": STRETCHED,
    "qwen3": QWEN,
}


def folder(place: Path, config: ModelConfig) -> Path:
    """A model in which no parameter is trivial."""
    torch.manual_seed(0)
    model = LanguageModel(config).initialise(0).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "A_log" not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif parameter.dim() > 1:
            parameter.mul_(3)
    model.save(place)
    return place


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_comes_back(tmp_path: Path, shape: str) -> None:
    before = checkpoint.load(folder(tmp_path / "m", SHAPES[shape]))
    after = checkpoint.load(write(tmp_path / "m", tmp_path / "m.gguf", "f32"))
    assert after.config == replace(before.config, conv_bias=True)  # llama.cpp adds one always, so zeros are written
    theirs = after.state_dict()
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(theirs.pop(name), tensor, rtol=1e-6 if "A_log" in name else 0, atol=0)
    assert not any(tensor.any() for tensor in theirs.values())


@pytest.mark.parametrize(("kind", "step"), [("f16", 1e-3), ("q8_0", 0.01), ("q4_0", 0.2)])
def test_fewer_bits_are_where_they_should_be(tmp_path: Path, kind: str, step: float) -> None:
    before = checkpoint.load(folder(tmp_path / "m", EVEN)).state_dict()
    file = GGUF(write(tmp_path / "m", tmp_path / "m.gguf", kind))
    types = {name: tensor.tensor_type.name for name, tensor in file._tensors.items()}
    matrices = {name for name, shape in file.shapes.items() if len(shape) == 2}
    assert {types[name] for name in set(types) - matrices} == {"F32"}
    assert {types[name] for name in matrices - {"output.weight"}} == {kind.upper()}
    assert types["output.weight"] == {"f16": "F16"}.get(kind, "Q8_0")
    for name, tensor in checkpoint.load(file.path).state_dict().items():
        assert (tensor - before[name]).abs().max() <= step * before[name].abs().max(), name
    odd = GGUF(write(folder(tmp_path / "o", HYBRID), tmp_path / "o.gguf", kind))
    assert odd._tensors["blk.1.ffn_up.weight"].tensor_type.name == "F16"  # rows of 72


def test_a_hybrid_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """The names, shapes and values that its loader asks for, spelled out."""
    config = replace(HYBRID, pattern="M-*")
    reader = gguf.GGUFReader(write(folder(tmp_path / "m", config), tmp_path / "m.gguf", "f32"))
    shapes = {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors}  # fastest axis first
    assert shapes == {
        "token_embd.weight": [72, 331], "output_norm.weight": [72], "output.weight": [72, 331],
        **{f"blk.{i}.attn_norm.weight": [72] for i in range(3)},
        "blk.0.ssm_in.weight": [72, 2 * 72 + 2 * 30 + 6], "blk.0.ssm_conv1d.weight": [4, 132],
        "blk.0.ssm_conv1d.bias": [132], "blk.0.ssm_dt.bias": [6], "blk.0.ssm_a": [1, 6], "blk.0.ssm_d": [1, 6],
        "blk.0.ssm_norm.weight": [24, 3], "blk.0.ssm_out.weight": [72, 72],
        "blk.1.ffn_up.weight": [72, 88], "blk.1.ffn_down.weight": [88, 72],
        "blk.2.attn_q.weight": [72, 120], "blk.2.attn_k.weight": [72, 40], "blk.2.attn_v.weight": [72, 40],
        "blk.2.attn_output.weight": [120, 72],
    }  # fmt: skip
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "block_count": 3, "context_length": 256, "embedding_length": 72, "vocab_size": 331, "attention.head_count": 6,
        "attention.head_count_kv": [0, 0, 2], "feed_forward_length": [0, 88, 0], "attention.key_length": 20,
        "attention.value_length": 20, "ssm.conv_kernel": 4, "ssm.inner_size": 72, "ssm.state_size": 10,
        "ssm.time_step_rank": 6, "ssm.group_count": 3,
    }  # fmt: skip
    assert {key: said[f"nemotron_h.{key}"] for key in expected} == expected
    assert said["nemotron_h.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert said["general.architecture"] == "nemotron_h"
    assert not any("expert" in key for key in said)
    a = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ssm_a")
    log = checkpoint.load(tmp_path / "m").layers[0].mixer.A_log.detach().numpy()
    assert np.allclose(a[:, 0], -np.exp(log))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_transformers_reads_the_same_model(tmp_path: Path, config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = write(folder(tmp_path / "m", config), tmp_path / "m.gguf", "f32")
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[config.family]
    said = load_gguf_checkpoint(file)["config"] | {"head_dim": config.head_dim}  # which it forgets to read
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**said)).eval()
    theirs.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"])
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        expected, ours = theirs(tokens).logits, LanguageModel.load(tmp_path / "m")(tokens)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mamba_bias": True}, "mamba_bias is True"),
        ({"time_step_limit": (0.0, 0.5)}, "time_step_limit"),
        ({"pattern": "M-M-"}, "needs both"),
        ({"pattern": "*-*-"}, "needs both"),
        ({"eos_token_id": (2, 3, 4, 5)}, "room for 3"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        write(folder(tmp_path / "m", replace(HYBRID, **changes)), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_other_families_and_types_are_refused_by_name(tmp_path: Path) -> None:
    nemotron = replace(LLAMA, mlp="relu2", norm="layernorm1p", family="nemotron")
    with pytest.raises(UserError, match="'nemotron'"):
        write(folder(tmp_path / "n", nemotron), tmp_path / "m.gguf")
    with pytest.raises(UserError, match="attention_bias"):
        write(folder(tmp_path / "q", replace(QWEN, attention_bias=True)), tmp_path / "m.gguf")
    with pytest.raises(UserError, match="q4_0"):
        write(tmp_path / "q", tmp_path / "m.gguf", "q4")
    with pytest.raises(UserError, match="is a folder"):
        write(tmp_path / "q", tmp_path)


# ------------------------------------------------------------------------------------------------------ vocabularies


@pytest.mark.parametrize("cut", CUTS)
def test_a_vocabulary_comes_back(tmp_path: Path, llama, write_gguf, cut: str) -> None:
    write_tokenizer(GGUF(write_gguf(tmp_path / "in.gguf", llama(), pre=cut)), tmp_path)
    file = GGUF(write(tmp_path / "in.gguf", tmp_path / "out.gguf", "f32"))
    assert file.field("tokenizer.ggml.pre") == cut
    before = GGUF(tmp_path / "in.gguf")
    for name in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert file.field(f"tokenizer.ggml.{name}") == before.field(f"tokenizer.ggml.{name}"), name
    assert file.field("tokenizer.chat_template") == before.field("tokenizer.chat_template")
    (tmp_path / "again").mkdir()
    write_tokenizer(file, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


def test_our_own_vocabulary_goes_along_with_a_word_of_warning(tmp_path: Path) -> None:
    Tokenizer.train(["the whimbrel crosses an ocean"], 321).save(folder(tmp_path / "m", HYBRID))
    events: list[dict[str, str]] = []
    file = GGUF(write(tmp_path / "m", tmp_path / "m.gguf", report=events.append))
    assert "tekken" in next(event["text"] for event in events if event["event"] == "warning")
    assert (file.field("tokenizer.ggml.pre"), file.field("tokenizer.ggml.tokens")[330]) == ("tekken", "[PAD330]")
    types = file.field("tokenizer.ggml.token_type")
    assert (types[0], types[320], types[321]) == (3, 1, 5)
    assert (file.field("tokenizer.ggml.eos_token_id"), file.field("tokenizer.ggml.eot_token_id")) == (2, 12)
    assert "<SPECIAL_11>" in file.field("tokenizer.chat_template")
    assert file.config.eos_token_ids == (2, 12)


def test_without_a_vocabulary_the_file_says_so(tmp_path: Path) -> None:
    events: list[dict[str, str]] = []
    file = GGUF(write(folder(tmp_path / "m", HYBRID), tmp_path / "m.gguf", report=events.append))
    assert file.field("tokenizer.ggml.model") == "none"
    assert "no tokenizer.json" in events[0]["text"]


def test_a_vocabulary_without_a_name_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    Tokenizer.train(["the whimbrel"], 320).save(folder(tmp_path / "m", HYBRID))
    backend = Backend(models.BPE(Backend.from_file(str(tmp_path / "m" / "tokenizer.json")).get_vocab(), []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
    with pytest.raises(UserError, match="no name"):
        write(tmp_path / "m", tmp_path / "m.gguf")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "m.gguf"
    words = ["convert", str(folder(tmp_path / "m", EVEN)), "--to", "gguf", "--type", "q8_0", "-o", str(file)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert GGUF(file)._tensors["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert cli.main([*words, "--to", "onnx"]) == 2
    assert "onnx" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- llama.cpp


def llama_cpp(file: Path, **options):
    """llama.cpp on one thread, with float32 keys and values, as exact as it gets."""
    library = pytest.importorskip("llama_cpp")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False, "logits_all": True, "verbose": False}
    return library.Llama(str(file), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, **exact, **options)


def rounded(model: LanguageModel, kind: str) -> LanguageModel:
    """The model with the inputs of its matrices rounded as llama.cpp rounds them: to q8_0 where they meet few bits in
    whole blocks, else to float16.
    """

    def to_eight_bits(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        if x.shape[-1] % 32 or kind == "f16":
            return (x.half().float(), *inputs[1:])
        block = gguf.GGMLQuantizationType.Q8_0
        return (torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), block), block)).view_as(x), *inputs[1:])

    for module in model.modules():
        if isinstance(module, nn.Linear) or module is model.head:
            module.register_forward_pre_hook(to_eight_bits)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-4), ("f16", 3e-3), ("q8_0", 0.03), ("q4_0", 0.03)])
def test_llama_cpp_gives_the_same_logits(tmp_path: Path, shape: str, kind: str, tolerance: float) -> None:
    """float32: rounding alone. Few bits: llama.cpp rounds activations too, and a tie it breaks otherwise is a step."""
    pytest.importorskip("llama_cpp")
    tokens = torch.randint(0, 331, (60,), generator=torch.Generator().manual_seed(1))
    file = write(folder(tmp_path / "m", SHAPES[shape]), tmp_path / "m.gguf", kind)
    peer = llama_cpp(file)
    peer.eval(tokens[:50].tolist())  # a prompt, then token by token
    for token in tokens[50:].tolist():
        peer.eval([token])
    theirs = torch.from_numpy(np.array(peer.scores[:60]))
    model = LanguageModel.load(tmp_path / "m") if kind == "f32" else rounded(LanguageModel.load(file), kind)
    with torch.no_grad():
        ours = model(tokens[None])[0]
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    print(f"{shape} {kind}: {difference:.1e} of the largest logit")
    assert difference <= tolerance
    if kind == "f32":
        assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.slow
def test_llama_cpp_reads_smollm2_as_we_do(tmp_path: Path) -> None:
    """Tokens of prose, code and odd signs; logits and the most likely token after each."""
    pytest.importorskip("llama_cpp")
    try:
        place = fetched("smollm2")
    except UserError as error:
        pytest.skip(str(error))
    tokenizer, root = Tokenizer.load(place), Path(__file__).parents[2]
    prose, code = ((root / name).read_text()[:3000] for name in ("tests/data/corcovado.txt", "src/whimbrel/cli.py"))
    peer = llama_cpp(write(place, tmp_path / "m.gguf", "f32"))
    for text in (prose, code, "naïve ÉCOLE 東京 x² हिन्दी 123 4567 don't\n\n//a\t <|im_start|>user\n"):
        assert peer.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)
    ids = tokenizer.encode(prose)[:200]
    peer.eval(ids)
    theirs = torch.from_numpy(np.array(peer.scores[:200]))
    with torch.no_grad():
        ours = LanguageModel.load(place)(torch.tensor([ids]))[0]
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


def test_llama_cpp_cuts_plain_prose_as_our_vocabularies_do(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    page = json.dumps((Path(__file__).parents[2] / "tests/data/corcovado.txt").read_text(), ensure_ascii=True)
    tokenizer = Tokenizer.train([page], 400)
    tokenizer.save(folder(tmp_path / "m", replace(HYBRID, vocab_size=400)))
    peer = llama_cpp(write(tmp_path / "m", tmp_path / "m.gguf"), vocab_only=True)
    text = f"{page} camelCase HTMLParser 3.14 don't (x/y) [z]\n\n  four <SPECIAL_11>User\n"
    assert peer.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)
