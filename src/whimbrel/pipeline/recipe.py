"""A recipe: a YAML graph of stages, checked whole before anything runs.

name: first-flight
about: One sentence for the report.
seed: 0                       # for every stage that has a seed and is not given one
launch: {nodes: 1}            # hosts that it wants; may be left out
stages:
  documents:                  # a name of your choice, and the folder it is written to
    stage: data               # one of the table in stages.py
    inputs: {pages: p.warc.gz}  # names of other stages, or files and folders
    launch: {processes: 1}    # more than one: torchrun starts them here; their number follows from train.parallel
    config: {...}             # the settings of that stage
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from whimbrel import config
from whimbrel.errors import UserError, nearest
from whimbrel.pipeline.claims import Claim
from whimbrel.pipeline.stages import STAGES, Stage, locate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOP = ("name", "about", "seed", "launch", "claims", "stages")
_NODE = ("stage", "inputs", "launch", "config")
_TAKEN = ("stages", "logs", "old", "generations", "run")


@dataclass(frozen=True)
class Node:
    """One stage of a recipe. An input is the name of another stage (str) or a file or folder (Path)."""

    name: str
    stage: Stage
    kind: str
    settings: Any
    inputs: Mapping[str, str | Path]
    processes: int = 1
    """Processes that run it together."""

    @property
    def resolved(self) -> dict[str, Any]:
        """The settings with every default filled in, as plain values."""
        return config.to_tree(self.settings)

    @property
    def binding(self) -> dict[str, Any]:
        """The resolved settings without the free ones: what the key is made of."""
        tree = self.resolved
        for name in self.stage.free:
            *groups, last = name.split(".")
            place = tree
            for group in groups:
                place = place[group]
            del place[last]
        return tree


@dataclass(frozen=True)
class Recipe:
    """A checked graph; `nodes` are in an order in which they can run."""

    name: str
    about: str
    seed: int | None
    nodes: tuple[Node, ...]
    claims: tuple[Claim, ...] = ()
    hosts: int = 0
    """Hosts that it wants, `launch.nodes`; 0: it does not say."""

    def text(self) -> str:
        """The resolved recipe as YAML; reading it back gives the same graph."""
        stages = {
            node.name: {
                "stage": node.kind,
                "inputs": {name: str(source) for name, source in node.inputs.items()},
                **({"launch": {"processes": node.processes}} if node.processes > 1 else {}),
                "config": node.resolved,
            }
            for node in self.nodes
        }
        claims = [claim.model_dump(exclude_defaults=True) for claim in self.claims]
        head = {"name": self.name, "about": self.about, "seed": self.seed, "claims": claims, "stages": stages}
        return config.to_yaml(head | ({"launch": {"nodes": self.hosts}} if self.hosts else {}))


def read(path: str | Path, overrides: Sequence[str] = (), table: Mapping[str, Stage] = STAGES) -> Recipe:
    """Read and check a recipe. Overrides are `stages.pretrain.config.steps=10`, or shorter `pretrain.steps=10`.

    Raises UserError for everything that is wrong with it: unknown keys and stages (with the nearest known one),
    settings that a stage refuses, inputs that are missing or do not exist, circles.
    """
    path = Path(path)
    # Through JSON and back: an anchor of YAML makes one object stand in two places, and an override is meant for one.
    top = _mapping(json.loads(json.dumps(config.read_yaml(path))), str(path), _TOP)
    for override in overrides:
        config.override(top, _full(override, _mapping(top.get("stages"), "stages")))
    return build(top, str(path), table)


def build(top: Mapping[str, Any], where: str, table: Mapping[str, Stage] = STAGES) -> Recipe:
    """`read` from plain data that came from the file `where`."""
    stages = _mapping(top.get("stages"), "stages")
    if not stages:
        raise UserError(f"{where} has no stages; write at least one under `stages:`")
    name = top.get("name", Path(where).stem)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"name is {name!r}; set it to letters, digits, '-', '_', '.', for instance first-flight")
    seed = top.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UserError(f"seed is {seed!r}; set it to a whole number, for instance 0")
    nodes = {key: _node(key, value, seed, tuple(stages), table) for key, value in stages.items()}
    about = " ".join(str(top.get("about") or "").split())
    claims = tuple(config.parse(Claim, _mapping(one, "claims"), "claims") for one in top.get("claims") or ())
    for claim in claims:
        for stage in claim.stages - set(nodes):
            raise UserError(f"claims: {claim.say!r} names the stage {stage!r}; {nearest(stage, nodes)}")
    hosts = _mapping(top.get("launch"), "launch", ("nodes",)).get("nodes", 0)
    if not isinstance(hosts, int) or isinstance(hosts, bool) or hosts < 0:
        raise UserError(f"launch.nodes is {hosts!r}; set launch.nodes to the number of hosts, for example 2")
    return Recipe(name, about, seed, tuple(nodes[key] for key in _order(nodes)), claims, hosts)


def _mapping(value: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """A mapping with known keys, or an error that says where."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; set it to a mapping (`key: value` lines)")
    for key in value:
        if not isinstance(key, str) or (known is not None and key not in known):
            raise UserError(f"{where} has an unknown key {key!r}; {nearest(str(key), known or ())}")
    return dict(value)


