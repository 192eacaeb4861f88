"""Packed rows against a slow obvious reference: every token once an epoch, targets inside documents only."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.data import shards
from whimbrel.data.pack import IGNORE, Source, WholeDocuments, Windows
from whimbrel.data.shards import Tokens, TokenShards
from whimbrel.errors import UserError

# Every token of a case is another number, so that a token names its place; the mask is learned at random.
CASES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**32)), min_size=1, max_size=8).filter(
    lambda case: any(size for size, _ in case)
)


def make(folder: Path, case: list[tuple[int, int]]) -> tuple[TokenShards, dict[int, int], list[list[int]]]:
    """A shard, the target that each of its tokens should have, and the documents."""
    documents, rows, targets, token = [], [], {}, 0
    for size, bits in case:
        ids = list(range(token, token + size))
        learn = [bits >> i & 1 for i in range(size)]
        for i, number in enumerate(ids):
            targets[number] = ids[i + 1] if i + 1 < size and learn[i + 1] else IGNORE
        documents.append(ids)
        rows.append(Tokens(ids, learn, {"id": "x"}))
        token += size
    shards.write(folder / "a", rows, 1000)
    return TokenShards(folder / "a"), targets, documents


@settings(max_examples=60, deadline=None)
@given(case=CASES, length=st.integers(1, 12), seed=st.integers(0, 99), rows=st.integers(1, 3), epoch=st.integers(0, 3))
def test_windows(
    tmp_path_factory: pytest.TempPathFactory, case: list[tuple[int, int]], length: int, seed: int, rows: int, epoch: int
) -> None:
    tokens, targets, documents = make(tmp_path_factory.mktemp("pack"), case)
    windows = Windows(tokens, length, seed)
    seen: Counter[int] = Counter()
    where = {token: d for d, ids in enumerate(documents) for token in ids}
    for index in range(epoch * windows.count, (epoch + 1) * windows.count):
        row = windows.row(index)
        seen.update(row.tokens_T.tolist())
        assert row.targets_T.tolist() == [targets[token] for token in row.tokens_T.tolist()]
        assert sum(row.lengths) == len(row.tokens_T) <= length and min(row.lengths) > 0
        pieces = np.split(row.tokens_T, np.cumsum(row.lengths)[:-1])
        owners = [{where[token] for token in piece.tolist()} for piece in pieces]
        assert all(len(owner) == 1 for owner in owners)  # a piece is of one document,
        assert all(a != b for a, b in pairwise(owners))  # the next one of another
    assert seen == Counter({token: 1 for token in targets})
    start = epoch * windows.count
    assert windows.tokens_between(start, start + windows.count) == tokens.tokens
    source = Source(windows, rows)
    batch, again = source.batch(epoch), Source(Windows(tokens, length, seed), rows).batch(epoch)
    together = [windows.row(index) for index in range(epoch * rows, (epoch + 1) * rows)]
    assert batch.tokens_T.tolist() == again.tokens_T.tolist() == [t for row in together for t in row.tokens_T.tolist()]
    assert batch.targets_T.tolist() == [t for row in together for t in row.targets_T.tolist()]
    assert batch.lengths == tuple(n for row in together for n in row.lengths) and batch.step == epoch
    assert windows.tokens_between(epoch * rows, (epoch + 1) * rows) == len(batch.tokens_T)


def test_the_last_token_of_a_window_learns_the_first_of_the_next(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path, [(6, 0b111111), (3, 0b111)])
    windows = Windows(tokens, 4, seed=0)
    by_start = {int(row.tokens_T[0]): row for row in map(windows.row, range(windows.count))}
    assert by_start[0].targets_T.tolist() == [1, 2, 3, 4]  # 4 stands in the next window, in the same document
    assert by_start[4].targets_T.tolist() == [5, IGNORE, 7, 8] and by_start[4].lengths == (2, 2)
    assert by_start[8].targets_T.tolist() == [IGNORE] and by_start[8].lengths == (1,)


def test_a_masked_token_is_no_target_but_is_read(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path, [(5, 0b10011)])
    row = Windows(tokens, 5, seed=0).row(0)
    assert row.tokens_T.tolist() == [0, 1, 2, 3, 4]
    assert row.targets_T.tolist() == [1, IGNORE, IGNORE, 4, IGNORE]


def test_a_window_ends_where_a_document_ends(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path, [(4, 0b1111), (4, 0b1111)])
    rows = sorted((Windows(tokens, 4, seed=1).row(i) for i in range(2)), key=lambda row: int(row.tokens_T[0]))
    assert [row.targets_T.tolist() for row in rows] == [[1, 2, 3, IGNORE], [5, 6, 7, IGNORE]]
    assert [row.lengths for row in rows] == [(4,), (4,)]


@settings(max_examples=60, deadline=None)
@given(case=CASES, room=st.integers(0, 12), seed=st.integers(0, 99))
def test_whole_documents(
    tmp_path_factory: pytest.TempPathFactory, case: list[tuple[int, int]], room: int, seed: int
) -> None:
    tokens, targets, documents = make(tmp_path_factory.mktemp("pack"), case)
    length = max(map(len, documents)) + room
    rows = WholeDocuments(tokens, length, seed)
    packed = [rows.row(index) for index in range(rows.count)]
    pieces = [piece.tolist() for row in packed for piece in np.split(row.tokens_T, np.cumsum(row.lengths)[:-1])]
    assert sorted(pieces) == [ids for ids in documents if ids]
    assert all(len(row.tokens_T) <= length for row in packed)
    for row in packed:
        assert row.targets_T.tolist() == [targets[token] for token in row.tokens_T.tolist()]
    # Best fit never opens a row while another has room: no two rows could be one.
    sizes = sorted(len(row.tokens_T) for row in packed)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > length
    assert rows.tokens_between(0, rows.count) == tokens.tokens
    assert rows.tokens_between(1, 3) == sum(len(rows.row(i).tokens_T) for i in (1, 2))


def test_what_cannot_be_packed_says_what_would_work(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path, [(6, 0), (2, 0)])
    with pytest.raises(UserError, match="longest document has 6 tokens; set length"):
        WholeDocuments(tokens, 5, seed=0)
    with pytest.raises(UserError, match="length is 0; set it to 1"):
        Windows(tokens, 0, seed=0)
    with pytest.raises(UserError, match="batch_rows is 0; set it to 1"):
        Source(Windows(tokens, 4, seed=0), 0)
