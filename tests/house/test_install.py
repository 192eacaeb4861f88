"""Installing from the source tree: with a compiler the native library comes along, without one the rest works alone."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from whimbrel.ops.cpu import load

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("src", "native", "recipes", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore")


def install(folder: Path, *options: str, **environment: str) -> Path:
    """A copy of the tree, installed into an environment of its own beside it; the folder of its packages."""
    tree, place = folder / "a tree", folder / "environment"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / part)
    venv.create(place, with_pip=True, symlinks=True)
    command = [place / "bin" / "python", "-m", "pip", "install", "--no-input", "--no-deps", "-q", *options, str(tree)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode and "No matching distribution found for scikit-build-core" in done.stderr:
        pytest.skip("no network to fetch the build backend from")
    assert done.returncode == 0, done.stderr
    return next((place / "lib").glob("python*/site-packages"))


def library(packages: Path) -> list[Path]:
    return list((packages / "whimbrel" / "ops" / "cpu").glob("*whimbrel.*"))


def see(packages: Path, code: str) -> str:
    """What code prints that imports this installation before any other, with the packages that run this test."""
    environment = os.environ | {"PYTHONPATH": str(packages)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=packages).stdout


def misplaced(file: Path) -> tuple[set[str], set[str]]:
    """Functions of a library that use AVX: those compiled for it, and others, which any processor may come to.

    Such others are inline functions of a header: every file brings its own copy, and the linker keeps one of them.
    """
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True)
    there: set[str] = set()
    name = ""
    for line in listing.stdout.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            name = found[1]
        elif found := re.match(r"\s+[0-9a-f]+:\s+(v(?!er[rw])|.*%[yz]mm)", line):
            there.add(name)
    others = {name for name in there if not re.search(r"8whimbrel(?!8baseline)\d", name)}
    return there - others, others


LOOK = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
from pathlib import Path
import whimbrel
from whimbrel import ops
from whimbrel.ops.cpu import library
library._candidates = lambda: list(Path(library.__file__).parent.glob("*whimbrel.*"))  # not the one of this environment
print(whimbrel.__file__, ops.active()["ssd"], library.load()[1] or "there", sep="|")
"""


def test_where_a_compiler_is_the_library_is_loaded() -> None:
    """Else the tests of the native form would be skipped and nobody would know."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler here")
    found, reason = load()
    assert found is not None, f"{reason}; run: make setup"


@pytest.mark.slow
def test_with_a_compiler_the_library_comes_along(tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler here")
    strict = ("cmake.define.WHIMBREL_STRICT=ON", "install.strip=false")  # warnings are errors here, for users never
    packages = install(tmp_path, *(f"--config-settings={setting}" for setting in strict))
    (found,) = library(packages)
    if shutil.which("objdump") and platform.machine() in ("x86_64", "AMD64"):
        theirs, others = misplaced(found)
        assert len(theirs) > 20 and not others
    file, form, reason = see(packages, LOOK).strip().split("|")
    assert Path(file) == packages / "whimbrel" / "__init__.py"
    assert (form, reason) == ("cpu", "there")


@pytest.mark.slow
def test_without_a_compiler_it_installs_all_the_same(tmp_path: Path) -> None:
    packages = install(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert library(packages) == []
    file, form, reason = see(packages, LOOK).strip().split("|")
    assert Path(file) == packages / "whimbrel" / "__init__.py"
    assert form == "torch"
    assert "not built" in reason


@pytest.mark.slow
def test_an_editable_install_runs_the_source_and_finds_the_library(tmp_path: Path) -> None:
    packages = install(tmp_path, "--editable")
    code = "import whimbrel; from whimbrel import errors; print(whimbrel.__file__, errors.__file__, sep='|')"
    python = packages.parents[2] / "bin" / "python"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip().split("|")
    assert [Path(file).parent for file in where] == [tmp_path / "a tree" / "src" / "whimbrel"] * 2
    assert len(library(packages)) == (1 if shutil.which("c++") else 0)
