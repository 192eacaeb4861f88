"""The commands: help everywhere, one line for every mistake, no traceback, the right exit code, and a quick start."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from whimbrel import cli
from whimbrel.engine import Sampling
from whimbrel.errors import UserError
from whimbrel.pipeline.stages import STAGES

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a user's mistake is answered with."""
    code, _, err = call(capsys, *words)
    assert code == 2, err
    assert err.startswith("whimbrel: ")
    assert err.count("\n") == 1, err
    return err


def test_every_stage_has_a_command() -> None:
    assert set(cli.STAGES) | {"quantize"} == set(STAGES)  # quantize has a form of its own: it writes a folder
    assert set(STAGES) <= set(COMMANDS)


def test_without_arguments_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    for flag in ("--help", "-h"):
        code, out, err = call(capsys, command, flag)
        assert (code, err) == (0, "")
        assert f"whimbrel {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "--nonsense" in mistake(capsys, command, "--nonsense", "1")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("doctor", *cli.STAGES)])
def test_commands_that_need_something_say_so(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "Missing argument" in mistake(capsys, command)


def test_an_unknown_command_names_the_nearest_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'doctor'" in mistake(capsys, "docter")
    said = mistake(capsys, "xyzzy")
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run", "none.yaml"), ["none.yaml does not exist"]),
        (("fetch", "smolm2"), ["smolm2", "'smollm2'"]),
        (("generate", "nowhere", "none.jsonl"), ["none.jsonl is no file", '{"prompt"']),
        (("generate", "nowhere", "p.jsonl", "temprature=1"), ["did you mean temperature?"]),
        (("generate", "nowhere", "p.jsonl", "top_p=2"), ["top_p", "0.95"]),
        (("generate", "nowhere", "p.jsonl", "--temperature", "1"), ["without dashes: temperature=VALUE"]),
        (("generate", "nowhere", "p.jsonl"), ["nowhere"]),
        (("chat", "nowhere"), ["nowhere", "smollm2"]),
        (("plan", "qwen3-8c", "--memory", "22GiB", "--context", "64"), ["'qwen3-8b'"]),
        (("data", "--config", "none.yaml"), ["none.yaml does not exist"]),
        (("data", "langages=[en]"), ["did you mean languages?"]),
        (("tokenizer",), ["needs documents", "--input documents=PATH"]),
        (("tokenizer", "--input", "document=x"), ["'documents'"]),
        (("tokenizer", "--input", "documents=none"), ["none"]),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    said = mistake(capsys, *words)
    for part in parts:
        assert part in said, said


def test_show_prints_settings_that_can_be_fed_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, first, _ = call(capsys, "tokenizer", "vocab_size=777", "--show")
    assert code == 0
    (tmp_path / "t.yaml").write_text(first)
    assert call(capsys, "tokenizer", "--config", str(tmp_path / "t.yaml"), "--show") == (0, first, "")
    assert "vocab_size: 777" in first


def test_generate_lists_every_setting_there_is() -> None:
    listed = (cli.generate.__doc__ or "").split("Settings:")[1]
    assert re.findall(r"\w+", listed) == list(Sampling.__dataclass_fields__)


@pytest.mark.parametrize(
    ("error", "part", "code"),
    [
        (UserError("lr is 3; set lr to 1e-4"), "lr is 3; set lr to 1e-4", 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "a.txt does not exist", 2),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt may not be read or written", 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a is a folder", 2),
        (OSError(errno.ENOSPC, "No space left", "big.bin"), "no space left on the disk for big.bin", 1),
        (OSError(errno.EIO, "Input/output error", "a"), "Input/output error (a)", 1),
        (MemoryError(), "out of memory", 1),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory", 1),
        (KeyboardInterrupt(), "the same command goes on", 130),
        (
            ZeroDivisionError("division by zero"),
            "a fault of ours: ZeroDivisionError: division by zero (add --traceback",
            1,
        ),
    ],
)
def test_errors_become_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, part: str, code: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("whimbrel.doctor.examine", fail)
    given, out, err = call(capsys, "doctor")
    assert (given, out) == (code, "")
    assert part in err or (code == 130 and err.startswith("whimbrel: stopped"))
    assert err.count("\n") == 1


def test_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("no")

    monkeypatch.setattr("whimbrel.doctor.examine", fail)
    with pytest.raises(UserError):
        cli.main(["doctor", "--traceback"])


def test_doctor_measures_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["cpu"]["bandwidth"] > 1e8
    assert found["cpu"]["matmul_peak"] > 1e8
    assert set(found["operations"].values()) <= {"cpu", "torch", "reference"}
    assert (found["native"]["isa"] is None) != (found["native"]["reason"] is None)
    assert 0 < found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]
    code, text, _ = call(capsys, "doctor")
    assert code == 0
    assert found["cpu"]["model"] in text
    assert "GB/s" in text
    assert (found["native"]["isa"] or found["native"]["reason"]) in text


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from whimbrel.cli import main; main(['--help'])"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.5  # seconds of processor, which a busy machine does not stretch


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m whimbrel --help | true",
        shell=True,
        capture_output=True,
        text=True,
        executable="/bin/bash",
    )
    assert done.stderr == ""


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "whimbrel", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_is_one_line_and_130() -> None:
    code = "import whimbrel.doctor as d, time\nfrom whimbrel.cli import main\nimport sys\n"
    code += "d.examine = lambda: (print('ready', flush=True), time.sleep(60))\nsys.exit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "whimbrel: stopped; what was finished is kept, and the same command goes on from there\n"
