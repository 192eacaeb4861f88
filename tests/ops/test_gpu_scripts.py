"""The scripts that wait for a GPU: the whole of the measurement in a dry run, and the kernels compiled for an H200."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


def script(name, *words):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)


def test_a_row_that_fails_leaves_the_others_and_a_dry_run_says_so(tmp_path):
    """Without time for a second row, the first one's figures are there and the second is named."""
    out = tmp_path / "results.jsonl"
    done = script("gpu_measure.py", "--out", out, "--dry-run", "--rows", "ceilings,decode", "--seconds", 15.5)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 1 and "FAILED decode: no time left" in done.stdout, done.stdout + done.stderr
    assert records[0]["row"] == "machine" and all(record["dry"] for record in records)
    assert {record["row"] for record in records[1:]} <= {"ceilings"} and "DRY" in done.stdout


@pytest.mark.slow
def test_every_row_runs_in_a_dry_run(tmp_path):
    out = tmp_path / "results.jsonl"
    done = script("gpu_measure.py", "--out", out, "--dry-run", "--seconds", 3000)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_measure

    assert {record["row"] for record in records} == {"machine", *gpu_measure.ROWS}
    assert not [record for record in records if "failed" in record and record["failed"]]


@pytest.mark.slow
def test_kernels_compile_for_an_h200_and_fit_it():
    done = script("gpu_compile.py", "steps,rows")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") > 15
