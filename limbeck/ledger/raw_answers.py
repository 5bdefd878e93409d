"""The journal as a verifier reads it: without writing, and without believing what it says of itself.

The file is opened here, not through `limbeck.collect.journal`, which may write to it. The layout is that of its first
version: a table `answers` with key, created, request and raw, the last two as zlib streams or zstd frames.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import zstandard

from limbeck.errors import Problem
from limbeck.ledger.canonical import digest_bytes, digest_json
from limbeck.ledger.exchanges import Call, Exchange, read_exchange, read_json
from limbeck.records import Completion

_ASKED = ("sample", "weights")
_SAID = ("text", "reasoning", "finish_reason", "model", "prompt_tokens", "completion_tokens", "batch")
"""What a completion takes over from a request and an answer."""
NAMED = ("answer_id", "fingerprint")
"""How the provider names an answer, and what gave it."""

_LONGEST = 2**26
"""Bytes of an answer, packed or not."""
_LONGEST_READ = 2**24
"""Bytes of a request and its answer that are read: as Python objects, JSON can take twenty times as many."""
_FIND = (
    "SELECT key, request, raw, response, created FROM answers NOT INDEXED "
    "WHERE rowid IN (SELECT rowid FROM answers WHERE key IN ({}))"
)
"""In the order in which they lie, and the key as the row has it: the index, through which it is found, has a copy."""
_ASK = 256
"""Keys in one question; SQLite's least limit on parameters is 999."""
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)

_REMEDY = "put back journal.db as the run wrote it; what the teacher said is nowhere else"


class RawAnswer(NamedTuple):
    """What was sent and what came back, as it lies in the journal."""

    key: str
    request: bytes
    raw: bytes
    response: str
    """The digest of the answer that was written down when it came."""
    created: str


class Expected(NamedTuple):
    """What a completion of plain text says of its request and of its raw answer."""

    request_id: str
    response: str
    created: int
    """Microseconds since 1970."""
    messages: list[dict[str, str]]
    sample: int
    weights: str | None
    text: str
    reasoning: str | None
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    batch: str | None
    answer_id: str | None
    fingerprint: str | None


