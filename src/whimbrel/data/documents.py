"""Documents as parquet, one row each, and beside them one row for each page that was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from whimbrel.errors import UserError, need
from whimbrel.files import atomic_write

DOCUMENTS = {
    "id": "string",  # digest of the normal form: equal texts have equal ids
    "text": "string",
    "source": "string",  # the archive or folder it came from
    "url": "string",
    "date": "string",
    "language": "string",
    "language_score": "float32",
    "license": "string",
    "quality": "float32",  # null until a classifier has spoken
    "characters": "int32",
}
DROPPED = {
    "url": "string",
    "source": "string",
    "reason": "string",  # the measure or step that decided
    "figure": "float64",
    "detail": "string",  # the limit
    "id": "string",  # a duplicate has the id of the text before it
    "language": "string",
    "characters": "int32",
}
BATCH = 256  # rows of a row group


def schema(columns: dict[str, str]) -> Any:
    """The Arrow schema of a table of columns."""
    pa = need("pyarrow", "data")
    return pa.schema([(name, getattr(pa, kind)()) for name, kind in columns.items()])


class Writer:
    """Rows into an open parquet file, BATCH to a row group: the same rows give the same bytes."""

    def __init__(self, file: Any, columns: dict[str, str]) -> None:
        parquet = need("pyarrow.parquet", "data")
        self.columns = columns
        self.schema = schema(columns)
        self.rows: list[dict[str, Any]] = []
        self.count = 0
        self._parquet = parquet.ParquetWriter(file, self.schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        """One row; columns it does not have are null, keys that are no columns are left out."""
        self.rows.append({name: row.get(name) for name in self.columns})
        self.count += 1
        if len(self.rows) == BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left and end the file."""
        self._flush()
        self._parquet.close()

    def abandon(self) -> None:
        """Close without the rows that are still in memory."""
        self._parquet.close()

    def _flush(self) -> None:
        if self.rows:
            self._parquet.write_table(need("pyarrow", "data").Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


@contextmanager
def writing(path: Path, columns: dict[str, str]) -> Iterator[Writer]:
    """A Writer whose file appears when the block ends without an error."""
    with atomic_write(path, "wb") as file:
        writer = Writer(file, columns)
        try:
            yield writer
            writer.close()
        except BaseException:
            with suppress(OSError):  # the first error counts; the file is taken away
                writer.abandon()
            raise


def read(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file in order, a row group in memory at a time. A folder stands for its documents.parquet."""
    parquet, pa = need("pyarrow.parquet", "data"), need("pyarrow", "data")
    path = path / "documents.parquet" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist; name the folder that the data stage wrote")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read as documents ({str(error).splitlines()[0]}); write it again") from None
