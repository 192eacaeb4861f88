"""On a processor without AVX the library runs its baseline form and meets no instruction that is not there.

qemu (Debian's package qemu-user) is that processor: a Nehalem of 2008, on which anything newer ends the program. torch
takes minutes to start there, so the operations are called without it. tests/house/test_install.py looks at every
instruction of the library instead, and needs no qemu.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from whimbrel.ops import cpu

CALLS = Path(__file__).with_name("without_torch.py")


@pytest.mark.slow
def test_without_avx_it_falls_back_and_computes_the_same():
    if cpu.load()[0] is None or cpu.isa() == "baseline":
        pytest.skip("there is nothing to fall back from")
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed")
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    command = [str(Path(sys.executable).resolve()), str(CALLS), str(openmp), cpu.load()[0]._name]
    here, old = (
        json.loads(subprocess.run([*prefix, *command], capture_output=True, text=True, check=True).stdout)
        for prefix in ([], ["qemu-x86_64", "-cpu", "Nehalem"])
    )
    assert here[0] == cpu.isa() and old[:3] == ["baseline", 0, 0]
    assert len(old) == len(here) == 10
    for expected, got in zip(here[3:], old[3:], strict=True):
        assert any(expected) and got == pytest.approx(expected, abs=1e-3)
