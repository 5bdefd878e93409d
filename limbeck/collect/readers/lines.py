"""Lines of a file, which may be packed with gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from limbeck.collect.readers.row import unreadable
from limbeck.recipe import FilePrompts

PACKED = (".gz", ".zst")


def lines(source: FilePrompts) -> Iterator[str]:
    """Lines with their ends, a byte order mark left out; bytes that are not UTF-8 become lone surrogates.

    Raises `PromptError` where the file may not be read, or does not unpack.
    """
    try:
        with open_unpacked(source.path) as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").decode("utf-8", "surrogateescape")
    except PermissionError as error:
        raise unreadable(source, str(error.strerror), "a file that may be read", "check its permissions") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        kind = "gzip" if Path(source.path).suffix.lower() == ".gz" else "Zstandard"
        found = f"not packed with {kind}, cut off or damaged ({error})"
        raise unreadable(
            source, found, f"a whole {kind} file", "pack it again, or rename it if it is not packed"
        ) from None


def open_unpacked(path: str) -> BinaryIO:
    """The file's bytes as they were before they were packed, if its suffix says that they were."""
    match Path(path).suffix.lower():
        case ".gz":
            return cast("BinaryIO", gzip.open(path, "rb"))
        case ".zst":
            return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", _Zstandard(path)), 1 << 16))
        case _:
            return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """A packed file, unpacked. It may have several frames, as parallel tools write and `cat` makes. Unlike the
    library's own reader, which takes it for an end, it raises `EOFError` where the file ends inside a frame.
    """

    def __init__(self, path: str):
        self._file = open(path, "rb")  # noqa: SIM115 - closed with this
        self._unpacker = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = self._open = b""

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer) -> int:
        """See `io.RawIOBase`."""
        while not self._open and (packed := self._packed or self._file.read(1 << 16)):
            self._frame = self._frame or self._unpacker.decompressobj()
            self._open = self._frame.decompress(packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        if not self._open and self._frame is not None:
            raise EOFError("it ends inside a frame")
        part, self._open = self._open[: len(buffer)], self._open[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self._file.close()
        super().close()
