"""native/ under AddressSanitizer and UndefinedBehaviorSanitizer: a part of what `scripts/sanitize.sh` runs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_native.py", "test_rows.py", "test_decode.py")
CHOSEN = "convolution or gated_norm or panels or rows_of_floats or (whole_numbers and hybrid) or (float32 and not 17)"


@pytest.mark.slow
def test_no_address_is_wrong_and_nothing_undefined() -> None:
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("cmake") is None or platform.machine() != "x86_64":
        pytest.skip("needs c++, cmake and x86-64")
    asan = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer")
    command = ["sh", "scripts/sanitize.sh", *(f"tests/ops/{name}" for name in FILES), "-k", CHOSEN]
    environment = os.environ | {"PYTHON": sys.executable, "FORMS": "avx2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
