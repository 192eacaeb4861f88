"""The tokenizer inside a GGUF file, written as the `tokenizer.json` and `tokenizer_config.json` of a folder, and back.

Both ways: byte-level BPE (`tokenizer.ggml.model` gpt2) with the four ways to cut text below. Written besides, as
llama.cpp's nearest (`tekken`): vocabularies that cut as Nemotron's and ours do. Not known: SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model.config import ModelConfig
from whimbrel.model.gguf import GGUF
from whimbrel.text import Tokenizer
from whimbrel.text import folder as folders
from whimbrel.text.tokenizer import WORDS as OURS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token in `tokenizer.ggml.token_type`
ENDS = ("eos", "eot", "eom")
"""Ids that end a text or a turn, as GGUF calls them."""
WORDS = (  # how Llama 3 and Qwen 2 cut text; they differ in how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
TEKKEN = (  # the cut of Mistral's Tekken and of the Nemotron vocabularies made from it
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(file: GGUF, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) of a GGUF file into a folder."""
    folder = Path(folder)
    kind, cut = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(
            f"{file.path} has a {kind!r} tokenizer cut as {cut!r}; read are byte-level BPE cut as {', '.join(CUTS)}"
        )
    words: list[str] = file.field("tokenizer.ggml.tokens")
    tokenizer = Backend(_bpe(file, words, cut))
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


def tokenizer_fields(path: Path, config: ModelConfig, report: Report) -> dict[str, Any]:
    """The metadata of a GGUF file that hold the tokenizer beside a model; a file without one where there is none.

    `UserError` for a vocabulary that is not byte-level BPE, or is cut in a way that llama.cpp does not know.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "tokenizer.json").exists():
        text = f"{folder} has no tokenizer.json, so the file takes and gives ids alone"
        report({"event": "warning", "text": text})
        ids = _ids(config.bos_token_id, config.pad_token_id, config.eos_token_ids)
        return {"tokenizer.ggml.model": "none"} | ids
    tokenizer, backend = Tokenizer.load(folder), json.loads(folders.read_backend(folder).to_str())
    cut = _cut_of(backend, folder)
    if cut == "tekken":
        text = (
            "llama.cpp cuts this vocabulary's text as its nearest, 'tekken': words with accented capitals or combining "
            "marks and a / after a line end may become other tokens there"
        )
        report({"event": "warning", "text": text})
    words = {index: word for word, index in backend["model"]["vocab"].items()}
    added = {token["id"]: token for token in backend["added_tokens"]}
    words |= {index: token["content"] for index, token in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    said: dict[str, Any] = {
        "model": "gpt2",
        "pre": cut,
        "tokens": [words.get(index, f"[PAD{index}]") for index in range(config.vocab_size)],
        "token_type": [_token_type(index, words, added) for index in range(config.vocab_size)],
        "merges": merges,
        "add_bos_token": tokenizer.adds_bos,
        "add_space_prefix": False,
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    fields |= _ids(tokenizer.bos_id, tokenizer.pad_id, (*config.eos_token_ids, *tokenizer.eos_ids))
    return fields | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _ids(bos: int | None, pad: int | None, ends: Sequence[int]) -> dict[str, int]:
    """The special ids; `UserError` where there are more ends than places for them."""
    ends = tuple(dict.fromkeys(ends))
    if len(ends) > len(ENDS):
        raise UserError(f"eos_token_id is {list(ends)}; GGUF has room for {len(ENDS)} ids that end a text; drop some")
    named = {"bos": bos, "padding": pad} | dict(zip(ENDS, ends, strict=False))
    return {f"tokenizer.ggml.{name}_token_id": index for name, index in named.items() if index is not None}


def _token_type(index: int, words: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if index not in words:
        return UNUSED
    return NORMAL if index not in added else CONTROL if added[index]["special"] else USER_DEFINED


def _cut_of(backend: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text."""
    found = list(_steps(backend["pre_tokenizer"] or {}))
    known = {cut: list(_steps(json.loads(_state(_cut(cut))))) for cut in CUTS}
    known |= {"tekken": [("split", TEKKEN), ("bytes", False)], "ours": [("split", OURS), ("bytes", False)]}
    for cut, steps in known.items():
        if steps == found and backend["model"]["type"] == "BPE":
            return "tekken" if cut == "ours" else cut
    raise UserError(
        f"{folder / 'tokenizer.json'} cuts text in a way that llama.cpp has no name for; written are byte-level BPE "
        f"vocabularies cut as {', '.join(CUTS)}, Nemotron's or ours"
    )


def _steps(pre_tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a pre-tokenizer does, without what does not matter here."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        for inner in pre_tokenizer["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        yield "bytes", pre_tokenizer["use_regex"]
    elif kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        yield "split", next(iter(pre_tokenizer["pattern"].values()))
    else:
        yield "other", pre_tokenizer if kind != "Digits" else pre_tokenizer["individual_digits"]


def _state(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """A pre-tokenizer as JSON."""
    state: bytes = pre_tokenizer.__getstate__()
    return state.decode()
