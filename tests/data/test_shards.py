"""Token shards: Megatron's bytes exactly, what is written is read, and broken files say so."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.data import shards
from whimbrel.data.shards import Tokens, TokenShards
from whimbrel.errors import UserError

DOCUMENTS = [[5, 6, 7], [300], [1, 2, 3, 4]]


def write(
    prefix: Path, documents: list[list[int]], vocab_size: int = 1000, learn: list[list[int]] | None = None
) -> None:
    masks = learn or [None] * len(documents)
    rows = (Tokens(ids, mask, {"id": str(i)}) for i, (ids, mask) in enumerate(zip(documents, masks, strict=True)))
    shards.write(prefix, rows, vocab_size)


def test_the_index_is_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    by_hand = (
        b"MMIDIDX\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
        b"\x08"  # uint16
        b"\x03\x00\x00\x00\x00\x00\x00\x00"  # sequences
        b"\x04\x00\x00\x00\x00\x00\x00\x00"  # document bounds
        b"\x03\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00"  # lengths
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00"  # bytes
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
        b"\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"  # bounds
    )
    assert (tmp_path / "a.idx").read_bytes() == by_hand
    assert (tmp_path / "a.bin").read_bytes() == b"\x05\0\x06\0\x07\0\x2c\x01\x01\0\x02\0\x03\0\x04\0"
    assert (tmp_path / "a.mask.bin").read_bytes() == b"\1" * 8


def test_a_foreign_shard_with_documents_of_several_sequences(tmp_path: Path) -> None:
    """As Megatron's tools write it with sentences split: int32, 3 sequences in 2 documents, no mask."""
    tokens = np.array([9, 8, 7, 70_000, 5], "<i4")
    (tmp_path / "b.bin").write_bytes(tokens.tobytes())
    parts = [np.array([2, 1, 2], "<i4"), np.array([0, 8, 12], "<i8"), np.array([0, 2, 3], "<i8")]
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\4" + (3).to_bytes(8, "little") * 2
    (tmp_path / "b.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    read = TokenShards(tmp_path / "b")
    assert (read.tokens, read.documents) == (5, 2)
    assert [read.document(d).tolist() for d in range(2)] == [[9, 8, 7], [70_000, 5]]
    assert read.learn(0, 5).all()


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=9), min_size=1, max_size=12).filter(any),
    vocab_size=st.sampled_from([70_000, 200_000]),
    data=st.data(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    learn = [data.draw(st.lists(st.integers(0, 1), min_size=len(d), max_size=len(d))) for d in documents]
    write(folder / "a", documents, vocab_size, learn)
    read = TokenShards(folder / "a")
    stream, masks = [t for d in documents for t in d], [m for d in learn for m in d]
    assert [read.document(i).tolist() for i in range(read.documents)] == documents
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert read.read(start, stop).tolist() == stream[start:stop]
    assert read.learn(start, stop).tolist() == [bool(m) for m in masks[start:stop]]
    assert read.read(start, stop).dtype == np.int64


def test_several_shards_are_one_stream(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS, learn=[[1, 0, 1], [1], [0, 0, 1, 1]])
    write(tmp_path / "b", [[70_000, 1]], vocab_size=80_000)
    both = TokenShards([tmp_path / "a", tmp_path / "b"])
    assert both.starts_D1.tolist() == [0, 3, 4, 8, 10]
    assert both.read(6, 10).tolist() == [3, 4, 70_000, 1]
    assert both.learn(0, 10).tolist() == [True, False, True, True, False, False, True, True, True, True]
    assert both.document(3).tolist() == [70_000, 1]


def test_lineage_says_where_each_document_lies(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    rows = parquet.read_table(tmp_path / "a.docs.parquet").to_pylist()
    assert rows == [
        {"id": "0", "offset": 0, "length": 3},
        {"id": "1", "offset": 3, "length": 1},
        {"id": "2", "offset": 4, "length": 4},
    ]


@pytest.mark.parametrize(("vocab_size", "width"), [(65_499, 2), (65_500, 4), (131_072, 4)])
def test_the_width_of_a_token_follows_the_vocabulary(tmp_path: Path, vocab_size: int, width: int) -> None:
    write(tmp_path / "a", [[vocab_size - 1]], vocab_size)
    assert (tmp_path / "a.bin").stat().st_size == width
    assert TokenShards(tmp_path / "a").read(0, 1).tolist() == [vocab_size - 1]


@pytest.mark.parametrize("wrong", [[1000], [-1], [3, 70_000]])
def test_a_token_outside_the_vocabulary_is_refused_and_leaves_nothing(tmp_path: Path, wrong: list[int]) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        write(tmp_path / "a", [[1, 2], wrong])
    assert list(tmp_path.iterdir()) == []


def test_broken_files_name_themselves(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with pytest.raises(UserError, match=r"a\.idx does not exist"):
        TokenShards(prefix)
    with pytest.raises(UserError, match="no tokens"):
        write(prefix, [[]])
    write(prefix, DOCUMENTS)
    index, tokens, mask = (tmp_path / f"a{end}" for end in (".idx", ".bin", ".mask.bin"))
    whole = index.read_bytes(), tokens.read_bytes(), mask.read_bytes()
    for broken, match in [(whole[0][:20], "cut short"), (whole[0][:-1], "cut short"), (b"x" * 90, "cut short")]:
        index.write_bytes(broken)
        with pytest.raises(UserError, match=match):
            TokenShards(prefix)
    index.write_bytes(whole[0][:9] + b"\2" + whole[0][10:])
    with pytest.raises(UserError, match="version 2"):
        TokenShards(prefix)
    index.write_bytes(whole[0])
    tokens.write_bytes(whole[1][:-2])
    with pytest.raises(UserError, match=r"a\.bin has 14 bytes, its \.idx says 16"):
        TokenShards(prefix)
    tokens.write_bytes(whole[1])
    mask.write_bytes(whole[2][:-1])
    with pytest.raises(UserError, match=r"a\.mask\.bin has 7 bytes for 8 tokens"):
        TokenShards(prefix)
    mask.unlink()
    assert TokenShards(prefix).learn(0, 8).all()
    tokens.unlink()
    with pytest.raises(UserError, match=r"a\.bin is missing"):
        TokenShards(prefix)
