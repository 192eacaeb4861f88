"""Token shards in Megatron's form: PREFIX.bin and PREFIX.idx, beside them PREFIX.mask.bin and PREFIX.docs.parquet.

`.bin`       the tokens of all documents, one after another, little-endian, without gaps.
`.idx`       byte  0   9 bytes  "MMIDIDX" and two zero bytes
             byte  9   uint64   version, 1
             byte 17   uint8    type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
             byte 18   uint64   S, number of sequences
             byte 26   uint64   D + 1, number of document bounds
             byte 34   int32[S]     tokens of each sequence
             then      int64[S]     byte in `.bin` at which each sequence starts
             then      int64[D+1]   document d is the sequences bounds[d] to bounds[d+1]
`.mask.bin`  one byte a token: 1 where the token is learned when it is the target, 0 where it is only read. Absent: 1.

All numbers are little-endian. We write one sequence a document; a document of several sequences is read as one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whimbrel.errors import UserError, need
from whimbrel.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type Megatron's tools use for a vocabulary: uint16 below 65,500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


@dataclass(frozen=True)
class Tokens:
    """One document on its way into a shard. `about` becomes its row in `.docs.parquet`."""

    ids: Sequence[int]
    learn: Sequence[int] | None
    about: Mapping[str, Any]


def write(prefix: str | Path, documents: Iterable[Tokens], vocab_size: int) -> dict[str, int]:
    """Write documents in the order they come; returns {"documents", "tokens"}. The `.idx` appears last.

    Raises UserError on a token outside the vocabulary or on a shard without documents.
    """
    kind = token_type(vocab_size)
    lengths: list[int] = []
    about: list[dict[str, Any]] = []
    offset = 0
    with ExitStack() as stack:
        tokens = stack.enter_context(atomic_write(f"{prefix}.bin", "wb"))
        mask = stack.enter_context(atomic_write(f"{prefix}.mask.bin", "wb"))
        for document in documents:
            ids = np.asarray(document.ids, dtype=np.int64)
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise UserError(f"{prefix}: token {ids.max()} lies outside the vocabulary; set vocab_size above it")
            learn = np.ones(len(ids), np.uint8) if document.learn is None else np.asarray(document.learn, np.uint8)
            assert len(learn) == len(ids), "a document's mask has one entry a token"
            tokens.write(ids.astype(kind).tobytes())
            mask.write(learn.tobytes())
            about.append({**document.about, "offset": offset, "length": len(ids)})
            lengths.append(len(ids))
            offset += len(ids)
        if not offset:
            raise UserError(f"{prefix} would hold no tokens; give more documents")
    _write_lineage(f"{prefix}.docs.parquet", about)
    with atomic_write(f"{prefix}.idx", "wb") as index:
        index.write(index_bytes(lengths, kind))
    return {"documents": len(lengths), "tokens": offset}


def index_bytes(lengths: Sequence[int], kind: np.dtype[Any]) -> bytes:
    """The `.idx` of documents with these lengths, one sequence each."""
    sizes = np.asarray(lengths, dtype="<i4")
    starts = (np.cumsum(sizes, dtype="<i8") - sizes) * kind.itemsize
    bounds = np.arange(len(sizes) + 1, dtype="<i8")
    header = _HEADER.pack(MAGIC, 1, _CODES[kind], len(sizes), len(bounds))
    return header + sizes.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes()


def _write_lineage(path: str, rows: list[dict[str, Any]]) -> None:
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    with atomic_write(path, "wb") as file:
        parquet.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


class TokenShards:
    """One or several shards read as one stream of T tokens in D documents, memory-mapped.

    starts_D1: int64, where each document starts in the stream, and T.
    """

    def __init__(self, prefixes: str | Path | Sequence[str | Path]) -> None:
        many = [prefixes] if isinstance(prefixes, (str, Path)) else list(prefixes)
        if not many:
            raise UserError("no token shard is named; name at least one, without .bin or .idx")
        parts = [_open(Path(prefix)) for prefix in many]
        self._tokens = [tokens for tokens, _, _ in parts]
        self._masks = [mask for _, mask, _ in parts]
        self._bounds = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        starts = [starts_D + at for (_, _, starts_D), at in zip(parts, self._bounds, strict=False)]
        self.starts_D1: NDArray[np.int64] = np.append(np.concatenate(starts), self._bounds[-1]).astype(np.int64)

    @property
    def tokens(self) -> int:
        """T, tokens in all."""
        return int(self._bounds[-1])

    @property
    def documents(self) -> int:
        """D, documents in all."""
        return len(self.starts_D1) - 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream."""
        return self._cut(self._tokens, start, stop)

    def learn(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which tokens [start, stop) of the stream are learned as targets."""
        return self._cut(self._masks, start, stop).astype(bool)

    def document(self, number: int) -> NDArray[np.int64]:
        """Tokens of one document."""
        return self.read(int(self.starts_D1[number]), int(self.starts_D1[number + 1]))

    def _cut(self, parts: list[Any], start: int, stop: int) -> NDArray[np.int64]:
        pieces = [np.empty(0, np.int64)]
        for part, low, high in zip(parts, self._bounds[:-1], self._bounds[1:], strict=True):
            if start < high and stop > low:
                inside = slice(max(start - low, 0), min(stop, high) - low)
                pieces.append(np.ones(inside.stop - inside.start, np.int64) if part is None else part[inside])
        return np.concatenate(pieces).astype(np.int64)


def _open(prefix: Path) -> tuple[NDArray[Any], NDArray[np.uint8] | None, NDArray[np.int64]]:
    """Tokens, mask and document starts of one shard, after checking that its files fit together."""
    data, mask = (prefix.with_name(prefix.name + end) for end in (".bin", ".mask.bin"))
    kind, sizes_S, bytes_S, bounds_D1 = _read_index(prefix.with_name(f"{prefix.name}.idx"))
    if not data.exists():
        raise UserError(f"{data} is missing beside its .idx; run the stage that wrote it again")
    starts_S1 = np.append(0, np.cumsum(sizes_S, dtype=np.int64))
    if not np.array_equal(bytes_S, starts_S1[:-1] * kind.itemsize):
        raise UserError(f"{data} is not one stream without gaps; write it again in the order of its .idx")
    have, want = data.stat().st_size, int(starts_S1[-1]) * kind.itemsize
    if have != want or not want:
        raise UserError(f"{data} has {have} bytes, its .idx says {want}; run the stage that wrote it again")
    if mask.exists() and mask.stat().st_size != starts_S1[-1]:
        raise UserError(f"{mask} has {mask.stat().st_size} bytes for {starts_S1[-1]} tokens; run its stage again")
    learn = np.memmap(mask, np.uint8, "r") if mask.exists() else None
    return np.memmap(data, kind, "r"), learn, starts_S1[bounds_D1[:-1]]


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Token type, sequence lengths, sequence byte offsets, document bounds of an `.idx`."""
    if not path.exists():
        raise UserError(f"{path} does not exist; name a token shard without .bin or .idx")
    raw = path.read_bytes()
    broken = UserError(f"{path} is cut short or not a Megatron index; run the stage that wrote it again")
    if len(raw) < _HEADER.size:
        raise broken
    magic, version, code, sequences, bounds = _HEADER.unpack_from(raw)
    if magic != MAGIC or len(raw) < _HEADER.size + 12 * sequences + 8 * bounds:
        raise broken
    if version != 1 or code not in _TYPES:
        raise UserError(f"{path} has version {version}, token type {code}; version 1 and types {list(_TYPES)} are read")
    sizes_S = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
    bytes_S = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    bounds_D1 = np.frombuffer(raw, "<i8", bounds, _HEADER.size + 12 * sequences)
    if not len(bounds_D1) or bounds_D1[0] != 0 or bounds_D1[-1] != sequences or (np.diff(bounds_D1) < 0).any():
        raise broken
    return np.dtype(_TYPES[code]), sizes_S, bytes_S, bounds_D1
