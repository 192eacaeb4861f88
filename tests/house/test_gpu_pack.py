"""The pack for a bare GPU machine: what it runs there works without any wheel, and says so where the pack is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
for name in ("pydantic", "yaml", "typer", "rich", "jinja2", "pyarrow", "gguf", "transformers", "huggingface_hub"):
    sys.modules[name] = None
"""


def bare(folder: Path) -> dict[str, str]:
    """An environment in which Python has none of these packages."""
    (folder / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("broken", [False, True], ids=["no pack", "an empty pack"])
def test_rows_run_without_the_wheels(tmp_path: Path, broken: bool) -> None:
    """A copy of the tree, one row in a dry run."""
    pytest.importorskip("triton", reason="a dry run interprets kernels")
    tree = tmp_path / "tree"
    for part in ("src", "benchmarks", "scripts", "tests/ops"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    if broken:
        (tree / "build" / "gpu-pack").mkdir(parents=True)
        (tree / "scripts" / "gpu_pack.txt").write_text("no-such-wheel-here>=1\n")
    out = tmp_path / "out.jsonl"
    command = ["sh", str(tree / "scripts" / "gpu_here.sh"), "--out", str(out), "--dry-run", "--rows", "ceilings"]
    done = subprocess.run(command, capture_output=True, text=True, env=bare(tmp_path))
    assert done.returncode == 0 and "every row ran" in done.stdout, done.stdout + done.stderr
    assert ("could not be installed" in done.stderr) == broken
    assert out.read_text().count('"row": "ceilings"') == 3
