"""How many tokens of keys and values to make room for when the user does not say."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.config import ModelConfig


def check_state_dtype(name: str) -> str:
    """The name of a dtype that recurrent states may have; another raises `UserError`."""
    if name not in ("float32", "float16"):
        raise UserError(f"state_dtype is {name!r}; set state_dtype to float32 or float16")
    return name


_SHARE = {"cpu": 0.5, "cuda": 0.9}


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on this device now; what only caches files counts, since it is given up when asked for."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s*(\d+) kB", known.read_text() if known.exists() else "")
    if available:
        return int(available[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def default_kv_tokens(
    config: ModelConfig,
    sequences: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    state_dtype: str = "float32",
) -> int:
    """Room for `sequences` full contexts, or for what a share of the free memory holds beside the recurrent states."""
    wanted = sequences * -(-config.max_position_embeddings // block_size) * block_size
    name = str(dtype).removeprefix("torch.")
    per_token = count.kv_bytes(config, 1, dtype=name)
    if not per_token:
        return wanted
    room = free_memory(device) * _SHARE.get(device.type, 0.5) - count.state_bytes(config, sequences, name, state_dtype)
    return max(min(wanted, int(room // per_token)), block_size)
