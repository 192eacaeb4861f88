"""The scripts that wait for a GPU: the whole of the measurement in a dry run, and the kernels compiled for an H200."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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

    monkeypatch.setitem(gpu_measure.ROWS, "fails", gpu_measure.Limits(fails, 1, 10))
    out = tmp_path / "results.jsonl"
    with pytest.raises(RuntimeError):
        gpu_measure.child("fails", gpu_measure.Place(dry=True), out)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {"row": "fails", "dry": True, "what": "first", "share": 0.5}
    assert "out of memory" in second["failed"]
    assert "DRY what=first share=50.0%" in gpu_measure.table(out)


def test_the_figures_and_their_summary_do_not_share_a_file(tmp_path):
    done = script("gpu_measure.py", "--out", tmp_path / "results.json", "--dry-run", "--rows", "ceilings")
    assert done.returncode == 2 and f"set --out to {tmp_path}/results.jsonl" in done.stderr
    assert not list(tmp_path.iterdir())


def test_operations_that_failed_the_check_run_in_torchs_form(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure
    from gpu_check import cases

    out = tmp_path / "results.jsonl"
    words = [name.split(" ")[0] for name, *_ in cases(True, torch.float32)]
    words += ["conv_step", "ssd_step", "mamba_step", "paged_attention", "linear"]

    def after(bad, seen):
        rows = [{"row": "check", "case": f"{word} bfloat16", "ok": word not in bad} for word in seen]
        out.write_text("".join(json.dumps(row) + "\n" for row in [{"row": "machine"}, *rows]) + '{"row": "torn')
        return gpu_measure.wrong(out)

    assert after([], words) == []
    assert after(["scan", "ssd_step", "rms_norm"], words) == ["rms_norm", "ssd", "ssd_step"]
    assert after([], [word for word in words if word != "cross_entropy"]) == ["cross_entropy", "log_prob"], "not seen"
    assert {"ssd", "attention", "kl"} <= set(after([], [])), "a check that saw nothing trusts nothing"


def test_a_kernel_that_breaks_its_process_costs_its_own_case_alone(tmp_path, monkeypatch):
    """After an illegal access nothing of that process runs on the card: a new one goes on behind that case."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check
    import gpu_measure

    def step(name, *given):
        if name == "ssd_step":
            raise RuntimeError("an illegal memory access was encountered")
        return 0.0, 0.0

    monkeypatch.setattr(gpu_check, "one_token", step)
    monkeypatch.setattr(gpu_check, "alive", lambda device: False)
    for name in ("paged", "half_state", "product", "draws"):
        monkeypatch.setattr(gpu_check, name, lambda *given: (0.0, 0.0))
    monkeypatch.setattr(gpu_check, "cases", lambda small, dtype: [])
    monkeypatch.setattr(gpu_measure, "machine", lambda place: {"gpu": "none"})
    monkeypatch.setattr(gpu_measure.gpu_floors, "floors", lambda: [])
    given = []

    def run(command, **more):
        given.append(command)
        skip = int(command[command.index("--skip") + 1]) if "--skip" in command else 0
        found = gpu_check.checks(torch.device("cpu"), small=True, skip=skip)
        for record in found:
            gpu_measure.append(tmp_path / "r.jsonl", {"row": "check", "dry": False} | record)
        return subprocess.CompletedProcess(command, 0 if record["ok"] else 1)

    monkeypatch.setattr(gpu_measure.subprocess, "run", run)
    assert gpu_measure.parent(["check"], gpu_measure.Place(dry=False), tmp_path / "r.jsonl", 100.0) == 1
    seen = [r for r in gpu_measure.records(tmp_path / "r.jsonl") if "case" in r]
    names = [r["case"] for r in seen]
    assert len(given) == 3 and len(names) == len(set(names)) and {"mamba_step bfloat16", "draw float32"} <= set(names)
    assert [r["case"] for r in seen if not r["ok"]] == ["ssd_step bfloat16", "ssd_step float32"]