def _full(override: str, stages: Mapping[str, Any]) -> str:
    """The full form of an override, `pretrain.steps=10` being short for `stages.pretrain.config.steps=10`."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals:
        raise UserError(f"{override!r} is not an override; write key=value, for instance pretrain.steps=10")
    if keys[0] in stages:
        keys = ["stages", keys[0], "config", *keys[1:]]
    if keys[0] == "stages" and len(keys) > 1 and keys[1] not in stages:
        raise UserError(f"{override!r} names no stage; {nearest(keys[1], stages)}")
    if keys[0] not in _TOP:
        raise UserError(f"{override!r} names no stage; {nearest(keys[0], [*stages, *_TOP])}")
    return f"{'.'.join(keys)}={value}"


def _node(name: str, value: Any, seed: int | None, names: tuple[str, ...], table: Mapping[str, Stage]) -> Node:
    """Check one stage of a recipe: what it is, its settings, its inputs."""
    where = f"stages.{name}"
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise UserError(
            f"{name!r} cannot name a stage; use letters, digits, '-', '_', '.', and none of {', '.join(_TAKEN)}"
        )
    given = _mapping(value, where, _NODE)
    kind = str(given.get("stage"))
    if kind not in table:
        raise UserError(f"{where}.stage is {kind!r}; {nearest(kind, table)}")
    stage = table[kind]
    tree = _mapping(given.get("config"), f"{where}.config")
    settings = config.parse(locate(stage.settings), tree, f"{where}.config")
    if seed is not None and "seed" not in tree and "seed" in config.to_tree(settings):
        settings = config.parse(locate(stage.settings), {**tree, "seed": seed}, f"{where}.config")
    inputs = flat_inputs(_mapping(given.get("inputs"), f"{where}.inputs"), stage, f"{where}.inputs")
    for wanted in stage.inputs:
        if wanted not in {name.partition(".")[0] for name in inputs}:
            raise UserError(f"{where}.inputs lacks {wanted!r}; set it to the name of a stage or to a path")
    return Node(
        name=name,
        stage=stage,
        kind=kind,
        settings=settings,
        inputs={key: _input(source, f"{where}.inputs.{key}", names) for key, source in inputs.items()},
        processes=_processes(_mapping(given.get("launch"), f"{where}.launch", ("processes",)), settings, stage, where),
    )


def _processes(launch: Mapping[str, Any], settings: Any, stage: Stage, where: str) -> int:
    """How many processes run a stage: the product of `train.parallel`, which `launch` may repeat but not change."""
    axes = getattr(getattr(settings, "train", None), "parallel", None)
    wanted = axes.processes if axes is not None else 1
    if wanted > 1 and not stage.spread:
        raise UserError(
            f"{where}.config.train.parallel makes {wanted} processes, but this stage runs in one; leave it out"
        )
    said = launch.get("processes", wanted)
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        raise UserError(f"{where}.launch.processes is {said!r}; set it to {wanted}")
    if said != wanted:
        more = f", or config.train.parallel.data to {said}" if stage.spread and wanted == 1 else ""
        product = (
            " × ".join(f"{name} {size}" for name, size in vars(axes).items()) if axes is not None else "one process"
        )
        raise UserError(
            f"{where}.launch.processes is {said}, but config.train.parallel makes {wanted} ({product}); "
            f"set launch.processes to {wanted}{more}"
        )
    return wanted


def flat_inputs(given: Mapping[str, Any], stage: Stage, where: str) -> dict[str, Any]:
    """Inputs by name; several for one name, `tokens: {pages: a, sums: b}`, become `tokens.pages` and `tokens.sums`."""
    flat: dict[str, Any] = {}
    for name, source in given.items():
        flat |= {f"{name}.{key}": each for key, each in source.items()} if isinstance(source, dict) else {name: source}
    known = (*stage.inputs, *stage.optional)
    for name in flat:
        head, dot, _ = name.partition(".")
        if head not in known:
            raise UserError(f"{where} has an unknown key {head!r}; {nearest(head, known)}")
        if dot and head not in stage.several:
            raise UserError(f"{where}.{head} is several inputs, but takes one; set it to the name of a stage or a path")
    return flat


def _input(source: Any, where: str, names: tuple[str, ...]) -> str | Path:
    """The stage or the existing path that an input names; a relative path starts where the command was typed."""
    if not isinstance(source, str):
        raise UserError(f"{where} is {source!r}; set it to the name of a stage or to a path")
    if source in names:
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{where} is {source!r}: no stage ({nearest(source, names)}) and no file ({path.absolute()})")
    return path


def _order(nodes: Mapping[str, Node]) -> list[str]:
    """An order in which every stage comes after its inputs, else as written."""
    sources = {name: [s for s in node.inputs.values() if isinstance(s, str)] for name, node in nodes.items()}
    try:
        return list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        circle = " <- ".join(reversed(error.args[1]))
        raise UserError(f"the stages go round in a circle: {circle}; take one of these inputs away") from error
