"""The tokenizer inside a GGUF file, written as the `tokenizer.json` and `tokenizer_config.json` of a folder.

Read: byte-level BPE (`tokenizer.ggml.model` gpt2) with the four ways to cut text below. Not read: SentencePiece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from whimbrel.errors import UserError
from whimbrel.model.gguf import GGUF

CONTROL, USER_DEFINED = 3, 4  # kinds of token in `tokenizer.ggml.token_type`
WORDS = (  # how Llama 3 and Qwen 2 cut text; they differ in how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def write_tokenizer(file: GGUF, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) of a GGUF file into a folder."""
    folder = Path(folder)
    kind, cut = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(
            f"{file.path} has a {kind!r} tokenizer cut as {cut!r}; read are byte-level BPE cut as {', '.join(CUTS)}"
        )
    words: list[str] = file.field("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(_bpe(file, words, cut))
    tokenizer.pre_tokenizer = _cut(cut)
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type", [])
    marked = [(word, type_) for word, type_ in zip(words, types, strict=False) if type_ in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word, type_ in marked if type_ == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word, type_ in marked if type_ == USER_DEFINED])
    special = _special(file, words)
    adds_bos = file.field("tokenizer.ggml.add_bos_token", cut == "llama-bpe") and "bos_token" in special
    if adds_bos:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, words.index(bos))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(adds_bos),
        **special,
    }
    if template := file.field("tokenizer.chat_template"):
        said["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(
        json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _bpe(file: GGUF, words: list[str], cut: str) -> models.BPE:
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges", [])]
    if len(vocabulary) != len(words) or any(len(pair) != 2 for pair in merges):
        raise UserError(f"{file.path}: tokenizer.ggml.tokens or tokenizer.ggml.merges is damaged; copy the file again")
    return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")


def _cut(cut: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before merging."""
    if cut == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "smollm":  # as gpt-2, after cutting numbers into digits
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    words = Regex(WORDS.format(digits="{1,3}" if cut == "llama-bpe" else ""))
    split = pre_tokenizers.Split(words, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _special(file: GGUF, words: list[str]) -> dict[str, str]:
    """The named special tokens that the file has."""
    spellings = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.field(f"tokenizer.ggml.{their}_token_id") for name, their in spellings.items()}
    return {name: words[index] for name, index in ids.items() if index is not None and index < len(words)}
