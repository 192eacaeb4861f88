"""llama.cpp as a process of its own, told what to do in lines of JSON. Runs in a Python that has llama-cpp-python.

load    file, threads, flash, context, sequences, ubatch    a model and a context with float16 keys and values
decode  depth, batch, steps                                 seconds of so many steps of one token for each sequence
chunk   depth, tokens                                       seconds to read so many tokens after a depth
nll     ids                                                 negative log-probability of each id but the first

A depth is reached by laying out the cache of a short prompt again and again: a step does the same work whatever the
cache holds. `cpu_peer.py` is the other end.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import time
from typing import Any

import llama_cpp as lib
import numpy as np

SEED = 64
"""Tokens of the prompt whose cache is repeated."""


@lib.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    """llama.cpp says nothing."""


class Peer:
    """One model and one context."""

    def __init__(self, file: str, threads: int, flash: bool, context: int, sequences: int, ubatch: int) -> None:
        lib.llama_log_set(_quiet, ctypes.c_void_p(0))
        settings = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(file.encode(), settings)
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = context * sequences, sequences
        wanted.n_batch = wanted.n_ubatch = ubatch
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = lib.GGML_TYPE_F16
        wanted.flash_attn_type = 1 if flash else 0
        self.context = lib.llama_init_from_model(self.model, wanted)
        assert self.model and self.context, f"llama.cpp did not load {file}"
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory = lib.llama_get_memory(self.context)
        self.room = max(ubatch, sequences)
        self.batch = lib.llama_batch_init(self.room, 0, 1)
        self.caches: dict[int, bytes] = {}

    def close(self) -> None:
        """Give the memory back."""
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def run(self, tokens: list[int], places: list[int], sequences: list[int], every: bool) -> None:
        """One forward; logits of every token, or of the last alone."""
        self.batch.n_tokens = len(tokens)
        for i, (token, place, sequence) in enumerate(zip(tokens, places, sequences, strict=True)):
            self.batch.token[i], self.batch.pos[i] = token % self.vocabulary, place
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = every or i == len(tokens) - 1
        assert lib.llama_decode(self.context, self.batch) == 0, "llama_decode failed"
        lib.llama_get_logits_ith(self.context, len(tokens) - 1)  # waits

    def reach(self, depth: int, batch: int) -> None:
        """Give each sequence a cache of `depth` tokens."""
        lib.llama_memory_clear(self.memory, True)
        if not depth:
            return
        if depth not in self.caches:
            self.run(list(range(1, SEED + 1)), list(range(SEED)), [0] * SEED, False)
            size = lib.llama_state_seq_get_size(self.context, 0)
            held = (ctypes.c_uint8 * size)()
            assert lib.llama_state_seq_get_data(self.context, held, size, 0) == size
            self.caches = {depth: repeated(bytes(held), depth)}
            lib.llama_memory_clear(self.memory, True)
        cache = self.caches[depth]
        held = (ctypes.c_uint8 * len(cache)).from_buffer_copy(cache)
        for sequence in range(batch):
            assert lib.llama_state_seq_set_data(self.context, held, len(cache), sequence) == len(cache)

    def decode(self, depth: int, batch: int, steps: int) -> float:
        """Seconds of `steps` steps around the depth, after one to warm up."""
        begin = max(SEED, depth - steps // 2)
        self.reach(begin, batch)
        start = 0.0
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            self.run([7 * step + s for s in range(batch)], [begin + step] * batch, list(range(batch)), True)
        return time.perf_counter() - start

    def chunk(self, depth: int, tokens: int) -> float:
        """Seconds of one stretch of a prompt."""
        self.reach(depth, 1)
        begin = time.perf_counter()
        self.run(list(range(tokens)), list(range(depth, depth + tokens)), [0] * tokens, False)
        return time.perf_counter() - begin

    def nll(self, ids: list[int]) -> list[float]:
        """Negative natural log-probabilities, in one sequence that starts with the first id."""
        lib.llama_memory_clear(self.memory, True)
        found: list[float] = []
        for begin in range(0, len(ids) - 1, self.room):
            part = ids[begin : min(begin + self.room, len(ids) - 1)]
            self.run(part, list(range(begin, begin + len(part))), [0] * len(part), True)
            for i in range(len(part)):
                row = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocabulary,)).astype(float)
                top = row.max()
                found.append(float(top + np.log(np.exp(row - top).sum()) - row[ids[begin + i + 1]]))
        return found


def repeated(state: bytes, depth: int) -> bytes:
    """The saved state of a sequence of SEED tokens as that of one of `depth`: its keys and values again and again."""
    out, at = bytearray(), 0

    def take(kind: str) -> int:
        """Copy a number."""
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", state, at)
        out.extend(state[at : (at := at + struct.calcsize(kind))])
        return int(value)

    def tile(cells: int, width: int, rows: int = 1) -> None:
        """Rows of `cells` entries of `width` bytes become rows of `depth` entries."""
        nonlocal at
        block = np.frombuffer(state, np.uint8, rows * cells * width, at).reshape(rows, cells, width)
        at += block.size
        out.extend(np.tile(block, (1, -(-depth // cells), 1))[:, :depth].tobytes())

    take("I"), take("i")  # magic, sequence
    for _ in range(take("I")):  # streams
        (cells,) = struct.unpack_from("<I", state, at)
        if not cells:
            take("I")
            continue
        out += struct.pack("<I", depth)
        at += 4 + 12 * cells  # of each cell: position, how many sequences (one), which
        for place in range(depth):
            out += struct.pack("<iIi", place, 1, 0)
        transposed, layers = take("I"), take("I")
        for _ in range(layers):
            take("i")
            tile(cells, take("Q"))
        for _ in range(layers):
            take("i")
            if transposed:
                width = take("I")
                tile(cells, width, take("I"))
            else:
                tile(cells, take("Q"))
    if at < len(state):  # a hybrid: one recurrent cell, whose position moves
        assert take("I") == 1
        out += struct.pack("<i", depth - 1)
        at += 4
    return bytes(out + state[at:])


def main() -> None:
    """Obey lines until there are no more."""
    peer: Peer | None = None
    for line in sys.stdin:
        order = json.loads(line)
        name = order.pop("do")
        answer: Any = None
        if name == "load":
            if peer is not None:
                peer.close()
            peer = Peer(**order)
        elif name == "version":
            answer = lib.__version__
        else:
            answer = getattr(peer, name)(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
