"""Text to ids and back: byte-level BPE, trained here or loaded from a Hugging Face folder of any model.

The engine underneath is the `tokenizers` library, so `tokenizer.json` gives the same ids here and in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from whimbrel.errors import UserError
from whimbrel.text import chat, folder
from whimbrel.text.stream import TextStream

if TYPE_CHECKING:
    from whimbrel.text.template import ChatTemplate

# Merges stay inside one of these, in the manner of the Nemotron tokenizer's pattern: a digit stands alone.
WORDS = "|".join(
    (
        r"\p{N}",
        # A word with at most one space or sign before it, cut where a capital follows a small letter.
        r"[^\r\n\p{L}\p{M}\p{N}]?(?:[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[\p{Lu}\p{Lt}]+)",
        # Signs, with a space before and line ends after them.
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        # White space: up to the last line end; then all but the one space that belongs to the next word.
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_BYTES = 256
_LEAST_RESERVED = 13  # up to <SPECIAL_12>, which the chat format needs


def check_size(vocab_size: int, reserved: int) -> None:
    """Raise `UserError` for a vocabulary that cannot hold its reserved slots and the 256 bytes."""
    if reserved < _LEAST_RESERVED:
        raise UserError(
            f"reserved={reserved} leaves no room for the chat tokens; set reserved to {_LEAST_RESERVED} or more"
        )
    if vocab_size < reserved + _BYTES:
        raise UserError(
            f"vocab_size={vocab_size} is too small for {reserved} reserved slots and {_BYTES} bytes; "
            f"set vocab_size to {reserved + _BYTES} or more"
        )


class Tokenizer:
    """A vocabulary, its special tokens and its chat template. Unchanging once built, so threads may share it."""

    def __init__(self, backend: Backend, config: Mapping[str, Any], eos_ids: Sequence[int] = ()) -> None:
        """For `load` and `train`. `config` is tokenizer_config.json, `eos_ids` what the model's folder adds to it."""
        self._backend = backend
        self._config = dict(config)
        self._special_tokens = folder.special_tokens(config, backend)
        self._special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.chat_template: str | None = config.get("chat_template")
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        ends = [self._id("eos_token"), *eos_ids, backend.token_to_id(chat.END) if self._native else None]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        """Ids that end a text, the tokenizer's own `eos_token` first."""
        if wrong := [i for i in self.eos_ids if i >= self.vocab_size]:
            raise UserError(
                f"eos_token_id {wrong[0]} is outside the vocabulary of {self.vocab_size}; mend it in config.json"
            )
        added = self.bos_id is not None and self._backend.encode("").ids[:1] == [self.bos_id]
        self.adds_bos = bool(config.get("add_bos_token", added)) and self.bos_id is not None
        """Whether the model expects `bos_id` before a raw text: `encode(text, bos=tokenizer.adds_bos)`."""

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Read a Hugging Face folder. UserError names the file that is missing or broken."""
        return cls(folder.read_backend(source), folder.read_config(source), folder.read_eos_ids(source))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, reserved: int = 64, min_frequency: int = 2) -> Tokenizer:
        """Learn a byte-level BPE vocabulary of exactly `vocab_size` entries: `reserved` slots, 256 bytes, merges.

        The slots are `<unk>` 0, `<s>` 1, `</s>` 2 and `<SPECIAL_i>` with id i. A pair of entries merges if it occurs
        `min_frequency` times. The same texts give the same vocabulary, whatever the number of threads.
        """
        check_size(vocab_size, reserved)
        backend = _untrained()
        names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, reserved))]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((_valid(text) for text in texts), trainer)
        learned = backend.get_vocab_size()
        if learned < vocab_size:
            raise UserError(
                f"the texts are too small for vocab_size={vocab_size}: they give {learned} entries; "
                f"set vocab_size to {learned} or less, or train on more text"
            )
        return Tokenizer(backend, folder.NANO2_CONFIG)

    def save(self, target: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer reads the same ids and chats."""
        folder.write(target, self._backend, self._config)

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """The ids of a text. Nothing is added that is not asked for.

        `special`: names of special tokens in the text become their ids; without it they are text like any other.
        `bos`: put `bos_id` first, unless the text begins with it already.
        """
        backend = self._backend if special else self._plain
        return self._begin(backend.encode(_valid(text), add_special_tokens=False).ids, bos)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True, bos: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all threads."""
        backend = self._backend if special else self._plain
        found = backend.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
        return [self._begin(encoding.ids, bos) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A detokeniser for ids that come one at a time."""

        def piece(token: int) -> str | None:
            return None if skip_special and token in self._special_ids else self._backend.id_to_token(token)

        return TextStream(lambda ids: self._short_text(tuple(ids), skip_special), piece)

    def render(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        generation: bool = True,
    ) -> str:
        """A conversation as the text the model was trained on, by default up to where its next answer starts."""
        if not self._native:
            return self._template.render(messages, tools=tools, thinking=thinking, generation=generation)
        pieces = chat.render_pieces(messages, tools=tools, thinking=thinking, generation=generation)
        return "".join(piece.text for piece in pieces)

    def encode_chat(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        generation: bool = False,
        forced_close: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each whether the model is trained to write it (see `whimbrel.text.chat`).

        A trained stretch is encoded apart from what precedes it, as it will be when the model writes it after that
        prompt: no token spans both. With `generation` nothing is trained, and the ids are those of the rendered text.
        `forced_close`: the thought is closed by the engine, so its tag is encoded apart and not trained.
        """
        renderer = chat.render_pieces if self._native else self._template.render_pieces
        pieces = renderer(messages, tools=tools, thinking=thinking, generation=generation)
        pieces = chat.force_close(pieces) if forced_close else pieces
        if self._prefixes:
            return self._encode_whole(pieces)
        ids: list[int] = []
        mask: list[bool] = []
        for trained, run in groupby(pieces, key=lambda piece: piece.trained):
            found = self.encode("".join(piece.text for piece in run))
            ids += found
            mask += [trained] * len(found)
        return ids, mask

    def _encode_whole(self, pieces: Sequence[chat.Piece]) -> tuple[list[int], list[bool]]:
        """For vocabularies that put a space before any text: encode once, take the mask from the offsets."""
        encoding = self._backend.encode(_valid("".join(piece.text for piece in pieces)), add_special_tokens=False)
        trained = [piece.trained for piece in pieces for _ in piece.text]
        mask = []
        for start, end in encoding.offsets:
            stretch = set(trained[start : max(end, start + 1)])
            if len(stretch) > 1:
                raise UserError(
                    "a token of this tokenizer spans the end of the prompt and the start of a trained turn; "
                    "train this model with a chat_template that ends its prompt in a special token or a line end"
                )
            mask.append(stretch == {True})
        return encoding.ids, mask

    def _id(self, key: str) -> int | None:
        token = self._special_tokens.get(key)
        return None if token is None else self._backend.token_to_id(token)

    def _begin(self, ids: list[int], bos: bool) -> list[int]:
        if not bos:
            return ids
        if self.bos_id is None:
            raise UserError("bos=True, but this tokenizer has no bos_token; leave bos at False")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    @property
    def _native(self) -> bool:
        return self.chat_template == chat.TEMPLATE

    @cached_property
    def _short_text(self) -> Callable[[tuple[int, ...], bool], str]:
        """`decode` of the few ids at the end of a stream: the same ones return again and again."""
        return lru_cache(2**16)(lambda ids, skip_special: self.decode(ids, skip_special=skip_special))

    @cached_property
    def _prefixes(self) -> bool:
        """Whether encoding puts a space (`▁` or `Ġ`) before a text that has none."""
        return self._backend.encode("x", add_special_tokens=False).tokens[0].startswith(("▁", "Ġ"))

    @cached_property
    def _plain(self) -> Backend:
        """The same vocabulary, blind to special tokens: this is a state of the library's object, hence a second."""
        plain = Backend.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UserError(
                "this model's folder has no chat template; generate from plain text, or use an instruct model"
            )
        ends = [token for i in self.eos_ids if (token := self._backend.id_to_token(i)) is not None]
        from whimbrel.text.template import ChatTemplate  # jinja2, which a bare GPU machine may lack

        return ChatTemplate(self.chat_template, self._special_tokens, ends)


def _untrained() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _valid(text: str) -> str:
    """The text itself, if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is half a surrogate pair, which no UTF-8 text has; "
            "mend it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from error
    return text
