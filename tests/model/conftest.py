"""A tiny llama in GGUF, written with the `gguf` package as llama.cpp's converter lays it out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from whimbrel.model import LanguageModel, ModelConfig

gguf = pytest.importorskip("gguf")

LLAMA = ModelConfig(
    pattern="*-*-",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    mlp="swiglu",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=5e4,
    norm_eps=1e-5,
    max_position_embeddings=256,
    rescale_prenorm_residual=False,
    bos_token_id=1,
    eos_token_id=2,
    family="llama",
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"


def random_llama(config: ModelConfig = LLAMA, seed: int = 0) -> LanguageModel:
    """Every parameter spread."""
    torch.manual_seed(seed)
    model = LanguageModel(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The converter's order of q and k: the two channels that turn together side by side."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def on_disk(name: str) -> str:
    """A parameter's name in GGUF, spelled out here once more so that the reader's map is checked against another."""
    _, _, rest = name.partition("layers.")
    if not rest:
        return {"embeddings": "token_embd", "norm_f": "output_norm", "head": "output"}[name.split(".")[0]] + ".weight"
    layer, _, leaf = rest.partition(".")
    part = leaf.rpartition(".")[2]
    mixers = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    mixers |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    norm = "attn_norm" if int(layer) % 2 == 0 else "ffn_norm"
    return f"blk.{int(layer) // 2}.{mixers.get(leaf.split('.')[-2], norm)}.{part}"


def small_vocabulary() -> tuple[list[str], list[str]]:
    """320 tokens and their merges, learned from a sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    text = "The whimbrel crosses an ocean without landing; in 2026 one flew 11680 km in 8 days, didn't it?\n\n"
    tokenizer.train_from_iterator([text * 3, "123 12 2345 34567 8 don't won't there where here 1 2 3"] * 4, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [" ".join(pair) for pair in __import__("json").loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(vocabulary, key=vocabulary.__getitem__), merges


@pytest.fixture(scope="session")
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges."""
    return small_vocabulary()


@pytest.fixture
def write_gguf(vocabulary: tuple[list[str], list[str]]) -> Callable[..., Path]:
    """Write a model as GGUF: `write_gguf(path, model, kind="F32", pre="gpt-2", fields={}, tensors={})`."""

    def write(path, model, kind="F32", pre="gpt-2", fields=None, tensors=None):
        config = model.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config.layers // 2)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        words, merges = vocabulary
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types([3 if word in SPECIAL[:3] else 4 if word == SPECIAL[3] else 1 for word in words])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        for name, (add, value) in (fields or {}).items():
            getattr(writer, f"add_{add}")(name, value)
        quantised = gguf.GGMLQuantizationType[kind]
        for ours, tensor in model.state_dict().items():
            if "q_proj" in ours or "k_proj" in ours:
                heads = config.num_attention_heads if "q_proj" in ours else config.num_key_value_heads
                tensor = neighbours(tensor, heads)
            matrix = tensor.dim() == 2 and kind != "F32"
            values = gguf.quantize(tensor.numpy(), quantised) if matrix else tensor.numpy()
            writer.add_tensor(on_disk(ours), values, raw_dtype=quantised if matrix else None)
        for name, tensor in (tensors or {}).items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def llama() -> Callable[..., LanguageModel]:
    """`llama()` or `llama(config)`: a tiny random model."""
    return random_llama
