"""Vocabularies that the tests of this room share: one trained here, one in the manner of Llama 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from whimbrel.text import Tokenizer

settings.register_profile("shared-cores", deadline=None)  # a neighbour's work is no failure of ours
settings.load_profile("shared-cores")

# Real enough to merge: prose, code, numbers, several scripts, both line ends.
PAGES = [
    "The whimbrel crosses the ocean without landing; its bill is long and curved, and its call has seven notes.\n\n",
    "def area(radius):\r\n    return 3.14159 * radius ** 2  # HTMLParser\r\n\r\n",
    "Der Regenbrachvogel überquert den Ozean, ohne zu landen. Größe: 40–46 cm, 12 000 km.\n",
    "鸟飞过大海 🐦🌊 до свидания ❤️ naïve café\t\tx = 1234567890 + 42\n",
    "<think>\n12 plus 30 is 42\n</think>\n\nThe answer is 42.\n   - item one\n   - item two\n",
] * 3


@pytest.fixture(scope="session")
def pages() -> list[str]:
    return PAGES


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(PAGES, 512)


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def theirs(saved: Path) -> Any:
    """What transformers makes of the saved folder."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the manner of Llama 2: spaces as ▁, one put before the text, bytes as fallback, a BOS added."""
    folder = tmp_path_factory.mktemp("llama")
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    backend.train_from_iterator(["▁a▁bird▁crosses▁the▁ocean▁[INST]▁hello▁[/INST]▁answer", "▁the▁end"] * 3, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the byte pieces are ordinary entries
    backend = Backend.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
