"""Compile the kernels of the self-check for an H200 (sm_90) beforehand, in many processes, into Triton's cache on disk.

Run: python benchmarks/gpu_prepare.py [--processes 16] [--cases rms_norm]. Needs no GPU: the processes go through the
cases of `gpu_check.py` on a CPU: a launch compiles and returns, and each kernel is taken by the process that meets it
first. Triton finds kernels by its own files, their source, what is constant in them and the target: all the same where
they are launched on a GPU afterwards. Triton 3.6 also builds a launcher in C for each signature; that is done here too,
where there is a CUDA driver to link with. Processes that go on after --seconds are ended: what is missing is compiled
when it is launched.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
import gpu_check  # noqa: E402
import torch  # noqa: E402
import triton.compiler  # noqa: E402
from gpu_compile import Target  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


class Taken(Exception):
    """Another process compiles this kernel, or this one has."""


class Nothing:
    """Stands for the references: a case ends where it would compare."""

    def __getattr__(self, name: str) -> Any:
        raise Taken


def seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def worker(number: int, processes: int, folder: Path, words: list[str]) -> None:
    """Go through the cases from a place of one's own on, and compile what nobody else has taken."""
    torch.set_num_threads(1)
    driver.set_active(Target())
    run, compile_, hits, log = JITFunction.run, triton.compiler.compile, list[bool](), folder / f"{number}.log"
    knobs.compilation.listener = lambda **said: hits.append(said["cache_hit"])

    def mine(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        key = sha256(f"{src.hash()} {sorted((options or {}).items(), key=str)}".encode()).hexdigest()
        try:
            (folder / key).touch(exist_ok=False)
        except FileExistsError:
            raise Taken from None
        begin = seconds()
        kernel = compile_(src, target=target, options=options, **more)
        if hasattr(nvidia, "make_launcher"):
            with suppress(Exception):
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
        with log.open("a") as file:
            file.write(json.dumps({"kernel": src.name, "seconds": seconds() - begin, "hit": hits[-1]}) + "\n")
        return kernel

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        with suppress(Taken):
            return run(self, *args, grid=grid, warmup=True, **settings)

    triton.compiler.compile, JITFunction.run, gpu_check.vectorised = mine, launch, Nothing()  # type: ignore[assignment]
    work = [case for case in gpu_check.listed(torch.device("cpu")) if not words or case[0].split()[0] in words]
    for at in range(len(work)):
        place = (number * len(work) // processes + at) % len(work)
        if not (folder / f"{place}.done").exists():
            with suppress(Exception):
                work[place][1]()
            (folder / f"{place}.done").touch()


def prepare(processes: int, words: list[str], most: float) -> dict[str, Any]:
    """What was compiled, by how many processes, and how long it took; kernels already on disk count apart."""
    begin, context = time.perf_counter(), multiprocessing.get_context("fork")
    with suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()  # reads all of Triton, once for all
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = [context.Process(target=worker, args=(k, processes, folder, words)) for k in range(processes)]
        for process in running:
            process.start()
        for process in running:
            process.join(max(0.0, most - (time.perf_counter() - begin)))
            if process.is_alive():
                process.terminate()
        done = [json.loads(line) for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    new = [kernel["seconds"] for kernel in done if not kernel["hit"]]
    return {"kernels": len(done), "compiled": len(new), "found": len(done) - len(new), "processes": processes,
            "processor_seconds": sum(new), "longest": max(new, default=0.0),
            "seconds": time.perf_counter() - begin}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--cases", default="")
    parser.add_argument("--seconds", type=float, default=600.0)
    said = parser.parse_args()
    print(json.dumps(prepare(said.processes, [word for word in said.cases.split(",") if word], said.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