def test_rows_share_the_time_by_worth(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_measure import ROWS, share

    names = list(ROWS)
    assert sum(row.least for row in ROWS.values()) < 540, "every row can be begun within a lease"

    def spend(part):
        """Seconds given to each row when each uses a part of what it is given."""
        left, given = 540.0, {}
        for at, name in enumerate(names):
            given[name] = share(names[at:], left)
            left -= part * given[name]
        return given, left

    greedy, left = spend(1.0)
    assert left >= 0 and all(greedy[name] >= ROWS[name].least for name in names)
    assert all(given == ROWS[name].most for name, given in spend(0.3)[0].items()), "what is not used goes on"
    assert share(["fp8"], ROWS["fp8"].least - 1) == 0, "what cannot fit is not begun"
    assert share(["peers", "train"], ROWS["peers"].least) == ROWS["peers"].least, "worth goes before number"


def test_a_row_that_cannot_fit_is_skipped_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure

    monkeypatch.setattr(gpu_measure, "machine", lambda place: {"gpu": "none"})
    monkeypatch.setattr(gpu_measure.gpu_floors, "floors", lambda: [{"row": "decode", "floor_seconds": 0.5}])
    out = tmp_path / "results.jsonl"
    assert gpu_measure.parent(["fp8", "decode"], gpu_measure.Place(dry=False), out, 5.0) == 1
    said = capsys.readouterr().out
    assert "floor_seconds=0.5" in said and "fp8: skipped, 5 s are left and it takes 30 at least" in said
    whole = json.loads(out.with_suffix(".json").read_text())
    assert [record["row"] for record in whole["records"]] == ["fp8", "decode"] and len(whole["failed"]) == 2


def test_a_machine_without_git_and_without_nvidia_smi_is_described(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure

    monkeypatch.setenv("PATH", str(tmp_path))
    said = gpu_measure.machine(gpu_measure.Place(dry=False))
    assert (said["commit"], said["gpu"]) == ("unknown", "unknown") and said["torch"] == torch.__version__


def test_the_ratios_predicted_are_those_of_plan(monkeypatch):
    """The largest batches of `plan`, its bytes over bandwidth and its prompts over peak: written out for one job."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_floors import CAP, H200, PEERS, floors, served

    from whimbrel.engine.plan import plan
    from whimbrel.model.presets import preset

    for name in PEERS:
        given = {"memory": int(CAP), "bandwidth": H200.bandwidth, "peak": H200.peak, "prefill_tokens": 8192}
        made = plan(preset(name), context=8192 + 16384, **given | {"prefill_tokens": 512})
        found = served(preset(name), H200, CAP, 8192, 16384, "reserved")
        assert found["batch"] == made.largest_batch
        assert found["prompt_seconds"] == pytest.approx(plan(preset(name), context=8192, **given).prefill_seconds)
        alone = plan(preset(name), context=8192 + 8192, **given).decode_tokens_per_second
        assert found["step_seconds"] * alone > 1 - 1e-9
    said = floors()
    first = next(r for r in said if r["row"] == "peers")
    assert first["batches"] == [9, 1] and 6 < first["predicted_ratio"] < 8, (
        "the seeds' six, where the worst is reserved"
    )
    written = json.loads((ROOT / "benchmarks/results/gpu/dry_run.json").read_text())["floors"]
    assert written == json.loads(json.dumps(said)), "python benchmarks/gpu_measure.py --dry-run writes them anew"


def test_decoding_is_timed_without_triton_too(monkeypatch):
    """As the other rows are: in torch's form, once a batch."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_measure

    from whimbrel import ops

    monkeypatch.setitem(sys.modules, "whimbrel.ops.triton", None)
    ops.gpu.cache_clear()
    try:
        found = list(gpu_measure.decode(gpu_measure.Place(dry=True, known=(1e9, 1e9))))
        assert ops.gpu()[0] is None
    finally:
        ops.gpu.cache_clear()
    assert [record["batch"] for record in found] == [1, 2] and all(record["seconds"] > 0 for record in found)
    assert not any(record["one_kernel"] for record in found)


def test_kernels_compiled_beforehand_are_found_by_another_process(tmp_path, monkeypatch):
    """Two processes share a case and compile each kernel once; a process that goes on by itself finds all of them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ("gpu_prepare.py", "--cases", "gated_norm,relu2", "--processes")
    first, second = (json.loads(script(*words, count).stdout) for count in (2, 1))
    kernels = first["kernels"]
    assert kernels >= 8 and first["compiled"] == kernels and first["found"] == 0 < first["longest"]
    assert second["found"] == second["kernels"] == kernels and second["compiled"] == 0


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
    whole = json.loads(out.with_suffix(".json").read_text())
    assert whole["floors"] == json.loads(json.dumps(gpu_measure.gpu_floors.floors())) and not whole["failed"]
    assert len(whole["records"]) == len(records) - 1


@pytest.mark.slow
def test_kernels_compile_for_an_h200_and_fit_it():
    done = script("gpu_compile.py", "steps,rows")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") > 15