class RawAnswers:
    """RUN/journal.db, open for reading. A context manager.

    Raises:
        OSError, sqlite3.DatabaseError, ValueError: it is not there, is no SQLite file, or one with other tables.

    """

    def __init__(self, path: Path):
        if path.is_symlink() or not path.is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        beside = path.with_name(path.name + "-wal")
        if path.with_name(path.name + "-journal").exists():
            raise ValueError("journal.db-journal beside it, which no journal leaves")
        if beside.is_symlink() or (beside.exists() and not beside.is_file()):
            raise ValueError("journal.db-wal is no file")
        if beside.exists() and not _looks_like_wal(beside):
            raise ValueError("journal.db-wal beside it, which SQLite did not write")
        if beside.exists() and beside.stat().st_size:
            # Whoever opens a file in WAL mode writes beside it, unless told that it rests, and this one does not.
            self._copy = tempfile.TemporaryDirectory(prefix="limbeck-journal-")
            path = Path(shutil.copy(path, Path(self._copy.name) / path.name))
            shutil.copy(beside, path.with_name(beside.name))
        rests = "ro&immutable=1" if self._copy is None else "rw"
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={rests}", uri=True, timeout=30)
        try:
            self._db.execute("PRAGMA trusted_schema = OFF")
            self._db.execute("PRAGMA cell_size_check = ON")
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            _refuse_other_tables(self._db)
        except BaseException:
            self.__exit__()
            raise
        self._unpacker = zstandard.ZstdDecompressor()
        self.named = True
        """Whether the completions have the columns `NAMED`; those of earlier versions do not, and that is no
        difference."""
        self.unread = self.unnamed = 0
        """Answers of a form that this version cannot read, of which digests were compared all the same; and those whose
        provider named them, where the completions have no column for it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        if self._copy is not None:
            self._copy.cleanup()

    def find(self, key: str) -> RawAnswer | None:
        """The answer journaled for a request. Raises `ValueError` where its bytes are damaged."""
        row = self._db.execute(_FIND.format("?"), (key,)).fetchone()
        if row is None:
            return None
        try:
            return RawAnswer(str(row[0]), self._unpacked(row[1]), self._unpacked(row[2]), str(row[3]), str(row[4]))
        except (zlib.error, zstandard.ZstdError, TypeError) as error:
            raise ValueError(f"what lies under {key} does not unpack ({error})") from None

    def agree(self, completions: Sequence[Expected]) -> bool:
        """Whether each of the completions says what its raw answer does: whether `differences` of none would tell any.
        Raises what SQLite and the unpackers raise for damaged bytes.
        """
        for first in range(0, len(completions), _ASK):
            asked = {one.request_id: one for one in completions[first : first + _ASK]}
            if len(asked) != len(completions[first : first + _ASK]):
                return False
            marks = ", ".join("?" * len(asked))
            for key, request, raw, response, created in self._db.execute(_FIND.format(marks), [*asked]):
                expected = asked.pop(key, None)
                if expected is None or response != expected.response or _micros(created) != expected.created:
                    return False
                if not self._says(expected, self._unpacked(request), self._unpacked(raw)):
                    return False
            if asked:
                return False
        return True

    def _says(self, expected: Expected, request: bytes, raw: bytes) -> bool:
        if f"sha256:{sha256(request).hexdigest()}" != expected.request_id:
            return False
        if f"sha256:{sha256(raw).hexdigest()}" != expected.response:
            return False
        found = read_exchange(request, raw) if len(request) + len(raw) <= _LONGEST_READ else None
        if found is None:
            self.unread += 1
            return True
        said = found.said
        return (
            said.text == expected.text
            and said.finish_reason == expected.finish_reason
            and said.model == expected.model
            and said.prompt_tokens == expected.prompt_tokens
            and said.completion_tokens == expected.completion_tokens
            and said.reasoning == expected.reasoning
            and said.batch == expected.batch
            and not said.calls
            and found.sample == expected.sample
            and found.weights == expected.weights
            and self._named(found, expected)
            and found.asks(expected.messages)
        )

    def _named(self, found: Exchange, expected: Expected | Completion) -> bool:
        """Whether the provider named the answer as a completion says, as far as that can say it."""
        if self.named:
            return found.answer_id == expected.answer_id and found.fingerprint == expected.fingerprint
        self.unnamed += found.answer_id is not None or found.fingerprint is not None
        return True

    def differences(self, where: str, completion: Completion) -> list[Problem]:
        """How a completion differs from the raw answer it was made from."""
        try:
            found = self.find(completion.request_id)
        except ValueError as error:
            return [Problem(f"journal.db, for {where}", str(error), "bytes as they were written", _REMEDY)]
        if found is None:
            return [Problem(f"journal.db, for {where}", "nothing", f"a request {completion.request_id}", _REMEDY)]
        pairs: list[tuple[str, object, object]] = [
            ("key", found.key, completion.request_id),
            ("digest of the response", found.response, completion.response),
            ("request", digest_bytes(found.request), completion.request_id),
            ("response", digest_bytes(found.raw), completion.response),
            ("created", _instant(found.created), completion.created),
            *self._read(found, completion),
        ]
        return [
            Problem(
                f"journal.db, for {where}: {what}",
                _shown(here),
                f"{_shown(there)}, as the completion says",
                _REMEDY,
            )
            for what, here, there in pairs
            if here != there
        ]

    def _unpacked(self, data: bytes) -> bytes:
        """A few packed bytes can stand for gigabytes; no answer of a teacher does. Raises `zlib.error` and
        `zstandard.ZstdError`, `TypeError` for what are no bytes.
        """
        if not isinstance(data, bytes):
            raise TypeError(f"a {type(data).__name__}, not bytes")
        if data.startswith(zstandard.FRAME_HEADER):
            if not 0 <= zstandard.frame_content_size(data) <= _LONGEST:
                raise zstandard.ZstdError("longer than any answer, or of unknown length")
            return self._unpacker.decompress(data, allow_extra_data=False)
        stream = zlib.decompressobj()
        found = stream.decompress(data, _LONGEST)
        if not stream.eof or stream.unused_data:
            raise zlib.error("cut off, followed by something, or longer than any answer")
        return found

    def _read(self, found: RawAnswer, completion: Completion) -> list[tuple[str, object, object]]:
        """What the bytes say, beside what the completion says; nothing for a form that is unknown here."""
        whole = len(found.request) + len(found.raw) <= _LONGEST_READ
        read = read_exchange(found.request, found.raw) if whole else None
        if read is None:
            self.unread += 1
            return []
        names = () if self._named(read, completion) else NAMED
        messages = [message.model_dump(mode="json") for message in completion.messages]
        calls = [call.model_dump(mode="json") for call in completion.tool_calls or ()]
        return [
            ("messages asked", messages if read.asks(messages) else read.messages, messages),
            *((f"{name} asked", getattr(read, name), getattr(completion, name)) for name in _ASKED),
            *((f"{name} answered", getattr(read.said, name), getattr(completion, name)) for name in _SAID),
            *((f"{name} answered", getattr(read, name), getattr(completion, name)) for name in names),
            ("tool_calls answered", [_as_call(*pair) for pair in zip_longest(read.said.calls, calls)], calls),
        ]


def _as_call(said: Call | None, there: dict[str, object] | None) -> object:
    """A call as the answer has it: with the completion's own text where its arguments are the same as an object."""
    if said is None:
        return "no call"
    arguments = said.arguments
    if (
        not isinstance(arguments, str)
        and there is not None
        and read_json(str(there["arguments"]).encode()) == arguments
    ):
        arguments = there["arguments"]
    return {"name": said.name, "arguments": arguments, "id": said.id}


