"""A recipe is checked whole before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from short_stages import TABLE

from whimbrel.errors import UserError
from whimbrel.pipeline.recipe import Recipe, read

GOOD = """
name: flock
about: Two counts
  and a join.
seed: 7
stages:
  j: {stage: join, inputs: {left: a, right: b}, config: {separator: "-"}}
  b: {stage: count, inputs: {start: a}, config: {seed: 3}}
  a: {stage: count, config: {steps: 4}}
"""


def recipe(folder: Path, text: str = GOOD, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read(path, overrides, TABLE)


def test_order_defaults_and_seed(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    assert [node.name for node in found.nodes] == ["a", "b", "j"]
    assert found.about == "Two counts and a join."
    assert found.nodes[0].resolved == {"steps": 4, "pause": 0.0, "seed": 7, "trouble": ""}
    assert found.nodes[1].resolved["seed"] == 3  # its own beats the recipe's
    assert "seed" not in found.nodes[2].resolved


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    found = recipe(tmp_path, GOOD, "a.pause=1e-3", "name=other")
    again = recipe(tmp_path, found.text())
    assert again == found
    assert found.nodes[0].resolved["pause"] == 0.001


@pytest.mark.parametrize("override", ["stages.a.config.steps=9", "a.steps=9"])
def test_overrides(tmp_path: Path, override: str) -> None:
    assert recipe(tmp_path, GOOD, override).nodes[0].resolved["steps"] == 9


def test_an_override_reaches_one_of_two_stages_that_share_an_anchor(tmp_path: Path) -> None:
    text = "stages:\n  a: {stage: count, config: &c {steps: 2}}\n  b: {stage: count, config: *c}\n"
    found = recipe(tmp_path, text, "b.steps=8")
    assert [node.resolved["steps"] for node in found.nodes] == [2, 8]
    assert found.name == "recipe"  # the file's


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (GOOD.replace("stage: join", "stage: joint"), (), ["stages.j.stage", "'joint'", "'join'"]),
        (GOOD.replace("stages:", "stage:"), (), ["'stage'", "'stages'"]),
        (GOOD.replace("inputs: {start", "input: {start"), (), ["stages.b", "'input'", "'inputs'"]),
        (GOOD.replace("{start: a}", "{begin: a}"), (), ["stages.b.inputs", "'begin'"]),
        (GOOD.replace(", right: b", ""), (), ["stages.j.inputs", "'right'"]),
        (GOOD.replace("right: b", "right: bb.txt"), (), ["stages.j.inputs.right", "'bb.txt'", "no file"]),
        (GOOD.replace("right: b", "right: [b]"), (), ["stages.j.inputs.right", "['b']"]),
        (GOOD.replace("right: b", "right: {one: b}"), (), ["stages.j.inputs.right", "takes one"]),
        (GOOD.replace("steps: 4", "stepps: 4"), (), ["stages.a.config", "stepps", "steps"]),
        (GOOD.replace("steps: 4", "steps: four"), (), ["stages.a.config", "steps", "'four'"]),
        (GOOD.replace('{separator: "-"}', "{}"), (), ["stages.j.config", "separator"]),
        (GOOD.replace("{steps: 4}", "{steps: 4}, inputs: {start: b}"), (), ["circle", "a", "b"]),
        (GOOD.replace("  a: {", "  old: {").replace(": a", ": old"), (), ["'old'", "cannot name a stage"]),
        (GOOD.replace("  a: {", "  a/b: {").replace(": a", ": a/b"), (), ["'a/b'", "cannot name a stage"]),
        (GOOD.replace("name: flock", "name: ../flock"), (), ["name", "'../flock'", "first-flight"]),
        (GOOD.replace("seed: 7", "seed: x"), (), ["seed", "'x'", "whole number"]),
        ("name: empty\n", (), ["no stages"]),
        (GOOD, ("aa.steps=3",), ["'aa.steps=3'", "'a'"]),
        (GOOD, ("stages.c.config.steps=3",), ["names no stage", "known: a, b, j"]),
        (GOOD, ("a.steps",), ["'a.steps'", "pretrain.steps=10"]),
        (GOOD, ("a.stepps=3",), ["stepps", "steps"]),
    ],
)
def test_every_mistake_has_its_line(tmp_path: Path, text: str, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_file_is_an_input_too(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("words")
    found = recipe(tmp_path, GOOD.replace("right: b", f"right: {page}"))
    assert {node.name: node for node in found.nodes}["j"].inputs["right"] == page


def test_several_inputs_have_names_and_read_back(tmp_path: Path) -> None:
    found = recipe(tmp_path, GOOD.replace("{start: a}", "{start: {one: a, other: a}}"))
    assert {node.name: node for node in found.nodes}["b"].inputs == {"start.one": "a", "start.other": "a"}
    assert recipe(tmp_path, found.text()) == found


def test_what_is_free_in_training_is_free_in_the_key() -> None:
    from whimbrel.pipeline.stages import STAGES
    from whimbrel.train.loop import FREE

    assert STAGES["pretrain"].free == tuple(f"train.{name}" for name in FREE)


def test_the_table_names_code_that_exists() -> None:
    from whimbrel.pipeline.stages import STAGES, locate

    for name, stage in STAGES.items():
        assert isinstance(locate(stage.settings), type), name
        assert callable(locate(stage.run)), name
