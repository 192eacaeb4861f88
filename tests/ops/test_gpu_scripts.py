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


def test_what_a_row_found_before_it_failed_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure

    def fails(place):
        yield {"what": "first", "share": 0.5}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu_measure.ROWS, "fails", (fails, 10))
    out = tmp_path / "results.jsonl"
    with pytest.raises(RuntimeError):
        gpu_measure.child("fails", gpu_measure.Place(dry=True), out)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {"row": "fails", "dry": True, "what": "first", "share": 0.5}
    assert "out of memory" in second["failed"]
    assert "DRY what=first share=50.0%" in gpu_measure.table(out)


def test_operations_that_failed_the_check_run_in_torchs_form(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure

    out = tmp_path / "results.jsonl"
    failed = {"scan 64x128 bfloat16": "error 1.0", "steps float32": "no", "rms_norm float32": "no"}
    out.write_text(json.dumps({"row": "check", "dry": False, "ok": False, "failed": failed}) + "\n")
    assert gpu_measure.wrong(out) == ["rms_norm", "ssd", "conv_step", "ssd_step", "paged_attention"]
    out.write_text(json.dumps({"row": "check", "dry": False, "failed": "it was killed"}) + "\n")
    assert {"ssd", "attention", "kl"} <= set(gpu_measure.wrong(out)), "a check that did not end trusts nothing"


@pytest.mark.slow
def test_every_row_runs_in_a_dry_run(tmp_path):
    out = tmp_path / "results.jsonl"
    done = script("gpu_measure.py", "--out", out, "--dry-run", "--seconds", 3000)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_measure

    assert {record["row"] for record in records} == {"machine", *gpu_measure.ROWS}
    assert not [record for record in records if record.get("failed")]


@pytest.mark.slow
def test_kernels_compile_for_an_h200_and_fit_it():
    done = script("gpu_compile.py", "steps,rows")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") > 15
