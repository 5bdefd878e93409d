"""What the pages of a Parquet file say of their size, read before any of them is unpacked.

pyarrow believes a page's header: a few bytes can name gigabytes to be unpacked, or billions of values that one
run-length code stands for. The header is a struct in Thrift's compact protocol (parquet.thrift, `PageHeader`); as much
of that is read here as its sizes take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

LONGEST_PAGE = 2**27
"""Bytes of a page, unpacked. Writers begin a new one after a hundredth of these."""
LONGEST_GROUP = 2**30
"""Bytes of the pages of a row group that are read, unpacked."""
MOST_VALUES = 2**26
"""Values of a column in a row group: of lists, a row can have all of them."""
LONGEST_FOOTER = 2**24
"""Bytes: a hundred for a column of a row group, so this is enough for tens of millions of rows."""
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


def dictionaries(path: Path, names: Collection[str]) -> dict[str, int]:
    """Bytes of the largest dictionary of each of these columns, unpacked, after a walk over the pages of all.

    Raises `ValueError` where a page, or what these columns have in a row group, is larger than is read, and where
    footer or headers are damaged.
    """
    told = path.stat()
    found: dict[str, int] = {}
    for number, group in enumerate(_groups(path, told.st_size, told.st_mtime_ns)):
        if (total := sum(size for name, (size, _) in group.items() if name in names)) > LONGEST_GROUP:
            raise ValueError(f"row group {number} has {total} bytes unpacked, more than are read")
        for name in group.keys() & set(names):
            found[name] = max(found.get(name, 0), group[name][1])
    return found


@lru_cache(maxsize=8)
def _groups(path: Path, size: int, _: int) -> tuple[dict[str, tuple[int, int]], ...]:
    """Of each row group, by column: bytes of the pages and of the dictionary. The footer is read here, since a damaged
    one ends the process that asks pyarrow for a column of it. Tables are read more than once, and this is asked once.
    """
    with open(path, "rb") as data:
        data.seek(max(0, size - 8))
        end = data.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or not 0 < length <= min(LONGEST_FOOTER, size - 12):
            raise ValueError(f"a footer of {length} bytes in a file of {size}, or no Parquet")
        data.seek(size - 8 - length)
        footer = _Compact(data.read(length)).struct(0)
        groups = footer.get(_GROUPS, [])
        if not isinstance(groups, list):
            raise ValueError("a footer without row groups")
        return tuple(_columns(data, size, group) for group in groups)


def _columns(data: BinaryIO, size: int, group: object) -> dict[str, tuple[int, int]]:
    columns = group.get(1) if isinstance(group, dict) else None
    if not isinstance(columns, list):
        raise ValueError("a row group without columns")
    found: dict[str, tuple[int, int]] = {}
    for column in columns:
        said = column.get(3) if isinstance(column, dict) else None
        path = said.get(3) if isinstance(said, dict) else None
        if not isinstance(said, dict) or not isinstance(path, list) or not path or not isinstance(path[0], bytes):
            raise ValueError("a column without a description")
        first, dictionary, packed = said.get(9), said.get(11), said.get(7)
        if not isinstance(first, int) or not isinstance(packed, int):
            raise ValueError("a column without a place")
        start = min(first, dictionary) if isinstance(dictionary, int) and dictionary > 0 else first
        if not 4 <= start <= start + packed <= size:
            raise ValueError(f"a column at bytes {start} to {start + packed} of {size}")
        name = path[0].decode()
        total, coded = _sizes(data, start, start + packed)
        before = found.get(name, (0, 0))
        found[name] = before[0] + total, max(before[1], coded)
    return found


_GROUPS = 4
"""The field of `FileMetaData`. In the others: `RowGroup.columns` 1, `ColumnChunk.meta_data` 3, and of `ColumnMetaData`
path_in_schema 3, total_compressed_size 7, data_page_offset 9, dictionary_page_offset 11.
"""


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
        """Fields by their number: integers, bytes, lists and structs."""
        if depth > _DEEPEST:
            raise ValueError("a header that is nested too deeply")
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
            length = self.varint()
            self.skip(length)
            return self.data[self.at - length : self.at]
        elif kind in (9, 10):
            head = self.byte()
            length = head >> 4 if head >> 4 < 15 else self.varint()
            if length > len(self.data):
                raise ValueError("a list without an end in a page's header")
            kind = head & 0x0F
            return [self.byte() if kind in (1, 2) else self.value(kind, depth + 1) for _ in range(length)]
        elif kind == 12:
            return self.struct(depth + 1)
        else:
            raise ValueError(f"a value of kind {kind} in a page's header")
        return None
