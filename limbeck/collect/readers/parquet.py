"""Parquet files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from limbeck.collect.readers.row import Columns, Raw, columns, unreadable
from limbeck.collect.rows import Wrong, shown
from limbeck.recipe import FilePrompts


def read_parquet(source: FilePrompts, wanted: Columns) -> Iterator[Raw]:
    """A `Reader`. Only the columns that are wanted are read."""
    try:
        with pq.ParquetFile(source.path, pre_buffer=False) as file:
            names = columns(source, file.schema_arrow.names, wanted)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for index in range(batch.num_rows):
                    number += 1
                    yield Raw(f"{source.path}: row {number}", _parquet_row(batch, index))
    except (pa.ArrowException, OSError) as error:
        reason = shown(str(error).strip().split("\n")[0], 200)
        raise unreadable(
            source, f"not a Parquet file, or a damaged one ({reason})", "Parquet", "write it again"
        ) from None


def _parquet_row(batch: pa.RecordBatch, index: int) -> dict[str, JsonValue] | Wrong:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return Wrong(
            f"bytes that are not UTF-8 ({shown(error.object[error.start : error.end])})",
            "UTF-8 text",
            "write it as UTF-8",
        )