_TABLES = frozenset(
    {
        "CREATE TABLE answers (key TEXT PRIMARY KEY NOT NULL, request BLOB NOT NULL, raw BLOB NOT NULL, "
        "response TEXT NOT NULL, created TEXT NOT NULL)",
        "CREATE TABLE refused (key TEXT NOT NULL, raw BLOB NOT NULL, response TEXT NOT NULL, created TEXT NOT NULL)",
        "CREATE TABLE sent (number INTEGER PRIMARY KEY NOT NULL, key TEXT NOT NULL, account TEXT NOT NULL, "
        "held INTEGER NOT NULL, cost INTEGER, outcome TEXT, started TEXT NOT NULL, ended TEXT)",
        "CREATE INDEX sent_open ON sent (number) WHERE outcome IS NULL",
        "CREATE TABLE batches (number INTEGER PRIMARY KEY NOT NULL, token TEXT NOT NULL UNIQUE, "
        "asked_of TEXT NOT NULL, rows INTEGER NOT NULL, intended TEXT NOT NULL, asked TEXT, name TEXT, ended TEXT, "
        "outcome TEXT)",
        "CREATE TABLE batch_rows (number INTEGER PRIMARY KEY NOT NULL, batch INTEGER NOT NULL, key TEXT NOT NULL, "
        "request BLOB NOT NULL)",
        "CREATE INDEX batch_rows_batch ON batch_rows (batch)",
        "CREATE INDEX batch_rows_key ON batch_rows (key)",
    }
)
"""What a journal of any version holds. Anything else, such as a view, could have SQLite compute without end."""


def _refuse_other_tables(db: sqlite3.Connection) -> None:
    """Raises `ValueError` for a database with other tables than a journal's, before anything of them is read."""
    found = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100")]
    if strange := sorted(str(sql)[:120] for sql in found if sql not in _TABLES):
        raise ValueError(f"holds what no journal does: {strange[0]}")
    if not any(str(sql).startswith("CREATE TABLE answers ") for sql in found):
        raise ValueError("holds no table of answers")


@lru_cache(maxsize=4096)
def _micros(text: str) -> int | None:
    """A journaled time as microseconds since 1970; None for one that a journal writes otherwise. Raises `ValueError`.
    Answers that were written together have the same.
    """
    when = _instant(text)
    return (when - _BEGINNING) // timedelta(microseconds=1) if isinstance(when, datetime) and when.tzinfo else None


def _instant(text: str) -> datetime | str:
    """The text itself where it is not as a journal writes it: Python reads one time in many spellings."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return when if when.isoformat(timespec="microseconds") == text else text


def _looks_like_wal(path: Path) -> bool:
    """Whether a file is empty or begins as SQLite's write-ahead logs do (sqlite.org/fileformat2.html, section 4.1)."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head in (b"", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 120 else f"{text[:100]} ... ({len(text)} characters, {digest_json(text)})"
