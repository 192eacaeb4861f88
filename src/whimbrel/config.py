"""Settings: a YAML file and `key.sub=value` overrides become one frozen, checked value, and go back to YAML unchanged.

`load` serves `Settings` classes (pydantic) and plain frozen dataclasses alike. Every mistake is a `UserError` that
names the setting by its dotted path, its value and what would work; an unknown key names the nearest real one.

The dialect is YAML 1.2's core schema and not PyYAML's 1.1, so `1e-4` is a number, `no` and `on` are words, `1:30` and
`2026-11-21` are text, and `010` is ten; `131_072` and `1e3` (an integer) are ours. A key written twice is an error.

Paths stay as written: a relative path starts at the folder where the command was typed, wherever the file that names it
lies. So a saved configuration means the same as the one it came from, and no file carries one machine's folders.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, ValidationInfo

from whimbrel.errors import UserError, nearest
from whimbrel.files import atomic_write
from whimbrel.units import parse_bytes

T = TypeVar("T")
Node = tuple[Any, Any]  # (type, default) of a setting; the default is MISSING where there is none
MISSING = dataclasses.MISSING


class Settings(BaseModel):
    """Base of every settings class above the model: frozen, no unknown keys, a docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=False)


def _bytes(value: Any, info: ValidationInfo) -> int:
    return parse_bytes(value if isinstance(value, int) else str(value), info.field_name or "size")


Bytes = Annotated[int, BeforeValidator(_bytes)]
"""A setting in bytes: `22GiB`, `500MB` or a whole number."""


