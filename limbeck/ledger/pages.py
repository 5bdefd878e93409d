"""What the pages of a Parquet file say of their size, read before any of them is unpacked.

pyarrow believes a page's header: a few bytes can name gigabytes to be unpacked, or billions of values that one
run-length code stands for. The header is a struct in Thrift's compact protocol (parquet.thrift, `PageHeader`); as much
of that is read here as its sizes take.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import pyarrow.parquet as pq

LONGEST_PAGE = 2**27
"""Bytes of a page, unpacked. Writers begin a new one after a hundredth of these."""
LONGEST_GROUP = 2**30
"""Bytes of the pages of a row group that are read, unpacked."""
MOST_VALUES = 2**26
"""Values of a column in a row group: of lists, a row can have all of them."""
_HEADER = 2**16
_ENCODING = {5: 2, 7: 2, 8: 4}
"""Field of `PageHeader` that describes a page of data, a dictionary or a page of data of version 2, and in it the
number of the field that says how values are encoded. How many there are is in its first.
"""
_DICTIONARY = 7
_PLAIN = (0, 2, 3, 8)
"""Plain, dictionary and run-length: what limbeck's own tables have. Others let one value share the bytes of another."""
_DEEPEST = 16


class _Page(NamedTuple):
    kind: int
    length: int
    """Bytes, unpacked."""
    values: int
    encoding: int


def dictionaries(file: pq.ParquetFile, path: str | os.PathLike[str], names: Collection[str]) -> dict[str, int]:
    """Bytes of the largest dictionary of each of these columns, unpacked, after a walk over all their pages.

    Raises `ValueError` where a page, or all of a row group together, is larger than is read, and where headers are
    damaged.
    """
    found: dict[str, int] = {}
    size = os.path.getsize(path)
    with open(path, "rb") as data:
        for number in range(file.num_row_groups):
            group, total = file.metadata.row_group(number), 0
            for column in map(group.column, range(group.num_columns)):
                name = column.path_in_schema.split(".")[0]
                if name not in names:
                    continue
                first = column.dictionary_page_offset
                start = column.data_page_offset if first is None else min(first, column.data_page_offset)
                end = start + column.total_compressed_size
                if not 4 <= start <= end <= size:
                    raise ValueError(f"a column at bytes {start} to {end} of {size}")
                length, dictionary = _sizes(data, start, end)
                total += length
                found[name] = max(found.get(name, 0), dictionary)
            if total > LONGEST_GROUP:
                raise ValueError(f"row group {number} has {total} bytes unpacked, more than are read")
    return found


def _sizes(data: BinaryIO, start: int, end: int) -> tuple[int, int]:
    """Bytes of the pages of a column, unpacked, and those of its dictionary."""
    total = dictionary = values = 0
    for page in _pages(data, start, end):
        total += page.length
        if page.kind == _DICTIONARY:
            dictionary += page.length
        else:
            values += page.values
        if not 0 <= page.length <= LONGEST_PAGE or not 0 <= values <= MOST_VALUES:
            raise ValueError(f"a page of {page.length} bytes and a column of {values} values, more than are read")
        if page.encoding not in _PLAIN:
            raise ValueError(f"a page of the encoding {page.encoding}, which no table of a run has")
    return total, dictionary


def _pages(data: BinaryIO, start: int, end: int) -> Iterator[_Page]:
    while start < end:
        data.seek(start)
        reader = _Compact(data.read(min(_HEADER, end - start)))
        header = reader.struct(0)
        kind = next((number for number in _ENCODING if number in header), 0)
        length, packed, told = header.get(2), header.get(3), header.get(kind)
        if not isinstance(told, dict):
            raise ValueError("a page of a kind that no table of a run has")
        values, encoding = told.get(1), told.get(_ENCODING[kind])
        if not all(isinstance(one, int) and one >= 0 for one in (length, packed, values, encoding)):
            raise ValueError("a page's header without its sizes")
        yield _Page(kind, int(str(length)), int(str(values)), int(str(encoding)))
        start += reader.at + int(str(packed))


class _Compact:
    """Thrift's compact protocol, as far as headers need it."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("a page's header that is cut off")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number without an end in a page's header")

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, length: int) -> None:
        if length > len(self.data) - self.at:
            raise ValueError("a page's header that is cut off")
        self.at += length

    def struct(self, depth: int) -> dict[int, object]:
        """Fields by their number: integers and structs; of others only that they are there."""
        if depth > _DEEPEST:
            raise ValueError("a page's header that is nested too deeply")
        found: dict[int, object] = {}
        field = 0
        while kind := self.byte():
            field = field + (kind >> 4) if kind >> 4 else self.integer()
            found[field] = self.value(kind & 0x0F, depth)
        return found

    def value(self, kind: int, depth: int) -> object:
        if kind in (1, 2):  # true and false, within the kind
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 7:
            self.skip(8)
        elif kind == 8:
            self.skip(self.varint())
        elif kind in (9, 10):
            head = self.byte()
            length = head >> 4 if head >> 4 < 15 else self.varint()
            if length > len(self.data):
                raise ValueError("a list without an end in a page's header")
            for _ in range(length):
                self.value(head & 0x0F, depth + 1) if head & 0x0F not in (1, 2) else self.byte()
        elif kind == 12:
            return self.struct(depth + 1)
        else:
            raise ValueError(f"a value of kind {kind} in a page's header")
        return None
