"""Hugging Face data sets, streamed: from the hub, or from a local directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue

from limbeck.collect.readers.row import Columns, Raw, columns, unreadable
from limbeck.collect.rows import shown
from limbeck.errors import PromptError
from limbeck.recipe import DatasetPrompts

if TYPE_CHECKING:
    from datasets import IterableDataset

_ROWS = 1024
"""Rows of a Parquet file that are read together."""


def read_dataset(source: DatasetPrompts, wanted: Columns) -> Iterator[Raw]:
    """A `Reader`. Nothing is downloaded but the rows that are read, a piece at a time, and no code of a data set is
    run.
    """
    if find_spec("datasets") is None:
        found, remedy = "this Python is without datasets", "pip install 'limbeck[datasets]', or use a file"
        raise unreadable(source, found, "the package that reads data sets", remedy)
    with _without_torch():
        rows = _open(source)
        if rows.column_names is not None:
            rows = rows.select_columns(columns(source, rows.column_names, wanted))
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield Raw(f"{source.name}: row {number}", cast("dict[str, JsonValue]", row))
    except PromptError:
        raise
    except _errors() as error:
        found = f"after row {number}: {_first_line(error)}"
        raise unreadable(source, found, "rows to its end", "run the same command again, or take a file") from None


@contextmanager
def _without_torch() -> Iterator[None]:
    """Lets `datasets` make a data set without loading torch, 180 MiB, for a loader that is not used here."""
    from datasets import config

    before = config.TORCH_AVAILABLE
    config.TORCH_AVAILABLE = before and "torch" in sys.modules
    try:
        yield
    finally:
        config.TORCH_AVAILABLE = before


def _open(source: DatasetPrompts) -> IterableDataset:
    import datasets

    try:
        if (Path(source.path) / "dataset_info.json").is_file() or (Path(source.path) / "dataset_dict.json").is_file():
            return _saved(source)
        found = datasets.load_dataset_builder(
            source.path, source.config, revision=source.revision, data_files=list(source.data_files) or None
        )
        _read_little(found.config)
        rows = cast("IterableDataset", found.as_streaming_dataset(split=source.split))
        # A file of Parquet is decoded whole, or by row groups. Counting these opens every file, also for a few rows.
        return rows if source.limit is not None and not Path(source.path).exists() else rows.reshard()
    except PromptError:
        raise
    except _errors() as error:
        raise _not_opened(source, error) from None


def _read_little(config: object) -> None:
    """Has Parquet read a few rows at a time, and keep nothing of what was read."""
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from pyarrow.dataset import ParquetFragmentScanOptions

    if isinstance(config, ParquetConfig):
        config.batch_size = _ROWS
        config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)


def _saved(source: DatasetPrompts) -> IterableDataset:
    """What `save_to_disk` wrote, memory-mapped."""
    import datasets

    found = datasets.load_from_disk(source.path)
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            there = f"splits {', '.join(map(str, found))}"
            raise unreadable(source, there, f"a split {source.split}", "name one of them with `split:`")
        found = found[source.split]
    return found.to_iterable_dataset()


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises of its own accord: for what it cannot find, read or understand."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    return (DatasetsError, HfHubHTTPError, pa.ArrowException, OSError, ValueError, KeyError, RuntimeError)


def _not_opened(source: DatasetPrompts, error: Exception) -> PromptError:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") or isinstance(error, ConnectionError)
    if offline or "offline" in str(error).lower() or "couldn't reach" in str(error).lower():
        found = f"the hub cannot be reached ({_first_line(error)})"
        remedy = "fetch it where there is a network and give `path:` of the directory; or use a file"
        return unreadable(source, found, "a data set on the hub, or a local directory", remedy)
    remedy = "check path, config, split, revision and data_files of the source"
    return unreadable(source, _first_line(error), "a data set that can be opened", remedy)


def _first_line(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {str(error).strip() or 'no more said'}".split("\n")[0], 300)
