"""Words are tested: commands in pages, help and recipes parse and their settings exist; links and paths resolve."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from whimbrel import cli, config
from whimbrel.engine import Sampling
from whimbrel.pipeline import recipe, single
from whimbrel.pipeline.stages import STAGES
from whimbrel.train.plan import TrainingPlanSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
GROUP: Any = typer.main.get_command(cli.app)
PROGRAM = re.compile(r"^(?:\.venv/bin/)?whimbrel$")
PLACEHOLDER = re.compile(r"^[A-Z]+$|^[A-Z][A-Z|]*$|^…$")


def blocks(text: str, language: str) -> list[str]:
    """What stands between fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page: Path) -> list[str]:
    """Lines of shell in a page, script or recipe that call whimbrel."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        lines = "\n".join(blocks(text, "(?:sh|bash|console)?")).splitlines()
        lines += re.findall(r"`((?:\.venv/bin/)?whimbrel [^`\n]+)`", text)
    else:
        lines = [line.strip("#! \t").removeprefix("Type next:").strip() for line in text.splitlines()]
    return [
        re.split(r"\s{2,}|\s#\s| \| ", line.strip())[0] for line in lines if PROGRAM.match(line.split(" ")[0].strip())
    ]


def check(line: str) -> None:
    """Parse one command as the program would, and read the settings it gives; fails if either does not exist."""
    line = re.sub(r"\$\(cat (\S+)\)", lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), line)
    _, *words = shlex.split(line, comments=True)
    if words[0].startswith("-") or PLACEHOLDER.match(words[0]) or words[0] in ("...", "…"):
        return
    assert words[0] in GROUP.commands, f"{line}: no command {words[0]}"
    command = GROUP.commands[words[0]]
    if len(words) == 1 or "…" in line:
        return
    given = command.make_context(f"whimbrel {words[0]}", [w for w in words[1:] if w not in ("-h", "--help")]).params
    overrides = given.get("overrides") or ()
    if words[0] == "run":
        if given["recipe"].parts[0] == "runs":
            return  # the resolved recipe of a run that is not here
        recipe.read(ROOT / given["recipe"], overrides)
    elif words[0] in STAGES and overrides:
        single._settings(words[0], None, overrides)
    elif overrides:
        config.load(TrainingPlanSettings if words[0] == "plan" else Sampling, None, overrides)


def found() -> list[tuple[str, str]]:
    sources = [*PAGES, ROOT / "scripts" / "demo.sh", *sorted(ROOT.glob("recipes/*.yaml"))]
    return [(str(page.relative_to(ROOT)), line) for page in sources for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), found())
def test_commands_in_pages_parse(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(line)


def test_enough_commands_are_found() -> None:
    """The README's, the demonstration's and the recipe's are among them."""
    assert {"README.md", "docs/configuration.md", "scripts/demo.sh", "recipes/first-flight.yaml"} <= {
        p for p, _ in found()
    }
    assert ("README.md", ".venv/bin/whimbrel chat smollm2") in found()


@pytest.mark.parametrize(
    "line",
    [
        "whimbrel fly there",
        "whimbrel chat smollm2 --tempature 1",
        "whimbrel chat smollm2 tempature=1",
        "whimbrel plan smollm2 --memory 1GiB",
        "whimbrel run recipes/first-flight.yaml pretrain.train.step=3",
        "whimbrel pretrain --show model.preset=hybrid-tiny lenght=3",
    ],
)
def test_the_check_can_fail(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=r"no command|No such option|unknown setting|Missing|step"):
        check(line)


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_help_names_only_what_exists(name: str) -> None:
    text = str(GROUP.commands[name].help)
    for line in re.findall(r"`(whimbrel [^`]+)`", text):
        check(line)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    said = {"setup", "demo", "test"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        said |= set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks(text, "(?:sh)?")), re.M))
        said |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert said <= targets


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as they are made from their words."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), f"{target} is not there"
            assert not anchor or anchor in anchors(there), f"{file} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    tops = r"src|tests|docs|recipes|native|scripts|data/pages|benchmarks"
    for path in re.findall(rf"`((?:{tops})/[\w./-]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{path} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_compiles_and_its_imports_work(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def test_every_room_has_its_page() -> None:
    rooms = {path.name for path in (ROOT / "src" / "whimbrel").iterdir() if (path / "__init__.py").exists()}
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for room in rooms - {"serve"}:  # a terminal so far: its page is the engine's
        assert (ROOT / "docs" / f"{room}.md").exists(), room
        assert f"({room}.md)" in index
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(
        re.findall(r"\((\w+\.md)\)", index)
    )
