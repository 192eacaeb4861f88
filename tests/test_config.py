"""config.py: every mistake is named, every value survives the way to YAML and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from whimbrel import config
from whimbrel.config import Bytes, Settings, load, parse, read_yaml, save, to_tree, to_yaml
from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig


@dataclass(frozen=True)
class Decay:
    """A nested plain dataclass, as the rooms below the pipeline use."""

    shape: Literal["linear", "cosine"] = "linear"
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"share {self.share} is no share; set share to 0.2")


class Optimizer(Settings):
    """A nested group."""

    rate: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Decay = Decay()


class Source(Settings):
    """An entry of a list."""

    name: str
    files: tuple[Path, ...] = ()
    weight: float | None = None


class Job(Settings):
    """Everything a settings class may hold."""

    steps: int
    text: str = ""
    memory: Bytes = 2**30
    verbose: bool = False
    out: Path | None = None
    optimizer: Optimizer = Optimizer()
    sources: tuple[Source, ...] = ()
    extra: dict[str, Optimizer] = Field(default_factory=dict)


@dataclass(frozen=True)
class Plain:
    """A dataclass at the top."""

    steps: int
    decay: Decay | None = None
    limit: tuple[float, float] = (0.0, math.inf)
    names: tuple[str, ...] = field(default_factory=tuple)


def message(cls: type, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(cls, None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((), ["steps is missing", "an integer"]),
        (("stps=3",), ["unknown setting stps", "did you mean steps?"]),
        (("steps=3", "optimizer.rat=1"), ["unknown setting optimizer.rat", "did you mean optimizer.rate?"]),
        (("steps=3", "betas=[1, 2]"), ["unknown setting betas", "did you mean optimizer.betas?"]),
        (("steps=3", "optimizer.decay.shpe=linear"), ["did you mean optimizer.decay.shape?"]),
        (("steps=3", "sources=[{name: a, file: b}]"), ["unknown setting sources.0.file", "sources.0.files?"]),
        (("steps=3", "extra.a.rte=1"), ["unknown setting extra.a.rte", "did you mean extra.a.rate?"]),
        (("steps=3", "zzzz=1"), ["unknown setting zzzz", "known:", "optimizer", "steps"]),
        (("steps=true",), ["steps is true", "an integer"]),
        (("steps=1.5",), ["steps is 1.5", "an integer"]),
        (("steps=three",), ["steps is 'three'", "an integer"]),
        (("steps=3", "verbose=yes"), ["verbose is 'yes'", "true or false", "the default is false"]),
        (("steps=3", "optimizer=3"), ["optimizer is 3", "`key: value`"]),
        (("steps=3", "optimizer.rate=-1"), ["optimizer.rate is -1", "greater than 0", "the default is 0.0003"]),
        (("steps=3", "optimizer.betas=[1, 2, 3]"), ["optimizer.betas is [1, 2, 3]", "at most 2"]),
        (("steps=3", "optimizer.decay.shape=cosin"), ["optimizer.decay.shape is 'cosin'", "'linear' or 'cosine'"]),
        (("steps=3", "optimizer.decay.share=2"), ["share 2.0 is no share; set share to 0.2"]),
        (("steps=3", "memory=22Gi"), ["memory is '22Gi'; set memory to", "22GiB"]),
        (("steps=3", "steps.x=1"), ["steps is 3", "no settings inside"]),
        (("steps=3", "sources=[]", "sources.0.name=x"), ["sources is a list of 0"]),
        (("steps",), ["'steps' is not an override", "key.sub=value"]),
        (("=3",), ["not an override"]),
        (("a..b=3",), ["not an override"]),
        (("steps=[1",), ["steps=[1"]),
        (("steps=3", "text={a: 1, a: 2}"), ["'a' is written twice"]),
    ],
)
def test_mistakes_name_setting_value_and_a_way_out(overrides: tuple[str, ...], parts: list[str]) -> None:
    said = message(Job, *overrides)
    for part in parts:
        assert part in said, said


def test_dataclasses_are_checked_alike() -> None:
    assert load(Plain, None, ["steps=3", "decay.shape=cosine", "names=[a, b]"]) == Plain(
        3, Decay("cosine"), names=("a", "b")
    )
    assert "did you mean decay.share?" in message(Plain, "steps=3", "decay.shar=1")
    assert "steps is '3x'" in message(Plain, "steps=3x")
    assert "divisible" in message(
        ModelConfig,
        "pattern=M",
        "vocab_size=8",
        "hidden_size=8",
        "mamba_num_heads=3",
        "mamba_head_dim=4",
        "ssm_state_size=4",
        "n_groups=2",
    )


def test_overrides_beat_the_file_and_later_ones_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("steps: 5\noptimizer:\n  rate: 1e-4\nsources:\n- name: a\n- name: b\n")
    job = load(
        Job, file, ["optimizer.betas=[0.8, 0.9]", "steps=1e3", "steps=2e3", "sources.1.weight=.5", "memory=22GiB"]
    )
    assert (job.steps, job.memory) == (2000, 22 * 2**30)
    assert job.optimizer == Optimizer(rate=1e-4, betas=(0.8, 0.9))
    assert [source.weight for source in job.sources] == [None, 0.5]
    with pytest.raises(UserError, match=r"job\.yaml: unknown setting stepz"):
        load(Job, file, ["stepz=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 100000), ("-1.5e+3", -1500.0), (".5", 0.5), ("5.", 5.0), ("+7", 7), ("010", 10),
        ("0x1F", 31), ("0o17", 15), ("131_072", 131072), (".inf", math.inf), ("-.inf", -math.inf), ("1e400", math.inf),
        ("no", "no"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("1:30", "1:30"), ("2026-11-21", "2026-11-21"),
        ("M-M*-", "M-M*-"), ("'5'", "5"), ("1.2.3", "1.2.3"),
        ("1e", "1e"), ("_1", "_1"), ("[1e-3, x]", [0.001, "x"]),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    tree: dict[str, Any] = {}
    config.override(tree, f"x={text}")
    assert tree["x"] == value
    assert type(tree["x"]) is type(value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"steps: 1\nsteps: 2\n", ["line 2", "'steps' is written twice"]),
        (b"a:\n  b: 1\n  c: 2\n  b: 3\n", ["line 4", "'b' is written twice"]),
        (b"steps: [1\nx: 2\n", ["line 2"]),
        (b"- 1\n- 2\n", ["a list", "`key: value`"]),
        (b"5", ["the number 5"]),
        (b"steps: \xff\xfe", ["not text"]),
        (b"steps: !!python/object/apply:os.system ['true']", ["could not determine a constructor"]),
        (b"a: 1\n---\nb: 2\n", ["line 2"]),
        (b"[1]: 2\n", ["settings.yaml"]),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(Job, file)
    for part in parts:
        assert part in str(caught.value)


def test_missing_file_folder_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_anchors_and_merges_save_typing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &b {x: 1, y: 2}\nmore:\n  <<: *b\n  y: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["more"] == {"x": 1, "y": 3}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job(steps=1).steps = 2  # type: ignore[misc]


numbers = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))
decays = st.builds(Decay, shape=st.sampled_from(["linear", "cosine"]), share=st.floats(0, 1))
optimizers = st.builds(Optimizer, rate=st.floats(1e-300, 1e300), betas=st.tuples(numbers, numbers), decay=decays)
paths = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(Path)
sources = st.builds(Source, name=texts, files=st.lists(paths, max_size=2).map(tuple), weight=st.none() | numbers)
jobs = st.builds(
    Job,
    steps=st.integers(),
    text=texts
    | st.sampled_from(
        ["no", "1e-4", "null", "~", "010", "1:30", "2026-11-21", "<<", "true", " x ", "a: b", "#", "-", "=", "1_0"]
    ),
    memory=st.integers(1, 2**50),
    verbose=st.booleans(),
    out=st.none() | paths,
    optimizer=optimizers,
    sources=st.lists(sources, max_size=2).map(tuple),
    extra=st.dictionaries(texts, optimizers, max_size=2),
)
plains = st.builds(
    Plain,
    steps=st.integers(),
    decay=st.none() | decays,
    limit=st.tuples(numbers, numbers),
    names=st.lists(texts, max_size=3).map(tuple),
)


@given(value=jobs | plains)
@settings(max_examples=150, deadline=None)
def test_what_is_saved_loads_as_an_equal_value(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    save(value, file)
    assert load(type(value), file) == value


def test_model_config_survives_too(tmp_path: Path) -> None:
    model = ModelConfig(
        "*-",
        64,
        32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=(1, 2),
    )
    save(model, tmp_path / "model.yaml")
    assert load(ModelConfig, tmp_path / "model.yaml") == model


@given(
    tree=st.recursive(
        st.none() | st.booleans() | st.integers() | numbers | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_yaml_keeps_any_plain_data(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "tree.yaml"
    file.write_text(to_yaml({"tree": tree}), encoding="utf-8")
    assert read_yaml(file) == {"tree": tree}


def test_tree_writes_every_default_out() -> None:
    tree = to_tree(Job(steps=1))
    assert tree["optimizer"]["decay"] == {"shape": "linear", "share": 0.2}
    assert parse(Job, tree) == Job(steps=1)


@pytest.mark.parametrize(("text", "words"), [("a: &x\n  b: *x\n", "Circular"), ("a: " + "[" * 3000, "too deep")])
def test_settings_that_have_no_end_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "endless.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        config.read_yaml(file)