# ---------------------------------------------------------------------------------------------------------- YAML

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_MERGE = re.compile(r"^<<$")
_SCALARS = [("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("merge", _MERGE)]
# PyYAML looks resolvers up by a scalar's first character; None stands for all of them.
_RESOLVERS = {None: [(f"tag:yaml.org,2002:{name}", pattern) for name, pattern in _SCALARS]}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is written twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Only double quotes keep line breaks other than \n (NEL, LS, PS, a lone \r): PyYAML folds them elsewhere.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    value: float = yaml.SafeLoader.construct_yaml_float(loader, node)
    whole = "." not in node.value and abs(value) < 2**53 and value.is_integer()  # 1e3 counts steps as well as 1000 does
    return int(value) if whole else value


_Dumper.add_representer(str, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _parse(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)  # what refers to itself shows itself here
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep; settings are a few levels of keys") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the YAML file in it")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist (looked in {path.absolute().parent}); name a YAML file that does"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text ({error.reason} at byte {error.start}); name a YAML file in UTF-8"
        ) from None
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {_kind(tree)}; write settings as `key: value` lines")
    return tree


def to_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text of plain data, in the order given, that `read_yaml` reads back as the same data."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---------------------------------------------------------------------------------------------------- load and save


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """A `Settings` class or frozen dataclass from a YAML file and `key.sub=value` overrides; the last one wins."""
    tree = read_yaml(path) if path is not None else {}
    for text in overrides:
        override(tree, text)
    return parse(cls, tree, str(path) if path is not None else "")


def parse(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """A settings value from plain data. `where` is the file that the errors name."""
    prefix = f"{where}: " if where else ""
    if not isinstance(tree, Mapping):
        raise UserError(f"{prefix}settings are {_kind(tree)}; write them as `key: value` lines")
    for unknown, beside in _unknown(cls, tree):
        raise UserError(f"{prefix}unknown setting {unknown}; {_suggest(cls, unknown, beside)}")
    try:  # strict, so that `true` is no integer and `5` no text; as JSON, so that a list can be a tuple and text a path
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UserError(prefix + _explain(cls, tree, error)) from None
    except TypeError as error:
        raise UserError(
            f"{prefix}{error}; settings are text, numbers, true, false, null, lists and `key: value`"
        ) from None


def to_tree(settings: Any) -> dict[str, Any]:
    """The plain data of a settings value, every default written out; `parse` gives back an equal value."""
    tree: dict[str, Any] = TypeAdapter(type(settings)).dump_python(settings, mode="json", warnings="error")
    return tree


def save(settings: Any, path: str | Path) -> None:
    """Write a settings value as YAML, whole or not at all; `load` gives back an equal value."""
    with atomic_write(path) as file:
        file.write(to_yaml(to_tree(settings)))


def override(tree: dict[str, Any], text: str) -> None:
    """Set `a.b.2.c=value` in the tree, making the groups on the way that are not there yet."""
    path, equals, right = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{text!r} is not an override; write key.sub=value, for example train.steps=100")
    value = _parse(right, text)
    place: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise UserError(
                    f"{text}: {'.'.join(keys[:depth])} is a list of {len(place)}; {key!r} is no place in it"
                )
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if place.get(key) is None:
                place[key] = {}
        else:
            raise UserError(f"{text}: {'.'.join(keys[:depth])} is {place!r} and has no settings inside")
        if last:
            place[index] = value
        place = place[index]


# ---------------------------------------------------------------------------------------------- what a class knows


def _fields(cls: Any) -> dict[str, Node] | None:
    """Types and defaults of a settings class by name, None if `cls` is no such class."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        hints = cls.model_fields
        return {
            name: (f.annotation, MISSING if f.is_required() or f.default_factory else f.default)
            for name, f in hints.items()
        }
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        types_ = get_type_hints(cls)
        return {f.name: (types_[f.name], f.default) for f in dataclasses.fields(cls) if f.init}
    return None


def _parts(annotation: Any) -> list[Any]:
    """The types that an annotation allows, seen through Annotated and unions."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for option in get_args(annotation) for part in _parts(option)]
    return [annotation]


def _classes(annotation: Any) -> list[Any]:
    return [part for part in _parts(annotation) if _fields(part) is not None]


def _inside(annotation: Any, key: str) -> Node | None:
    """(type, default) of what lies under a key or index of a value of this type."""
    for part in _parts(annotation):
        fields, kinds = _fields(part), [kind for kind in get_args(part) if kind is not Ellipsis]
        if fields is not None and key in fields:
            return fields[key]
        if get_origin(part) in (dict, Mapping) and len(kinds) == 2:
            return kinds[1], MISSING
        if get_origin(part) in (list, tuple, Sequence) and kinds and key.isdecimal():
            return kinds[min(int(key), len(kinds) - 1)], MISSING
    return None


def _node(cls: Any, path: str) -> Node:
    """(type, default) of a dotted path."""
    node: Node | None = (cls, MISSING)
    for key in path.split("."):
        node = _inside(node[0], key) if node else None
    return node or (None, MISSING)


def _unknown(annotation: Any, value: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted paths in the data that the type does not have, each with the names it could have had."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    names = [name for cls in _classes(annotation) for name in _fields(cls) or {}]
    for key, item in items:
        node = _inside(annotation, str(key))
        if node is not None:
            yield from _unknown(node[0], item, f"{path}{key}.")
        elif names and isinstance(value, dict):
            yield f"{path}{key}", names


def _paths(annotation: Any, path: str = "", above: tuple[Any, ...] = ()) -> Iterator[str]:
    """Every dotted path that a settings class knows."""
    for cls in _classes(annotation):
        for name, (kind, _) in (_fields(cls) or {}).items() if cls not in above else ():
            yield f"{path}{name}"
            yield from _paths(kind, f"{path}{name}.", (*above, cls))


def _suggest(cls: Any, unknown: str, beside: Sequence[str]) -> str:
    """Point from an unknown path to the same name elsewhere, else to the nearest beside it, else list those."""
    group, dot, name = unknown.rpartition(".")
    elsewhere = [path for path in _paths(cls) if path.rpartition(".")[2] == name]
    match = difflib.get_close_matches(name, beside, n=1, cutoff=0.5)
    best = elsewhere[0] if elsewhere else f"{group}{dot}{match[0]}" if match else None
    return f"did you mean {best}?" if best else nearest(name, beside)


# ---------------------------------------------------------------------------------------------------------- errors


_WAYS = {
    "int_": "an integer",
    "float_": "a number",
    "finite_": "a finite number",
    "string_type": "text",
    "bool_": "true or false",
}
_WAYS |= {"list_": "a list", "tuple_": "a list", "dict_": "`key: value` lines", "model_": "`key: value` lines"}
_WAYS |= {"dataclass_": "`key: value` lines", "path_": "a path", "none_": "null"}


def _explain(cls: Any, tree: Any, error: ValidationError) -> str:
    """The first of pydantic's complaints in one sentence: setting, value, what would work."""
    complaints = [(*_locate(tree, c["loc"], c["type"]), c) for c in error.errors(include_url=False)]
    path, value, first = complaints[0]
    others = {other for other, _, _ in complaints} - {path}
    more = f" ({len(others)} more after this one)" if others else ""
    if first["type"] == "missing":
        return f"{path} is missing; set {path} to {_wanted(_node(cls, path)[0])}{more}"
    if first["type"] == "extra_forbidden":
        group = path.rpartition(".")[0]
        beside = [name for c in _classes(_node(cls, group)[0] if group else cls) for name in _fields(c) or {}]
        return f"unknown setting {path}; {_suggest(cls, path, beside)}{more}"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Exception):  # from a validator or a __post_init__, which may have named the setting itself
        group, dot, name = path.rpartition(".")
        return f"{group}{dot}{cause}{more}" if str(cause).startswith(name) else f"{path}: {cause}{more}"
    ways = dict.fromkeys(_way(complaint) for at, _, complaint in complaints if at == path)
    default = _node(cls, path)[1]
    plain = isinstance(default, (str, int, float, bool, type(None), tuple)) and default != value
    hint = f"; the default is {_shown(default)}" if plain else ""
    return f"{path or 'this'} is {_shown(value)}; it should be {' or '.join(ways)}{hint}{more}"


def _way(complaint: Any) -> str:
    """What would have worked, in the words of somebody who writes YAML."""
    kind, limits = complaint["type"], complaint.get("ctx", {})
    if kind in ("too_long", "too_short"):
        return (
            f"a list of at most {limits['max_length']}"
            if kind == "too_long"
            else f"a list of at least {limits['min_length']}"
        )
    for name, words in _WAYS.items():
        if kind.startswith(name):
            return words
    return str(complaint["msg"]).removeprefix("Input should be ").replace("String should", "text that should")


def _locate(tree: Any, loc: tuple[int | str, ...], kind: str) -> tuple[str, Any]:
    """Dotted path and value of a complaint, by the data: pydantic's own path holds names of union branches too."""
    names, value = [], tree
    for step in loc:
        held = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if step in held:
            value = value[step]
            names.append(str(step))
    return ".".join([*names, str(loc[-1])] if kind == "missing" else names), value


def _kind(value: Any) -> str:
    names = {dict: "a group of settings", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"the number {value}")


def _shown(value: Any) -> str:
    """A value as it would be written on a command line."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, (bool, type(None))) else repr(value)


def _wanted(annotation: Any) -> str:
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    choices = [choice for part in _parts(annotation) if get_origin(part) is Literal for choice in get_args(part)]
    plain = [words[part] for part in _parts(annotation) if part in words]
    return " or ".join([*map(repr, choices), *plain]) or ("a group of settings" if _classes(annotation) else "a value")
