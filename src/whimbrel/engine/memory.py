"""How many sequences, and tokens of keys and values, to make room for when the user does not say."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.config import ATTENTION, ModelConfig
from whimbrel.units import format_bytes


def check_state_dtype(name: str) -> str:
    """The name of a dtype that recurrent states may have; another raises `UserError`."""
    if name not in ("float32", "float16"):
        raise UserError(f"state_dtype is {name!r}; set state_dtype to float32 or float16")
    return name


SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of the free memory: what pools may take."""
MOST, DEPTH = 256, 8192
"""Sequences at once, at most, and tokens that each is expected to hold, where nobody says how many."""


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on this device now: on a GPU what torch holds and does not use counts, and a limit set for
    this process; on a CPU what only caches files counts, since it is given up when asked for.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return min(int(share * total), free + torch.cuda.memory_reserved(device)) - used
    known = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s*(\d+) kB", known.read_text() if known.exists() else "")
    if available:
        return int(available[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Room:
    """What an engine's pools are cut from: `bytes` for them and for what a step needs for a moment."""

    config: ModelConfig
    bytes: int
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    block_size: int = 16
    prefill_tokens: int = 512
    kv_dtype: str | None = None
    """Of keys and values; None: what is computed with."""

    @property
    def block(self) -> int:
        """Bytes of a block of keys and values."""
        return count.kv_bytes(self.config, self.block_size, dtype=self.kv_dtype or count.computed(self.dtype))

    @property
    def each(self) -> int:
        """Bytes of a sequence beside them: its state, its part of a decoding step."""
        state = count.state_bytes(self.config, 1, self.dtype, self.state_dtype)
        return state + count.step_bytes(self.config, self.dtype)

    def left(self, sequences: int) -> int:
        """Bytes for keys and values beside so many sequences, one that is nobody's, and a prompt being read."""
        config, a_token = self.config, self.block // self.block_size
        gathered = a_token // max(1, config.count(ATTENTION)) + 8  # of a token that came before, one layer at a time
        longest = min(config.max_position_embeddings, max(1, self.bytes // (a_token + gathered)))
        prompt = count.activation_bytes(config, min(self.prefill_tokens, longest), longest, self.dtype)
        return self.bytes - prompt - (sequences + 1) * self.each - self.block

    def most(self, blocks: int = 0, each: int = 0) -> int:
        """Sequences that fit beside `blocks` blocks for all and `each` for every one."""
        return max(0, (self.left(0) - blocks * self.block) // (self.each + each * self.block))

    def divide(self, sequences: int | None, kv_tokens: int | None) -> tuple[int, int]:
        """Sequences, and tokens of keys and values; what is not given is chosen: as many sequences as can hold `DEPTH`
        tokens each beside room for one whole context (or three quarters of the memory), at most `MOST`; then all the
        blocks there is room for. What cannot be raises `UserError`.
        """
        full, size = -(-self.config.max_position_embeddings // self.block_size), self.block_size
        fits = self.most(each=1) if kv_tokens is None else self.most(-(-kv_tokens // size))
        if fits < (sequences or 1):
            raise self._refusal(sequences, kv_tokens, fits)
        if sequences is None:
            sequences = min(MOST, fits)
            if kv_tokens is None:
                whole = min(full, 3 * self.left(0) // 4 // max(1, self.block))
                sequences = max(1, min(sequences, self.most(whole), self.most(each=min(full, -(-DEPTH // size)))))
        room = self.left(sequences) // self.block if self.block else sequences * full
        return sequences, min(sequences * full, room) * size if kv_tokens is None else kv_tokens

    def _refusal(self, sequences: int | None, kv_tokens: int | None, fits: int) -> UserError:
        ample = replace(self, bytes=1 << 60)
        need = ample.bytes - ample.left(1) + self.block
        said, fix = f"one sequence takes {format_bytes(need)}", f"memory to {need}, or load weights of fewer bits"
        if fits:
            said, fix = f"max_sequences={sequences} take {format_bytes(self.each)} each", f"max_sequences to {fits}"
        elif kv_tokens is not None and self.most(each=1):
            held, most = -(-kv_tokens // self.block_size) * self.block, self.left(1) // self.block * self.block_size
            said, fix = f"kv_tokens={kv_tokens} take {format_bytes(held)}", f"kv_tokens to {most}"
        elif replace(self, prefill_tokens=16).most(each=1):
            fix = "prefill_tokens to 16"
        elif replace(self, state_dtype="float16").most(each=1):
            fix = "state_dtype to float16"
        there = f"{format_bytes(self.bytes)} are there for states, keys, values and a prompt being read"
        return UserError(f"{said}, but {there}; set {fix}")


def sizes(room: Room, sequences: int | None, kv_tokens: int | None, limited: bool) -> tuple[int, int]:
    """Sequences, and tokens of keys and values, of an engine with `room`; where it is not `limited` (a CPU's) as many
    sequences as are asked for, and full contexts for all or what it holds beside the states.
    """
    if limited:
        return room.divide(sequences, kv_tokens)
    sequences, size, config = sequences or 16, room.block_size, room.config
    wanted = sequences * -(-config.max_position_embeddings // size) * size
    left = room.bytes - count.state_bytes(config, sequences, room.dtype, room.state_dtype)
    return sequences, kv_tokens or (max(min(wanted, left * size // room.block), size) if room.block else wanted)
