"""Chat templates of other models: rendered as transformers renders them, masked where that is possible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel.errors import UserError
from whimbrel.text import Tokenizer

# In the manner of SmolLM2: a default system turn, `<SPECIAL_20>` and `<SPECIAL_21>` around each turn.
PLAIN = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
        {{ '<SPECIAL_20>system\nYou help.<SPECIAL_21>\n' }}
    {% endif %}
    {% if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}
{{ '<SPECIAL_20>' + message['role'] + '\n' + message['content'] + '<SPECIAL_21>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<SPECIAL_20>assistant\n' }}{% endif %}"""

# In the manner of Qwen3: thoughts of past turns are dropped, thinking off is an empty thought, tools as JSON.
THINKING = """{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}
{%- for message in messages -%}
    {{- '<SPECIAL_20>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' and loop.last -%}
        {%- set thought = message.reasoning_content if message.reasoning_content is defined else '' -%}
        {{- '<think>\n' + thought + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- message.content + '<SPECIAL_21>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<SPECIAL_20>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

MARKED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}
{% endfor %}{{ strftime_now('%Y') }}"""

CHAT = [
    {"role": "user", "content": "Hi 🐦 <b>"},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
Make = Callable[..., Tokenizer]


@pytest.fixture
def make(saved: Path, tmp_path: Path) -> Make:
    """A tokenizer with another chat template, loaded from a folder."""

    def build(template: Any, **more: Any) -> Tokenizer:
        config = json.loads((saved / "tokenizer_config.json").read_text()) | {"eos_token": "<SPECIAL_21>"}
        (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template} | more))
        return Tokenizer.load(tmp_path)

    return build


@pytest.mark.parametrize("template", [PLAIN, THINKING, MARKED])
@pytest.mark.parametrize("generation", [True, False])
def test_transformers_renders_the_same(make: Make, tmp_path: Path, template: str, generation: bool) -> None:
    ours = make(template)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for messages in (CHAT, [{"role": "system", "content": "Sys"}, *CHAT], [*CHAT, CHAT[0]]):
        for thinking in (True, False):
            for tools in (None, [{"name": "fü", "parameters": {"a": "<"}}]):
                text = theirs.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=generation, enable_thinking=thinking
                )
                assert ours.render(messages, tools=tools, thinking=thinking, generation=generation) == text
                if generation:
                    same = theirs.apply_chat_template(
                        messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
                    )
                    ids, mask = ours.encode_chat(messages, tools=tools, thinking=thinking, generation=True)
                    assert ids == same["input_ids"] and not any(mask)


def trained(tokenizer: Tokenizer, messages: list[Any], **more: Any) -> str:
    ids, mask = tokenizer.encode_chat(messages, **more)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(messages, generation=False, **more)
    return tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on], skip_special=False)


def test_the_mask_of_a_stable_template(make: Make) -> None:
    tokenizer = make(PLAIN)
    assert tokenizer.eos_ids == (21,)
    assert trained(tokenizer, CHAT) == "4<SPECIAL_21>"
    both = [message | {"train": True} for message in CHAT]
    assert trained(tokenizer, both) == "Hello.\n<SPECIAL_21>4<SPECIAL_21>"
    assert trained(tokenizer, [*CHAT, CHAT[0]]) == ""


def test_the_mask_of_a_template_that_drops_thoughts(make: Make) -> None:
    tokenizer = make(THINKING)
    thoughtful = [CHAT[0], CHAT[1] | {"reasoning_content": "greet"}]
    assert trained(tokenizer, thoughtful) == "<think>\ngreet\n</think>\n\nHello.\n<SPECIAL_21>"
    assert trained(tokenizer, CHAT[:2], thinking=False) == "Hello.\n<SPECIAL_21>"
    with pytest.raises(UserError, match=r'message 2 differently.* let only the last message have "train": true'):
        tokenizer.encode_chat([CHAT[0], CHAT[1] | {"train": True}, *CHAT[2:]])
    with pytest.raises(UserError, match="leaves out the thought of message 2"):
        make(PLAIN).encode_chat(thoughtful)


def test_a_beginning_that_the_template_writes_is_there_once(make: Make) -> None:
    tokenizer = make(MARKED, add_bos_token=True)
    assert tokenizer.adds_bos
    assert tokenizer.encode_chat(CHAT, generation=True)[0].count(1) == 1
    assert tokenizer.encode(tokenizer.render(CHAT), bos=True).count(1) == 1


def test_where_the_template_lies(make: Make, tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": PLAIN}]
    assert make(named).chat_template == PLAIN
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    assert make(PLAIN).chat_template == THINKING


def test_no_template(make: Make) -> None:
    with pytest.raises(UserError, match="no chat template"):
        make(None).render(CHAT)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (PLAIN, "refuses this conversation: no robots"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
        ("{{ messages[7].content.x }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{% set _ = messages.append(1) %}", "refuses this conversation"),
        ("line\n{% if %}", "line 2 of the chat template is not Jinja"),
    ],
)
def test_templates_and_messages_that_do_not_fit(make: Make, template: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(template).render([{"role": "robot", "content": "Hi"}])
