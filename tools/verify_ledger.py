"""A second verifier of limbeck's evidence, in one file that needs Python 3.11 and nothing else.

    python tools/verify_ledger.py RUN                     recompute the ledger of a RUN directory
    python tools/verify_ledger.py PROOF.json [...]        check what somebody handed over: a disclosure, a share,
                                                          a spot-check (give its share too), a consistency proof,
                                                          a checkpoint

    --key KEY           64 hexadecimal digits: everything has to be signed by this key
    --head DIGEST       a head digest noted down earlier: the ledger still has to hold it
    --checkpoint FILE   a checkpoint that was kept elsewhere: the ledger has to continue it

Exit code 0: nothing differs; 1: something does, all of it listed, sorted; 2: not something that can be read, and why.

It was written from docs/ledger-format.md alone and shares no line with limbeck, so that an error in one of the two
verifiers shows. Signatures are checked where the package `cryptography` is installed, else they are said to be
unchecked. Parquet and the journal are not read: that values and records are true to the leaves, only
`limbeck ledger verify` can say.

Nothing that is read is believed. No file is written, no link followed, nothing outside of RUN opened. The database is
opened read-only and immutable, after its schema was compared; memory is bounded by the limits below.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import hashlib
import itertools
import json
import os
import re
import sqlite3
import stat
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple, NoReturn, TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Object: TypeAlias = "dict[str, Json]"

MAX_DOCUMENT = 1 << 28
"""Bytes of a proof: a share of a million rows has about 1.2 * 10^8."""
MAX_BODY = 1 << 24
"""Bytes of one value in the database."""
MAX_HELD = 1 << 28
"""Bytes of the entries whose paths are kept for later comparisons."""
MAX_RECIPE = 1 << 18
MAX_DEPTH = 64
"""Lists and objects within each other."""
MAX_FILES = 200_000
"""Files of one directory."""
MAX_DRAWS = 1_000_000
MAX_DIFFERENCES = 10_000
MAX_INTEGER = (1 << 53) - 1

TAGGED = re.compile(r"sha256:[0-9a-f]{64}")
HEX_32 = re.compile(r"[0-9a-f]{64}")
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
MICROSECONDS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
SECONDS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)

FIELDS = (
    "completion",
    "created",
    "example",
    "gate",
    "model",
    "parents",
    "prompt",
    "provider",
    "request",
    "response",
    "route",
    "sampling",
    "teacher",
    "terms",
    "weights",
    "writers",
)
EXAMPLE = {1: b"\x01", 2: b"\x03"}
"""What the data of an example's leaf begins with, by the version of the leaf."""
ENTRY_KEYS = {
    *("version", "index", "stage", "started", "finished", "inputs", "outputs", "recipe", "facts"),
    *("limbeck", "commit", "dirty", "previous"),
}
KINDS = ("collection-closed", "training-intended", "training-done", "by-hand")
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
CHECKPOINT, NOTE = "urn:x-limbeck:checkpoint:1", "urn:x-limbeck:note:1"
GATE, WAIVER = "urn:x-limbeck:gate:1", "urn:x-limbeck:waiver:1"
GATE_KEYS = {"at", "count", "recipe", "rows", "rulings", "use", "verdict", "waivers"}
WAIVER_KEYS = {"at", "by", "expires", "reason", "terms", "use"}
USE = {
    "distribution": ("internal", "hosted", "public-weights"),
    "purpose": ("general-assistant", "task-specific", "classifier", "research"),
    "commercial": (True, False),
}
WEIGHTS = (".safetensors", ".bin", ".gguf")
NO_EVIDENCE = {"recipe.yaml", ".lock", "ledger.db", "journal.db"} | {
    f"{name}{end}" for name in ("ledger.db", "journal.db") for end in ("-journal", "-wal", "-shm", "-lock")
}
"""Files of RUN of which no entry speaks: SQLite keeps some beside a database, and locks are held by others."""
NOT_ASKED = (
    "no example says what the terms gate decided, since it rules on the whole set after that was sealed: its "
    "decision stands in the next entry of the stage gate (`limbeck ledger log RUN`), bound to this set's root"
)
"""What `not asked` means as the value of the field `gate`."""


class UnreadableError(Exception):
    """What was given is not something this verifier can read. Exit code 2."""


class WrongError(Exception):
    """One thing differs so that what hangs on it cannot be looked at."""

    def __init__(self, place: str, found: object, expected: object):
        super().__init__(place)
        self.place, self.found, self.expected = place, found, expected


class MisshapenError(WrongError):
    """Not of the form that docs/ledger-format.md gives it, so that nothing can be said of what it holds."""


class Difference(NamedTuple):
    """Where, what was found, and what was expected."""

    place: str
    found: str
    expected: str


class Findings:
    """All differences, and the notes on what was not checked."""

    def __init__(self) -> None:
        self.differences: list[Difference] = []
        self.notes: list[str] = []

    def add(self, place: str, found: object, expected: object) -> None:
        """One more difference. Raises `UnreadableError` where there are too many to list."""
        if len(self.differences) == MAX_DIFFERENCES:
            raise UnreadableError(f"more than {MAX_DIFFERENCES} differences")
        self.differences.append(Difference(printable(place), told(found), told(expected)))

    def compare(self, place: str, found: object, expected: object) -> bool:
        """Whether both are the same, of the same type; a difference where they are not."""
        if type(found) is type(expected) and found == expected:
            return True
        self.add(place, found, expected)
        return False

    def note(self, text: str) -> None:
        """Something to be said once."""
        if printable(text) not in self.notes:
            self.notes.append(printable(text))

    def attempt(self, check: Callable[[], None], within: str = "") -> None:
        """Does a check; where it cannot be done to its end, the reason becomes a difference."""
        try:
            check()
        except WrongError as wrong:
            place = wrong.place if wrong.place.startswith(within) else within + wrong.place
            self.add(place, wrong.found, wrong.expected)

    def sorted(self) -> list[Difference]:
        """Every difference once, by its place; numbers in places count as numbers."""
        return sorted(set(self.differences), key=lambda d: (re.sub(r"\d+", lambda m: m[0].zfill(20), d.place), d))


def printable(text: str) -> str:
    """Text of a stranger, without what could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def told(value: object) -> str:
    """A value on one line, cut where it is long."""
    if isinstance(value, bytes):
        value = value.hex()
    text = printable(value) if isinstance(value, str) else printable(ascii(value)[:400])
    return text if len(text) <= 200 else f"{text[:190]}... ({len(text)} characters)"


# ---------------------------------------------------------------- JSON, strictly, and RFC 8785


def read_json(data: bytes, place: str) -> Json:
    """The value of a JSON text. No key twice, no NaN, no integer from 2^53 on, no lone surrogate, no deep nesting."""

    def unique(pairs: list[tuple[str, Json]]) -> Object:
        keys: Object = {}
        for key, value in pairs:
            if key in keys:
                raise MisshapenError(place, f"key {key!r} twice", "every key once")
            keys[key] = value
        return keys

    def integer(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
            raise MisshapenError(place, digits[:40], "an integer below 2^53")
        return int(digits)

    def constant(name: str) -> NoReturn:
        raise MisshapenError(place, name, "a number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except RecursionError:
        raise MisshapenError(place, "nested too deeply", f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:  # of UTF-8 too
        raise MisshapenError(place, f"no JSON: {error}", "canonical JSON") from None
    return value


def canonical(value: Json, place: str) -> bytes:
    """RFC 8785: keys sorted by UTF-16 code units, numbers as ECMAScript writes them, UTF-8."""
    parts: list[str] = []
    _write(value, parts, 0, place)
    try:
        return "".join(parts).encode()
    except UnicodeEncodeError:
        raise MisshapenError(place, "half of a surrogate pair", "Unicode text") from None


def _write(value: Json, parts: list[str], depth: int, place: str) -> None:
    if depth == MAX_DEPTH and isinstance(value, list | dict):
        raise MisshapenError(place, "nested too deeply", f"at most {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str):
        parts.append(json.dumps(value, ensure_ascii=False))
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise MisshapenError(place, value, "an integer below 2^53")
        parts.append(str(value))
    elif isinstance(value, float):
        parts.append(number(value, place))
    elif isinstance(value, list):
        # Columns of a share: one text instead of a million.
        if all(type(item) is int and abs(item) <= MAX_INTEGER for item in value):
            parts.append("[" + ",".join(map(str, value)) + "]")
            return
        for at, item in enumerate(value):
            parts.append("," if at else "[")
            _write(item, parts, depth + 1, place)
        parts.append("]")
    else:
        order = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        for at, key in enumerate(order):
            parts.append(("," if at else "{") + json.dumps(key, ensure_ascii=False) + ":")
            _write(value[key], parts, depth + 1, place)
        parts.append("}" if order else "{}")


def number(value: float, place: str) -> str:
    """ECMAScript's Number::toString (ECMA-262, 6.1.6.1.20) from the shortest digits, which are Python's too."""
    if value != value or value in (float("inf"), float("-inf")):
        raise MisshapenError(place, value, "a finite number")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    all_digits = whole + fraction
    digits = all_digits.lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(all_digits) - len(digits))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return sign + digits[:point] + "." + digits[point:]
    if -6 < point <= 0:
        return sign + "0." + "0" * -point + digits
    power = f"e{point - 1:+d}"
    return sign + digits[0] + ("." + digits[1:] if len(digits) > 1 else "") + power


def read_canonical(data: bytes, place: str) -> Json:
    """The value of a text that has to be its own canonical form."""
    value = read_json(data, place)
    form = canonical(value, place)
    if form != data:
        at = next((i for i, (a, b) in enumerate(zip(data, form, strict=False)) if a != b), min(len(data), len(form)))
        show = slice(max(0, at - 10), at + 30)
        raise MisshapenError(f"{place}: byte {at}", ascii(data[show])[1:], f"canonical {ascii(form[show])[1:]}")
    return value


# ---------------------------------------------------------------- shapes


def an_object(value: Json, keys: set[str], place: str) -> Object:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        raise MisshapenError(place, value, "an object")
    if set(value) != keys:
        raise MisshapenError(place, f"keys {sorted(value)}", f"keys {sorted(keys)}")
    return value


def a_list(value: Json, place: str) -> list[Json]:
    """A list."""
    if not isinstance(value, list):
        raise MisshapenError(place, value, "a list")
    return value


def text(value: Json, place: str, pattern: re.Pattern[str] | None = None) -> str:
    """Text, of a form where one is given."""
    if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
        raise MisshapenError(place, value, f"text of the form {pattern.pattern}" if pattern else "text")
    return value


def whole(value: Json, place: str, least: int = 0, most: int = MAX_INTEGER) -> int:
    """An integer; `true` is none."""
    if type(value) is not int or not least <= value <= most:
        raise MisshapenError(place, value, f"an integer from {least} to {most}")
    return value


def moment(value: Json, place: str, pattern: re.Pattern[str]) -> str:
    """Text that names a day and time of the calendar."""
    found = text(value, place, pattern)
    try:
        datetime.fromisoformat(found)
    except ValueError:
        raise MisshapenError(place, found, "a day and time that exist") from None
    return found


def from_base64(value: Json, place: str, length: int | None = None) -> bytes:
    """RFC 4648 section 4, in the one form that encoding gives."""
    found = text(value, place)
    try:
        data = base64.b64decode(found.encode("ascii"), validate=True)
    except ValueError:
        raise MisshapenError(place, found, "base64") from None
    if base64.b64encode(data).decode() != found:
        raise MisshapenError(place, found, "base64 with padding and no spare bits")
    if length is not None and len(data) != length:
        raise MisshapenError(place, f"{len(data)} bytes", f"{length} bytes")
    return data


def digests(value: Json, place: str) -> Object:
    """An object of tagged digests."""
    if not isinstance(value, dict):
        raise MisshapenError(place, value, "an object")
    for name, digest in value.items():
        text(digest, f"{place}: {name}", TAGGED)
    return value


# ---------------------------------------------------------------- hashes and trees


def sha256(*parts: bytes) -> bytes:
    """32 bytes: the hash of the parts, one after the other."""
    return hashlib.sha256(b"".join(parts)).digest()


def tagged(data: bytes) -> str:
    """A tagged digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def leaf_hash(data: bytes) -> bytes:
    """A leaf of the tree."""
    return sha256(b"\x00", data)


def node_hash(left: bytes, right: bytes) -> bytes:
    """A node of the tree."""
    return sha256(b"\x01", left, right)


def field_node(left: bytes, right: bytes) -> bytes:
    """A node over the fields of an example."""
    return sha256(b"\x03", left, right)


def example_leaf(private: bytes, share: bytes, version: int) -> bytes:
    """The leaf of an example, from P and S."""
    return leaf_hash(EXAMPLE[version] + private + share)


def field_digest(name: str, salt: bytes, value: Json) -> bytes:
    """F(name, salt, value)."""
    return sha256(b"\x02", salt, bytes([len(name)]), name.encode("ascii"), canonical(value, name))


class Tree:
    """A Merkle tree that is only ever appended to: the roots of its whole subtrees, from the largest on."""

    def __init__(self) -> None:
        self.size = 0
        self.whole: list[bytes] = []
        self.subtrees: dict[tuple[int, int], bytes] = {}

    def push(self, leaf: bytes) -> None:
        """Appends a leaf hash."""
        place, height = self.size, 0
        while place & 1:
            leaf, place, height = node_hash(self.whole.pop(), leaf), place >> 1, height + 1
            if height % 8 == 0:
                self.subtrees[height // 8, place] = leaf
        self.whole.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """The root over all leaves so far."""
        if not self.whole:
            return sha256()
        root = self.whole[-1]
        for left in reversed(self.whole[:-1]):
            root = node_hash(left, root)
        return root


def root_of_path(
    leaf: bytes, index: int, size: int, path: list[bytes], place: str, node: Callable[[bytes, bytes], bytes] = node_hash
) -> bytes:
    """RFC 9162, section 2.1.3.2."""
    first, last = index, size - 1
    for sibling in path:
        if last == 0:
            raise WrongError(place, f"{len(path)} digests", "as many as the audit path has")
        if first & 1 or first == last:
            leaf = node(sibling, leaf)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            leaf = node(leaf, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise WrongError(place, f"{len(path)} digests", "as many as the audit path has")
    return leaf


def check_consistent(old: tuple[int, bytes], new: tuple[int, bytes], path: list[bytes], findings: Findings) -> None:
    """RFC 9162, section 2.1.4.2."""
    (old_size, old_root), (new_size, new_root) = old, new
    if old_size > new_size:
        raise WrongError("new: size", new_size, f"at least {old_size}, the old one's")
    if old_size in (0, new_size):
        findings.compare("path", len(path), 0)
        findings.compare("old: root", old_root.hex(), (new_root if old_size else sha256()).hex())
        return
    if old_size & (old_size - 1) == 0:
        path = [old_root, *path]
    if not path:
        raise WrongError("path", "no digests", "a consistency proof")
    first, last = old_size - 1, new_size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    older = newer = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise WrongError("path", f"{len(path)} digests", "as many as the proof has")
        if first & 1 or first == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise WrongError("path", f"{len(path)} digests", "as many as the proof has")
    findings.compare("path: root of the old one", older.hex(), old_root.hex())
    findings.compare("path: root of the new one", newer.hex(), new_root.hex())


# ---------------------------------------------------------------- signatures


def has_signed(key: bytes, signature: bytes, message: bytes) -> bool | None:
    """Whether an Ed25519 signature holds; None where nothing here can tell."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Statement(NamedTuple):
    """What was signed, its shape checked."""

    predicate: Object
    root: bytes
    size: int
    subjects: list[tuple[str, str]]
    """Name and hex of the digest of every subject after the ledger."""
    keyid: str


def read_envelope(envelope: Json, kind: str, key: str | None, findings: Findings, place: str) -> Statement:
    """A DSSE envelope of one in-toto statement of this predicateType. Says what is wrong with signature and key."""
    parts = an_object(envelope, {"payload", "payloadType", "signatures"}, place)
    if parts["payloadType"] != PAYLOAD_TYPE:
        raise MisshapenError(f"{place}: payloadType", parts["payloadType"], PAYLOAD_TYPE)
    signatures = a_list(parts["signatures"], f"{place}: signatures")
    if len(signatures) != 1:
        raise MisshapenError(f"{place}: signatures", len(signatures), 1)
    one = an_object(signatures[0], {"keyid", "sig"}, f"{place}: signatures")
    payload = from_base64(parts["payload"], f"{place}: payload")
    check_signature(one["keyid"], one["sig"], payload, key, findings, place)
    return read_statement(read_canonical(payload, f"{place}: payload"), kind, str(one["keyid"]), f"{place}: payload")


def check_signature(
    keyid: Json, signature: Json, payload: bytes, key: str | None, findings: Findings, place: str
) -> None:
    """The signature over DSSE's pre-authentication encoding, and whether it is of the key that is demanded."""
    signer = text(keyid, f"{place}: keyid", HEX_32)
    sig = from_base64(signature, f"{place}: sig", 64)
    if key is not None:
        findings.compare(f"{place}: keyid", signer, key)
    kind = PAYLOAD_TYPE.encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    holds = has_signed(bytes.fromhex(signer), sig, message)
    if holds is None:
        findings.note("signatures are NOT checked: the Python package `cryptography` is not installed here")
    elif not holds:
        findings.add(f"{place}: sig", base64.b64encode(sig).decode(), f"a signature by {signer} over the payload")


def read_statement(value: Json, kind: str, keyid: str, place: str) -> Statement:
    """An in-toto Statement, all of it but whether its root is the right one."""
    parts = an_object(value, {"_type", "predicateType", "predicate", "subject"}, place)
    if parts["_type"] != STATEMENT:
        raise MisshapenError(f"{place}: _type", parts["_type"], STATEMENT)
    if parts["predicateType"] != kind:
        raise MisshapenError(f"{place}: predicateType", parts["predicateType"], kind)
    subjects: list[tuple[str, str]] = []
    for at, subject in enumerate(a_list(parts["subject"], f"{place}: subject")):
        here = f"{place}: subject {at}"
        named = an_object(subject, {"name", "digest"}, here)
        digest = an_object(named["digest"], {"sha256"}, f"{here}: digest")
        subjects.append((text(named["name"], f"{here}: name"), text(digest["sha256"], f"{here}: digest", HEX_32)))
    if not subjects or subjects[0][0] != "ledger":
        raise MisshapenError(f"{place}: subject 0: name", subjects[0][0] if subjects else None, "ledger")
    predicate = parts["predicate"]
    checked = read_note(predicate, place) if kind == NOTE else read_checkpoint(predicate, place)
    size = whole(checked["size"], f"{place}: size")
    files = subjects[1:]
    if files and checked.get("kind") != "training-done":
        raise MisshapenError(f"{place}: subject 1: name", files[0][0], "no subject but the ledger")
    if [name for name, _ in files] != sorted({name for name, _ in files}):
        raise MisshapenError(f"{place}: subject", [name for name, _ in files], "files sorted by path, each once")
    for name, _ in files:
        if not name.startswith("student/") or not name.endswith(WEIGHTS):
            raise MisshapenError(f"{place}: subject", name, f"a file of student/ that ends in one of {WEIGHTS}")
    return Statement(checked, bytes.fromhex(subjects[0][1]), size, files, keyid)


def open_envelope(envelope: Json, findings: Findings, place: str) -> tuple[Json, str]:
    """The payload of an envelope and whose signature it carries, which is checked."""
    parts = an_object(envelope, {"payload", "payloadType", "signatures"}, place)
    if parts["payloadType"] != PAYLOAD_TYPE:
        raise MisshapenError(f"{place}: payloadType", parts["payloadType"], PAYLOAD_TYPE)
    signatures = a_list(parts["signatures"], f"{place}: signatures")
    if len(signatures) != 1:
        raise MisshapenError(f"{place}: signatures", len(signatures), 1)
    one = an_object(signatures[0], {"keyid", "sig"}, f"{place}: signatures")
    payload = from_base64(parts["payload"], f"{place}: payload")
    check_signature(one["keyid"], one["sig"], payload, None, findings, place)
    return read_canonical(payload, f"{place}: payload"), str(one["keyid"])


def read_gate(value: Json, kind: str, place: str) -> tuple[Object, str, str]:
    """A token's or a waiver's predicate, and its one subject's name and digest."""
    parts = an_object(value, {"_type", "predicateType", "predicate", "subject"}, place)
    for name, expected in (("_type", STATEMENT), ("predicateType", kind)):
        if parts[name] != expected:
            raise MisshapenError(f"{place}: {name}", parts[name], expected)
    subjects = a_list(parts["subject"], f"{place}: subject")
    if len(subjects) != 1:
        raise MisshapenError(f"{place}: subject", len(subjects), 1)
    named = an_object(subjects[0], {"name", "digest"}, f"{place}: subject")
    digest = an_object(named["digest"], {"sha256"}, f"{place}: subject: digest")
    told_of = an_object(parts["predicate"], GATE_KEYS if kind == GATE else WAIVER_KEYS, place)
    moment(told_of["at"], f"{place}: at", SECONDS)
    use = an_object(told_of["use"], set(USE), f"{place}: use")
    for name, allowed in USE.items():
        if not any(type(use[name]) is type(one) and use[name] == one for one in allowed):
            raise MisshapenError(f"{place}: use: {name}", use[name], f"one of {allowed}")
    hexed = text(digest["sha256"], f"{place}: subject: digest", HEX_32)
    return told_of, text(named["name"], f"{place}: subject: name"), hexed


def read_waiver(value: Json, place: str) -> Object:
    """The predicate of a waiver."""
    told_of, name, _ = read_gate(value, WAIVER, place)
    for key in ("by", "reason", "terms"):
        if not text(told_of[key], f"{place}: {key}"):
            raise MisshapenError(f"{place}: {key}", "", "some text")
    moment(text(told_of["expires"], f"{place}: expires", DAY) + "T00:00:00Z", f"{place}: expires", SECONDS)
    if name != f"terms:{told_of['terms']}":
        raise MisshapenError(f"{place}: subject: name", name, f"terms:{told_of['terms']}")
    return told_of


def read_note(value: Json, place: str) -> Object:
    """The predicate of a note."""
    parts = an_object(value, {"at", "by", "size", "text"}, place)
    moment(parts["at"], f"{place}: at", SECONDS)
    text(parts["text"], f"{place}: text")
    if parts["by"] is not None:
        text(parts["by"], f"{place}: by")
    return parts


def read_checkpoint(value: Json, place: str) -> Object:
    """The predicate of a checkpoint."""
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise MisshapenError(
            f"{place}: kind", value.get("kind") if isinstance(value, dict) else value, " or ".join(KINDS)
        )
    more = {"recipe", "order"} if value["kind"] == "training-intended" else set()
    parts = an_object(value, {"at", "kind", "size", "examples"} | more, place)
    moment(parts["at"], f"{place}: at", SECONDS)
    for name in more:
        text(parts[name], f"{place}: {name}", HEX_32)
    if parts["examples"] is not None:
        examples = an_object(parts["examples"], {"count", "first"}, f"{place}: examples")
        count, first = (whole(examples[name], f"{place}: examples: {name}") for name in ("count", "first"))
        if count + first > whole(parts["size"], f"{place}: size"):
            raise MisshapenError(
                f"{place}: examples", f"leaves {first} to {first + count - 1}", f"within {parts['size']}"
            )
    return parts


# ---------------------------------------------------------------- time-stamps: as much DER as that takes

OID_SIGNED_DATA = bytes.fromhex("2a864886f70d010702")
OID_TST_INFO = bytes.fromhex("2a864886f70d0109100104")
OID_HASHES = {
    bytes.fromhex("608648016503040201"): "sha256",
    bytes.fromhex("608648016503040202"): "sha384",
    bytes.fromhex("608648016503040203"): "sha512",
}


def der(data: bytes, place: str) -> list[tuple[int, bytes]]:
    """Tags and contents of the values that stand one after the other in DER (X.690, definite lengths only)."""
    found, at = [], 0
    while at < len(data):
        if at + 2 > len(data):
            raise WrongError(place, "cut off", "DER")
        tag, length, at = data[at], data[at + 1], at + 2
        if length >= 0x80:
            octets = length & 0x7F
            if not 1 <= octets <= 4 or at + octets > len(data):
                raise WrongError(place, f"length in {octets} octets", "DER")
            length, at = int.from_bytes(data[at : at + octets], "big"), at + octets
        if at + length > len(data):
            raise WrongError(place, f"a value of {length} bytes where {len(data) - at} are left", "DER")
        found.append((tag, data[at : at + length]))
        at += length
    return found


def inside(values: list[tuple[int, bytes]], index: int, tag: int, place: str) -> bytes:
    """The contents of the value at a place, which has to have this tag."""
    if index >= len(values) or values[index][0] != tag:
        raise WrongError(place, f"tag {values[index][0]:#04x}" if index < len(values) else "nothing", f"tag {tag:#04x}")
    return values[index][1]


def read_stamp(response: bytes, place: str) -> tuple[str, bytes, str]:
    """Algorithm and value of the imprint in a TimeStampResp that was granted (RFC 3161, 2.4.2), and its time."""
    sequence, context = 0x30, 0xA0
    outer = der(response, place)
    parts = der(inside(outer, 0, sequence, place), place)
    status = int.from_bytes(inside(der(inside(parts, 0, sequence, place), place), 0, 0x02, place), "big")
    if len(outer) != 1 or status not in (0, 1):
        raise WrongError(f"{place}: status", status, "0 or 1, granted")
    token = der(inside(parts, 1, sequence, place), place)
    if inside(token, 0, 0x06, place) != OID_SIGNED_DATA:
        raise WrongError(place, token[0][1], "SignedData")
    signed = der(inside(der(inside(token, 1, context, place), place), 0, sequence, place), place)
    content = der(inside(signed, 2, sequence, place), place)
    if inside(content, 0, 0x06, place) != OID_TST_INFO:
        raise WrongError(place, content[0][1], "TSTInfo")
    octets = inside(der(inside(content, 1, context, place), place), 0, 0x04, place)
    info = der(inside(der(octets, place), 0, sequence, place), place)
    imprint = der(inside(info, 2, sequence, place), place)
    name = inside(der(inside(imprint, 0, sequence, place), place), 0, 0x06, place)
    if name not in OID_HASHES:
        raise WrongError(f"{place}: hash", name, "SHA-256, SHA-384 or SHA-512")
    at = inside(info, 4, 0x18, place).decode("ascii", "replace")
    return OID_HASHES[name], inside(imprint, 1, 0x04, place), at


# ---------------------------------------------------------------- files of RUN


def lies_at(run: str, name: str) -> str:
    """The path of something in RUN; refuses whatever leads out of it or over a link."""
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise WrongError(name, name, "a path inside of RUN, without '..', '.', '\\' or empty parts")
    path = run
    for part in parts:
        path = os.path.join(path, part)
        try:
            kind = os.lstat(path).st_mode
        except (OSError, ValueError) as error:
            raise WrongError(name, f"not there ({type(error).__name__})", "a file or directory") from None
        if stat.S_ISLNK(kind):
            raise WrongError(name, "a symbolic link", "a file or directory of RUN itself; links are not followed")
    return path


def digest_of(run: str, name: str) -> tuple[str, dict[str, str] | None]:
    """The tagged digest of a file or directory of RUN, and a directory's manifest."""
    path = lies_at(run, name)
    kind = os.lstat(path).st_mode
    if stat.S_ISDIR(kind):
        manifest = dict(sorted(walk(path, name)))
        return tagged(canonical(dict(manifest), name)), manifest
    return digest_of_file(path, name), None


def digest_of_file(path: str, name: str) -> str:
    """Reads in pieces, whatever the size; never a link, a pipe or a device."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise WrongError(name, f"not readable ({error.strerror})", "a file") from None
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise WrongError(name, "neither a file nor a directory", "a file or directory")
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def walk(path: str, name: str) -> Iterator[tuple[str, str]]:
    """Every file of a directory but a README.md at its top: path relative to it, and tagged digest."""
    waiting, seen = [""], 0
    while waiting:
        folder = waiting.pop()
        try:
            children = os.scandir(os.path.join(path, folder))
        except OSError as error:
            raise WrongError(f"{name}/{folder}", f"not readable ({error.strerror})", "a directory") from None
        with children:
            for child in children:
                seen += 1
                inner = folder + child.name
                if seen > MAX_FILES:
                    raise WrongError(name, f"more than {MAX_FILES} files", "fewer")
                if child.is_symlink():
                    raise WrongError(
                        f"{name}/{inner}", "a symbolic link", "a file of RUN itself; links are not followed"
                    )
                if child.is_dir(follow_symlinks=False):
                    waiting.append(inner + "/")
                elif inner != "README.md":
                    yield inner, digest_of_file(child.path, f"{name}/{inner}")


def read_small(path: str, limit: int) -> bytes:
    """The bytes of a regular file that has to be small enough to be held."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path}: {error}") from None
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableError(f"{path}: not a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnreadableError(f"{path}: more than {limit} bytes")
    return data


# ---------------------------------------------------------------- recipe.yaml: the YAML that is allowed there

NULL = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
YAML_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
YAML_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?", re.ASCII)
YAML_OTHER = re.compile(
    r"""yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|=|<<
    |[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?[1-9][0-9_]*|[-+]?0x[0-9a-fA-F_]+|[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+
    |[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)
    |[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}.*)?""",
    re.VERBOSE | re.ASCII,
)
"""What YAML 1.1 makes something else of than text, and no recipe.yaml holds without quotes."""
YAML_KEY = re.compile(r"([A-Za-z0-9_./][^:#]*?(?:[:#][^: #][^:#]*?)*):(?: +|$)")
ESCAPES = {
    **{"0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "e": "\x1b", " ": " "},
    **{'"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029"},
}
HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


class Yaml:
    """Block mappings and sequences of plain and quoted scalars, `[]`, `{}`, comments; anything else is refused."""

    def __init__(self, data: bytes):
        try:
            content = data.decode()
        except UnicodeDecodeError as error:
            raise WrongError("recipe.yaml", f"byte {error.start} is no UTF-8", "UTF-8") from None
        bad = re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]", content)
        if bad:
            raise WrongError("recipe.yaml", ascii(bad[0]), "no control character, tab or carriage return")
        self.lines = content.split("\n")
        self.at = next((at for at, line in enumerate(self.lines) if re.match(r"---|\.\.\.|%", line)), -1)
        if self.at >= 0:
            self.refuse("one document, without a marker")
        self.at = 0

    def read(self) -> Json:
        """The one document."""
        value = self.node(-1, 0) if self.rest() else None
        if self.rest():
            self.refuse("one document of block mappings and sequences")
        return value

    def refuse(self, expected: str) -> NoReturn:
        """Names the current line."""
        line = self.lines[self.at] if self.at < len(self.lines) else "the end of the file"
        raise WrongError(f"recipe.yaml: line {self.at + 1}", line, expected)

    def rest(self) -> bool:
        """Goes to the next line that says something; whether there is one."""
        while self.at < len(self.lines) and re.fullmatch(r" *(#.*)?", self.lines[self.at]):
            self.at += 1
        return self.at < len(self.lines)

    def indent(self) -> int:
        """Spaces before what the next line says; -1 at the end."""
        return len(self.lines[self.at]) - len(self.lines[self.at].lstrip(" ")) if self.rest() else -1

    def node(self, parent: int, depth: int) -> Json:
        """The value that begins on the current line, which is indented more than its parent."""
        if depth > MAX_DEPTH:  # `canonical` counts exactly; this keeps the reader itself from going deeper
            self.refuse(f"at most {MAX_DEPTH} levels")
        indent = self.indent()
        content = self.lines[self.at][indent:]
        if content == "-" or content.startswith("- "):
            return self.sequence(indent, depth)
        if self.key(content, indent) is not None:
            return self.mapping(indent, depth)
        return self.scalar(indent, parent)

    def sequence(self, indent: int, depth: int) -> Json:
        """Items that begin with a dash in this column."""
        items: list[Json] = []
        while self.indent() == indent and re.match(r"-( |$)", self.lines[self.at][indent:]):
            line = self.lines[self.at]
            if re.fullmatch(r"- *(#.*)?", line[indent:]):
                self.at += 1
                items.append(self.node(indent, depth + 1) if self.indent() > indent else None)
            else:
                self.lines[self.at] = line[:indent] + " " + line[indent + 1 :]
                items.append(self.node(indent, depth + 1))
        return items

    def mapping(self, indent: int, depth: int) -> Json:
        """Keys in this column, and their values."""
        found: Object = {}
        while self.indent() == indent:
            key = self.key(self.lines[self.at][indent:], indent)
            if key is None:
                self.refuse("a key, a colon and its value")
            name, start = key
            if name in found:
                self.refuse(f"the key {name!r} once")
            if re.fullmatch(r"(#.*)?", self.lines[self.at][start:]):
                self.at += 1
                deeper = self.indent() > indent
                listed = self.indent() == indent and re.match(r"-( |$)", self.lines[self.at][indent:])
                found[name] = self.node(indent, depth + 1) if deeper or listed else None
            else:
                found[name] = self.scalar(start, indent)
        return found

    def key(self, content: str, indent: int) -> tuple[str, int] | None:
        """A key that begins here and the column at which its value does."""
        quoted = re.match(r"""('(?:[^']|'')*'|"(?:[^"\\]|\\.)*"):(?: +|$)""", content)
        if quoted:
            name, _ = self.unquoted(quoted[1], self.at)
            return name, indent + quoted.end()
        plain = YAML_KEY.match(content)
        if plain is None:
            return None
        resolved = self.resolve(plain[1].rstrip())
        if not isinstance(resolved, str):
            self.refuse("a key that is text")
        return resolved, indent + plain.end()

    def scalar(self, start: int, parent: int) -> Json:
        """What stands after a key or a dash."""
        content = self.lines[self.at][start:]
        if content[0] in "'\"":
            value, end = self.unquoted("\n".join([content, *self.lines[self.at + 1 :]]), self.at)
            lines = end.count("\n")
            self.at += len(self.lines) - self.at - 1 - lines
            if not re.match(r" *(?: #.*)?$", end.partition("\n")[0]):
                self.refuse("nothing after the closing quote")
            self.at += 1
            return value
        if content.rstrip() in ("[]", "{}"):
            self.at += 1
            return [] if content.startswith("[") else {}
        if content[0] in "[]{},#&*!|>%@`" or re.match(r"[-?:](?: |$)", content):
            self.refuse("a plain or quoted scalar, [] or {}")
        return self.plain(start, parent)

    def plain(self, start: int, parent: int) -> Json:
        """A plain scalar and the lines that go on with it: those indented more than what it belongs to."""
        folded, breaks, content = "", 0, self.lines[self.at][start:]
        while True:
            comment = re.search(r" #", content)
            piece = (content[: comment.start()] if comment else content).strip(" ")
            if re.search(r":(?: |$)", piece):
                self.refuse("no ': ' in a plain scalar")
            folded += ("\n" * breaks if breaks else " " if folded else "") + piece
            self.at += 1
            ahead = self.at
            while ahead < len(self.lines) and not self.lines[ahead].strip(" "):
                ahead += 1
            line = self.lines[ahead] if ahead < len(self.lines) else ""
            deep = len(line) - len(line.lstrip(" "))
            if comment or not line or deep <= parent or line[deep] == "#":
                return self.resolve(folded)
            breaks, self.at, content = ahead - self.at, ahead, line

    def resolve(self, plain: str) -> Json:
        """What YAML 1.1 makes of a plain scalar."""
        if plain in NULL:
            return None
        if plain in TRUE or plain in FALSE:
            return plain in TRUE
        if YAML_INTEGER.fullmatch(plain) and len(plain) < 18:
            return int(plain)
        if YAML_FLOAT.fullmatch(plain):
            return float(plain)
        if YAML_OTHER.fullmatch(plain):
            self.refuse("quotes around text that YAML takes for something else")
        return plain

    def unquoted(self, content: str, line: int) -> tuple[str, str]:
        """A quoted scalar, its lines folded, and what follows the closing quote."""
        quote, out, at, kept = content[0], "", 1, 0
        while at < len(content):
            char = content[at]
            if char == "\n":
                out = out[:kept] + out[kept:].rstrip(" ")
                blank = re.compile(r"(?:\n *)+").match(content, at)
                assert blank
                out += "\n" * (blank[0].count("\n") - 1) or " "
                kept, at = len(out), blank.end()
            elif char == quote == "'" and content[at : at + 2] == "''":
                out, at = out + "'", at + 2
            elif char == quote:
                return out, content[at + 1 :]
            elif char == "\\" and quote == '"':
                more, at = self.escape(content, at + 1)
                out += more
                kept = len(out)
            else:
                out, at = out + char, at + 1
        self.at = line
        self.refuse("a closing quote")

    def escape(self, content: str, at: int) -> tuple[str, int]:
        """What an escape stands for, and where it ends."""
        name = content[at : at + 1]
        if name == "\n":
            blank = re.compile(r"(?:\n *)+").match(content, at)
            assert blank
            return "\n" * (blank[0].count("\n") - 1), blank.end()
        if name in HEX_ESCAPES:
            digits = content[at + 1 : at + 1 + HEX_ESCAPES[name]]
            if (
                re.fullmatch(r"[0-9a-fA-F]+", digits)
                and len(digits) == HEX_ESCAPES[name]
                and int(digits, 16) < 0x110000
            ):
                return chr(int(digits, 16)), at + 1 + len(digits)
        elif name in ESCAPES:
            return ESCAPES[name], at + 1
        self.refuse("an escape of YAML")


# ---------------------------------------------------------------- ledger.db

APPLICATION, VERSION = 0x4C4D424B, 2
TABLES = {
    "entries": "CREATE TABLE entries (idx INTEGER PRIMARY KEY, digest TEXT NOT NULL, body TEXT NOT NULL)",
    "hashes": "CREATE TABLE hashes (first INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "subtrees": "CREATE TABLE subtrees (level INTEGER NOT NULL, place INTEGER NOT NULL, hash BLOB NOT NULL, "
    "PRIMARY KEY (level, place)) WITHOUT ROWID",
}
TRIGGERS = {
    f"{table}_{past}": f"CREATE TRIGGER {table}_{past} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: no {verb.lower()}'); END"
    for table in TABLES
    for past, verb in (("unchanged", "UPDATE"), ("kept", "DELETE"))
} | {
    "entries_in_order": "CREATE TRIGGER entries_in_order BEFORE INSERT ON entries "
    "WHEN NEW.idx IS NOT (SELECT COUNT(*) FROM entries) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: wrong index'); END"
}


UNSOUND = (sqlite3.Error, UnicodeDecodeError)
"""What a damaged file raises; the second where SQLite's message quotes bytes that are no UTF-8."""


def open_ledger(run: str) -> sqlite3.Connection:
    """The database, read-only and as it lies there, if it is one of limbeck's and holds nothing else."""
    path = os.path.join(run, "ledger.db")
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        raise UnreadableError(f"{path}: not there, so {run} is no RUN directory") from None
    if not stat.S_ISREG(kind):
        raise UnreadableError(f"{path}: a symbolic link or no file; neither is opened")
    for beside in (path + "-journal", path + "-wal"):
        if os.path.lexists(beside):
            there = os.lstat(beside)
            if there.st_size or not stat.S_ISREG(there.st_mode):
                raise UnreadableError(f"{beside}: a write was cut off or is under way; let limbeck finish it first")
    with open(path, "rb") as file:
        head = file.read(100)
    whole_file = os.path.getsize(path)
    if len(head) < 100 or head[:16] != b"SQLite format 3\0":
        raise UnreadableError(f"{path}: not an SQLite file ({whole_file} bytes)")
    found = {
        "application_id": (int.from_bytes(head[68:72], "big"), APPLICATION),
        "user_version": (int.from_bytes(head[60:64], "big"), VERSION),
        "journal mode (1 is rollback)": (max(head[18:20]), 1),
        "text encoding (1 is UTF-8)": (int.from_bytes(head[56:60], "big"), 1),
    }
    bad = [f"{name} is {value:#x}, not {wanted:#x}" for name, (value, wanted) in found.items() if value != wanted]
    if bad:
        raise UnreadableError(f"{path}: not a ledger of version {VERSION}: {'; '.join(bad)}")
    uri = f"file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro&immutable=1"
    db = sqlite3.connect(uri, uri=True, isolation_level=None)
    db.text_factory = bytes
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BODY)
    try:
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "cache_size = -8192"):
            db.execute(f"PRAGMA {setting}")
        db.set_authorizer(allow)
        check_schema(db, path)
    except UNSOUND as error:
        db.close()
        raise UnreadableError(f"{path}: {error}") from None
    except UnreadableError:
        db.close()
        raise
    return db


def allow(action: int, first: str | None, second: str | None, *_: object) -> int:
    """What statements may do: read the columns of the ledger's tables and of the schema."""
    readable = first in (*TABLES, "sqlite_master") and action == sqlite3.SQLITE_READ
    harmless = action == sqlite3.SQLITE_FUNCTION and second == "typeof"
    if action == sqlite3.SQLITE_SELECT or readable or harmless:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def check_schema(db: sqlite3.Connection, path: str) -> None:
    """The tables and triggers of the format, and nothing else."""
    wanted = TABLES | TRIGGERS
    names = []
    for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master LIMIT 100").fetchall():
        known, made = bytes(name or b"").decode(errors="replace"), bytes(sql or b"").decode(errors="replace")
        names.append(known)
        if wanted.get(known) != made:
            kind = bytes(kind).decode(errors="replace")
            raise UnreadableError(
                f"{path}: holds the {kind} {told(known)}, made by {told(made)}; a ledger has no such thing"
            )
    if sorted(names) != sorted(wanted):
        raise UnreadableError(f"{path}: lacks {', '.join(sorted(set(wanted) - set(names)))}")


def stored_leaves(db: sqlite3.Connection, findings: Findings) -> Iterator[bytes]:
    """The leaf hashes of the table, as far as its rows are sound."""
    expected = 0
    for first, kind, data in db.execute("SELECT first, typeof(data), data FROM hashes ORDER BY first"):
        place = f"ledger.db: hashes: row {first}"
        if first != expected:
            findings.add(place, f"begins with leaf {first}", f"begins with leaf {expected}")
            return
        if kind != b"blob" or not data or len(data) % 32:
            found = f"{len(data)} bytes" if kind == b"blob" else kind.decode()
            findings.add(place, found, "hashes of 32 bytes each")
            return
        expected += len(data) // 32
        if first // 256 != (expected - 1) // 256:
            findings.add(place, f"leaves {first} to {expected - 1}", "no row across a multiple of 256")
        yield from (data[at : at + 32] for at in range(0, len(data), 32))


def stored_entries(db: sqlite3.Connection, findings: Findings) -> Iterator[tuple[int, bytes, bytes]]:
    """Place, digest and body of every entry, as far as the places ascend."""
    expected = 0
    rows = db.execute("SELECT idx, typeof(digest), digest, typeof(body), body FROM entries ORDER BY idx")
    for place, digest_kind, digest, body_kind, body in rows:
        if place != expected:
            findings.add(f"entry {expected}", f"entry {place} in its place", f"entry {expected}")
            if place < expected:
                return
        if (digest_kind, body_kind) != (b"text", b"text"):
            found = f"digest of type {digest_kind.decode()}, body of type {body_kind.decode()}"
            findings.add(f"entry {place}", found, "text and text")
            return
        yield place, digest, body
        expected = place + 1


class Written(NamedTuple):
    """What an entry says it wrote under a path, and the manifest that it gives of a directory."""

    entry: int
    digest: str
    manifest: dict[str, str] | None


class Replay:
    """The ledger gone through once, from the first entry to the last, with as little kept as later checks need."""

    def __init__(
        self,
        findings: Findings,
        leaves: Iterator[bytes],
        key: str | None,
        wanted_head: str | None,
        kept: dict[int, list[bytes]],
    ):
        self.findings, self.leaves, self.key, self.kept = findings, leaves, key, kept
        self.wanted_head = wanted_head
        self.tree = Tree()
        self.head = tagged(b"")
        self.head_seen = wanted_head in (None, self.head)
        self.examples: Object | None = None
        self.set = Tree()
        self.waivers: list[tuple[str, Object]] = []
        self.sealed = self.version = 0
        self.written: dict[str, Written] = {}
        self.stages: dict[str, tuple[int, Object, Object]] = {}
        self.recipes: dict[str, tuple[int, int]] = {}
        self.envelopes: dict[str, dict[str, str]] = {}
        self.keys: set[str] = set()
        self.outside: set[str] = set()
        self.weights: tuple[int, list[tuple[str, str]]] | None = None
        self.trained: list[tuple[str, str]] = []
        self.count = self.signed = self.stamped = 0
        self.signed_root = b""
        self.held = self.largest = self.paths = 0

    def entry(self, index: int, digest: bytes, body: bytes) -> None:
        """One entry: its digest, what it says, and its leaves."""
        place, made = f"entry {index}", tagged(body)
        self.findings.compare(f"{place}: digest", digest.decode(errors="replace"), made)
        self.findings.attempt(lambda: self.said(index, body, f"{place}: "), f"{place}: ")
        self.look_for_kept()
        self.leaf(leaf_hash(b"\x02" + sha256(body)), place)
        self.head, self.count = made, self.count + 1
        self.head_seen |= made == self.wanted_head

    def leaf(self, hashed: bytes, place: str) -> None:
        """A leaf that can be computed, against the one that is stored."""
        stored = next(self.leaves, None)
        here = f"leaf {self.tree.size}: of {place}"
        if stored is None:
            self.findings.add(here, "no hash in ledger.db", hashed.hex())
        else:
            self.findings.compare(here, stored.hex(), hashed.hex())
        self.tree.push(hashed)

    def look_for_kept(self) -> None:
        """Compares the root here with the checkpoints that were kept over as many leaves."""
        for root in self.kept.pop(self.tree.size, ()):
            self.findings.compare(
                f"kept checkpoint: root over {self.tree.size} leaves", self.tree.root().hex(), root.hex()
            )

    def said(self, index: int, body: bytes, place: str) -> None:
        """Everything one body says. A part that cannot be read hides only what hangs on it."""
        value = an_object(read_canonical(body, "body"), ENTRY_KEYS, "body")
        attempt, compare = self.findings.attempt, self.findings.compare
        compare(f"{place}version", value["version"], 1)
        compare(f"{place}index", value["index"], index)
        compare(f"{place}previous", value["previous"], self.head)
        for name in ("started", "finished"):
            attempt(lambda name=name: void(moment(value[name], name, MICROSECONDS)), place)
        for name in ("stage", "limbeck"):
            attempt(lambda name=name: void(text(value[name], name)), place)
        if value["commit"] is not None:
            attempt(lambda: void(text(value["commit"], "commit")), place)
        if value["dirty"] is not None and not isinstance(value["dirty"], bool):
            self.findings.add(f"{place}dirty", value["dirty"], "true, false or null")
        attempt(lambda: self.made_with(text(value["recipe"], "recipe", TAGGED), index), place)
        facts = value["facts"]
        if not isinstance(facts, dict):
            self.findings.add(f"{place}facts", facts, "an object")
            return
        stage = str(value["stage"])
        attempt(lambda: self.read_and_wrote(index, stage, value, facts), place)
        self.hold(stage, len(body))
        if stage == "seal" or "leaves" in facts:
            attempt(lambda: self.seal(stage, facts), place)
        special = {"checkpoint": self.checkpoint, "note": self.note, "timestamp": self.timestamp}
        special |= {"gate": self.gate, "train": self.train}
        if stage in special:
            attempt(lambda: special[stage](index, facts, value), place)

    def made_with(self, recipe: str, index: int) -> None:
        """Counts the entries of a recipe."""
        first, count = self.recipes.get(recipe, (index, 0))
        self.recipes[recipe] = first, count + 1

    def hold(self, stage: str, size: int) -> None:
        """Counts what is kept of the entries, so that many names cannot fill the memory."""
        if len(self.written) > self.paths or stage not in self.stages:
            self.held += size
        self.held += max(0, size - self.largest)
        self.largest, self.paths = max(size, self.largest), len(self.written)
        if self.held + len(self.stages) * self.largest > MAX_HELD:
            raise UnreadableError(f"ledger.db: entries name more than {MAX_HELD} bytes of different paths")

    def read_and_wrote(self, index: int, stage: str, value: Object, facts: Object) -> None:
        """Inputs against what was written before; outputs, and the manifests given of them."""
        inputs, outputs = digests(value["inputs"], "inputs"), digests(value["outputs"], "outputs")
        for name, digest in inputs.items():
            if ":" in name:
                if len(self.outside) < 1000:
                    self.outside.add(name)
                continue
            earlier = self.written.get(name)
            expected = earlier.digest if earlier else "what an earlier entry wrote; none wrote it"
            self.findings.compare(f"entry {index}: inputs: {name}", digest, expected)
        manifests = facts.get("manifests", {})
        for name, digest in outputs.items():
            if ":" in name:
                self.findings.add(f"entry {index}: outputs: {name}", name, "a path in RUN, which has no colon")
            manifest = manifests.get(name) if isinstance(manifests, dict) else None
            if manifest is not None:
                here = f"facts: manifests: {name}"
                made = tagged(canonical(digests(manifest, here), here))
                self.findings.compare(f"entry {index}: {here}", made, digest)
            files = {inner: str(one) for inner, one in manifest.items()} if isinstance(manifest, dict) else None
            self.written[name] = Written(index, str(digest), files)
            if (stage, name) == ("train", "student"):
                self.trained = weights_of(files or {})
        if stage not in ("checkpoint", "note", "timestamp"):
            self.stages[stage] = (index, inputs, outputs)

    def seal(self, stage: str, facts: Object) -> None:
        """The example leaves that come before this entry's own. Their hashes are taken as they are stored."""
        if stage != "seal" or "leaves" not in facts:
            raise WrongError(
                "facts: leaves", f"stage {stage}", "the fact in entries of the stage seal, and in no other"
            )
        leaves = an_object(facts["leaves"], {"count", "nonce", "salts", "version"}, "facts: leaves")
        version = leaves["version"]
        if type(version) is not int or version not in EXAMPLE:
            raise WrongError("facts: leaves: version", version, " or ".join(map(str, EXAMPLE)))
        if version < self.version:
            expected = f"{self.version} or later: no release writes older leaves after newer ones"
            self.findings.add(f"entry {self.count}: facts: leaves: version", version, expected)
        self.version = max(version, self.version)
        text(leaves["nonce"], "facts: leaves: nonce", HEX_32)
        text(leaves["salts"], "facts: leaves: salts", TAGGED)
        count = whole(leaves["count"], "facts: leaves: count")
        self.examples = {"count": count, "first": self.tree.size}
        self.set = Tree()
        for at in range(count):
            stored = next(self.leaves, None)
            if stored is None:
                raise WrongError(
                    "facts: leaves: count", f"{count} examples", f"{at}, the hashes that ledger.db has left"
                )
            self.look_for_kept()
            self.tree.push(stored)
            self.set.push(stored)
            self.sealed += 1

    def signed_here(self, index: int, facts: Object, kind: str) -> Statement:
        """The statement of an entry's envelope, against the leaves before that entry."""
        parts = an_object(facts, {"envelope"}, "facts")
        place = f"entry {index}: envelope"
        statement = read_envelope(parts["envelope"], kind, self.key, self.findings, place)
        self.findings.compare(f"{place}: size", statement.size, self.tree.size)
        self.findings.compare(f"{place}: root", statement.root.hex(), self.tree.root().hex())
        self.keys.add(statement.keyid)
        return statement

    def checkpoint(self, index: int, facts: Object, value: Object) -> None:
        """What a checkpoint says beside root and size."""
        statement = self.signed_here(index, facts, CHECKPOINT)
        told_of, place = statement.predicate, f"entry {index}: envelope"
        self.findings.compare(f"{place}: examples", told_of["examples"], self.examples)
        if "recipe" in told_of:
            self.findings.compare(f"{place}: recipe", "sha256:" + str(told_of["recipe"]), value["recipe"])
        if told_of["kind"] == "training-done":
            self.weights = (index, statement.subjects)
            self.compare_weights(place, statement.subjects, self.trained)
        data = canonical(facts["envelope"], "envelope")
        self.envelopes[tagged(data)] = {name: hashlib.new(name, data).hexdigest() for name in OID_HASHES.values()}
        self.signed, self.signed_root = self.tree.size, self.tree.root()

    def compare_weights(self, place: str, found: list[tuple[str, str]], expected: list[tuple[str, str]]) -> None:
        """Two lists of weights, file by file."""
        ours, theirs = ({name: f"sha256:{digest}" for name, digest in one} for one in (found, expected))
        for name in sorted({*ours, *theirs}):
            self.findings.compare(f"{place}: {name}", ours.get(name, "not there"), theirs.get(name, "not there"))

    def note(self, index: int, facts: Object, value: Object) -> None:
        """A note says nothing that can be computed but root and size."""
        self.signed_here(index, facts, NOTE)

    def gate(self, index: int, facts: Object, value: Object) -> None:
        """The token of the terms gate: the set that it is bound to, and the waivers that let something through."""
        self.waivers = []
        fact = an_object(facts.get("gate"), {"version", "token", "waivers"}, "facts: gate")
        if type(fact["version"]) is not int or fact["version"] != 1:
            raise WrongError("facts: gate: version", fact["version"], 1)
        place, compare = f"entry {index}: gate", self.findings.compare
        payload, keyid = open_envelope(fact["token"], self.findings, f"{place}: token")
        token, name, root = read_gate(payload, GATE, f"{place}: token")
        compare(f"{place}: token: subject: name", name, "examples")
        compare(f"{place}: token: set", root, self.set.root().hex())
        compare(f"{place}: token: count", token["count"], self.examples["count"] if self.examples else None)
        compare(f"{place}: token: recipe", f"sha256:{token['recipe']}", value["recipe"])
        for part in ("rows", "rulings"):
            text(token[part], f"{place}: token: {part}", HEX_32)
        envelopes = a_list(fact["waivers"], f"{place}: waivers")
        made = [tagged(canonical(one, "waiver")).removeprefix("sha256:") for one in envelopes]
        compare(f"{place}: token: waivers", token["waivers"], made)
        compare(f"{place}: token: verdict", token["verdict"], "waived" if made else "allowed")
        for at, envelope in enumerate(envelopes):
            here = f"{place}: waiver {at}"
            payload, signer = open_envelope(envelope, self.findings, here)
            waiver = read_waiver(payload, here)
            compare(f"{here}: keyid", signer, keyid)
            compare(f"{here}: use", waiver["use"], token["use"])
            self.waivers.append((here, waiver))
        self.in_force(str(value["started"]), f"when entry {index} (gate) began")

    def train(self, index: int, facts: Object, value: Object) -> None:
        """Training under waivers, which have to be in force when it begins."""
        void(facts)
        self.in_force(str(value["started"]), f"when entry {index} (train) began")

    def in_force(self, started: str, when: str) -> None:
        """Whether each waiver's last day is not past."""
        for place, waiver in self.waivers:
            if started[:10] > str(waiver["expires"]):
                self.findings.add(f"{place}: expires", waiver["expires"], f"{started[:10]} or later, {when}")

    def timestamp(self, index: int, facts: Object, value: Object) -> None:
        """The imprint against the envelope that was stamped."""
        parts = an_object(facts, {"checkpoint", "response"}, "facts")
        named = text(parts["checkpoint"], "facts: checkpoint", TAGGED)
        response = from_base64(parts["response"], "facts: response")
        if named not in self.envelopes:
            raise WrongError("facts: checkpoint", named, "the digest of an earlier checkpoint's envelope")
        algorithm, imprint, at = read_stamp(response, "facts: response")
        expected = self.envelopes[named][algorithm]
        self.findings.compare(f"entry {index}: facts: response: imprint", imprint.hex(), expected)
        self.stamped += 1
        self.findings.note(f"entry {index} holds a time-stamp of {at} on {named}; whose it is, is NOT checked")


def void(_: object) -> None:
    """For checks that are done for their refusal."""


def weights_of(manifest: dict[str, str]) -> list[tuple[str, str]]:
    """Subjects of `training-done`: weights of student/, by path, with the hex of their digest."""
    return [(f"student/{n}", d.removeprefix("sha256:")) for n, d in sorted(manifest.items()) if n.endswith(WEIGHTS)]


# ---------------------------------------------------------------- a RUN directory


def verify_run(run: str, key: str | None = None, head: str | None = None, kept: tuple[str, ...] = ()) -> Findings:
    """Recomputes a ledger and what it says of the files beside it. Raises `UnreadableError`."""
    findings = Findings()
    roots: dict[int, list[bytes]] = {}
    for path in kept:
        statement = kept_checkpoint(path, key, findings)
        roots.setdefault(statement.size, []).append(statement.root)
    db = open_ledger(run)
    try:
        leaves = stored_leaves(db, findings)
        replay = Replay(findings, leaves, key, head, roots)
        for index, digest, body in stored_entries(db, findings):
            replay.entry(index, digest, body)
        replay.look_for_kept()
        check_tables(db, replay, leaves)
    except sqlite3.DataError as error:
        raise UnreadableError(f"ledger.db: {error}; values may have {MAX_BODY} bytes") from None
    except UNSOUND as error:
        findings.add("ledger.db", str(error), "a sound SQLite file")
        return findings
    finally:
        db.close()
    for size in roots:
        findings.add(f"kept checkpoint: over {size} leaves", f"{replay.tree.size} leaves", f"at least {size}")
    if not replay.head_seen:
        findings.add("head", replay.head, f"a ledger that holds {head}")
    check_files(run, replay)
    findings.attempt(lambda: check_recipe(run, replay))
    say_what_was_not_checked(run, replay)
    return findings


def kept_checkpoint(path: str, key: str | None, findings: Findings) -> Statement:
    """A checkpoint from a file: an envelope, or any proof that has one."""
    data = read_small(path, MAX_DOCUMENT)
    try:
        value = read_canonical(data.removesuffix(b"\n"), path)
        if isinstance(value, dict) and "checkpoint" in value:
            return read_signed(value["checkpoint"], key, findings, path)
        return read_envelope(value, CHECKPOINT, key, findings, path)
    except WrongError as wrong:
        reason = f"{wrong.place}: found {told(wrong.found)}, expected {told(wrong.expected)}"
        raise UnreadableError(f"{path} is no checkpoint: {reason}") from None


def check_tables(db: sqlite3.Connection, replay: Replay, leaves: Iterator[bytes]) -> None:
    """Nothing is left over in `hashes`, and `subtrees` holds what the leaves give."""
    findings, left = replay.findings, 0
    for _ in leaves:
        left += 1
    if left:
        found = replay.tree.size + left
        findings.add("ledger.db: hashes", f"{found} leaves", f"{replay.tree.size}, those of the entries")
    expected = replay.tree.subtrees
    before: tuple[int, int] | None = None
    for level, place, kind, data in db.execute(
        "SELECT level, place, typeof(hash), hash FROM subtrees ORDER BY level, place"
    ):
        here = f"ledger.db: subtrees: level {told(level)}, place {told(place)}"
        if type(level) is not int or type(place) is not int or (before and (level, place) <= before):
            findings.add(here, "out of order", "ascending levels and places")
            return
        before = (level, place)
        wanted = expected.pop(before, None)
        found = data.hex() if kind == b"blob" else told(data)
        findings.compare(here, found, wanted.hex() if wanted else "no such row: its leaves are not all there")
    for level, place in sorted(expected):
        wanted = expected[level, place].hex()
        findings.add(f"ledger.db: subtrees: level {level}, place {place}", "no such row", wanted)


def check_files(run: str, replay: Replay) -> None:
    """What the latest entry of each stage wrote lies there, and what it read is still what there is."""
    findings = replay.findings
    manifests: dict[str, dict[str, str] | None] = {}
    for index, inputs, outputs in replay.stages.values():
        for name, digest in inputs.items():
            latest = replay.written.get(name)
            if latest and latest.entry > index:
                findings.compare(
                    f"entry {index}: inputs: {name}: made anew by entry {latest.entry}", digest, latest.digest
                )
        for name in outputs:
            if replay.written[name].entry == index and ":" not in name:
                findings.attempt(lambda name=name: check_file(run, name, replay.written[name], findings, manifests))
    student = replay.written.get("student")
    manifest = manifests.get("student")
    if replay.weights and student and manifest is not None and student.entry < replay.weights[0]:
        index, subjects = replay.weights
        replay.compare_weights(f"files against the envelope of entry {index}", weights_of(manifest), subjects)


def check_file(
    run: str, name: str, wrote: Written, findings: Findings, manifests: dict[str, dict[str, str] | None]
) -> None:
    """One path; for a directory that differs, the files that do."""
    found, manifest = digest_of(run, name)
    manifests[name] = manifest
    if found == wrote.digest:
        return
    findings.add(name, found, f"{wrote.digest}, which entry {wrote.entry} wrote")
    if manifest is None or wrote.manifest is None:
        return
    for inner in sorted({*manifest, *wrote.manifest}):
        findings.compare(f"{name}/{inner}", manifest.get(inner, "not there"), wrote.manifest.get(inner, "not there"))


def check_recipe(run: str, replay: Replay) -> None:
    """Every entry was made with the recipe that lies there."""
    if not replay.recipes:
        return
    path = lies_at(run, "recipe.yaml")
    value = Yaml(read_small(path, MAX_RECIPE)).read()
    made = tagged(canonical(value, "recipe.yaml"))
    for digest, (first, count) in replay.recipes.items():
        if digest != made:
            others = f" and {count - 1} more" if count > 1 else ""
            replay.findings.add("recipe.yaml", made, f"{digest}, the recipe of entry {first}{others}")


def say_what_was_not_checked(run: str, replay: Replay) -> None:
    """The limits of what was done, as far as they apply."""
    note = replay.findings.note
    note(
        "Parquet and journal.db are NOT read: that leaves, records and raw answers say the same (leaves.parquet "
        "against the tree, values, salts, parents) only `limbeck ledger verify` checks"
    )
    if replay.sealed:
        note(f"{replay.sealed} example leaves are taken as the ledger has them; they are bound by the signed roots")
    if not replay.signed:
        note("nothing is signed")
    elif replay.signed + 1 < replay.tree.size:
        note(f"leaves {replay.signed + 1} to {replay.tree.size - 1} are newer than the last checkpoint")
    for keyid in sorted(replay.keys):
        note(f"signed by {keyid}; whose key that is, no file can say")
    if not replay.stamped:
        note("unanchored: nothing here but the signer's own clock says when")
    for name in itertools.islice(sorted(replay.outside), 100):
        note(f"lies outside RUN, its digest is recorded and not compared: {name}")
    named = {name.split("/")[0] for _, _, outputs in replay.stages.values() for name in outputs}
    with os.scandir(run) as children:
        others = sorted(c.name for c in itertools.islice(children, 10_000) if c.name not in named)
    for name in itertools.islice((n for n in others if n not in NO_EVIDENCE), 100):
        note(f"in no entry: {name}")
    if replay.signed:
        note(f"root at the last checkpoint: sha256:{replay.signed_root.hex()} over {replay.signed} leaves")
    now = f"root now sha256:{replay.tree.root().hex()}"
    note(f"{replay.count} entries, {replay.tree.size} leaves, {now}, head {replay.head}")


# ---------------------------------------------------------------- documents for strangers


Shares: TypeAlias = "dict[str, Object | None]"
"""The shares that were given, by digest; None for one that does not hold."""


def read_signed(value: Json, key: str | None, findings: Findings, place: str) -> Statement:
    """`checkpoint` of a document: signature over the canonical bytes of the statement, then the statement."""
    parts = an_object(value, {"keyid", "sig", "statement"}, place)
    payload = canonical(parts["statement"], f"{place}: statement")
    check_signature(parts["keyid"], parts["sig"], payload, key, findings, place)
    findings.note(f"signed by {parts['keyid']}; whose key that is, no file can say")
    return read_statement(parts["statement"], CHECKPOINT, str(parts["keyid"]), f"{place}: statement")


def sealed_rows(statement: Statement) -> tuple[int, int]:
    """First leaf and count of the examples that a checkpoint covers."""
    examples = statement.predicate["examples"]
    if not isinstance(examples, dict):
        raise WrongError("checkpoint: examples", examples, "a checkpoint over examples")
    return int(str(examples["first"])), int(str(examples["count"]))


def cut(data: bytes, size: int) -> list[bytes]:
    """Pieces of one size."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def a_path(value: Json, place: str) -> list[bytes]:
    """Digests, one after the other."""
    data = from_base64(value, place)
    if len(data) % 32:
        raise MisshapenError(place, f"{len(data)} bytes", "digests of 32 bytes")
    return cut(data, 32)


def version_of(document: Object) -> int:
    """The version of the leaves that a document is about: the number of its form, which was looked up before."""
    return int(str(document["form"]).rpartition("/")[2])


def check_disclosure(value: Object, key: str | None, findings: Findings, _: Shares) -> None:
    """One field of one row."""
    parts = an_object(value, {"form", "checkpoint", "row", "field", "value", "salt", "path"}, "disclosure")
    statement = read_signed(parts["checkpoint"], key, findings, "checkpoint")
    row, field = whole(parts["row"], "row"), text(parts["field"], "field")
    salt, path = from_base64(parts["salt"], "salt"), a_path(parts["path"], "path")
    first, count = sealed_rows(statement)
    if row >= count:
        raise WrongError("row", row, f"below {count}, the examples under the checkpoint")
    if field != "share" and field not in FIELDS:
        raise WrongError("field", field, f"share or one of {', '.join(FIELDS)}")
    if len(salt) != 16:
        raise WrongError("salt", f"{len(salt)} bytes", "16 bytes")
    if len(path) < (1 if field == "share" else 5):
        raise WrongError("path", f"{len(path)} digests", "the paths in the example and in the tree")
    opened = field_digest(field, salt, parts["value"])
    if field == "share":
        private, share, above = path[0], opened, path[1:]
    else:
        private = root_of_path(opened, FIELDS.index(field), 16, path[:4], "path", field_node)
        share, above = path[4], path[5:]
    leaf = example_leaf(private, share, version_of(parts))
    root = root_of_path(leaf, first + row, statement.size, above, "path")
    if not findings.compare("path: root", root.hex(), statement.root.hex()):
        return
    said = parts["value"]
    shown = said if isinstance(said, str) else canonical(said, field).decode()
    findings.note(f"row {row}, {field}: {told(shown)}")
    if (field, said) == ("gate", "not asked"):
        findings.note(NOT_ASKED)


def check_consistency(value: Object, key: str | None, findings: Findings, _: Shares) -> None:
    """One checkpoint continues another."""
    parts = an_object(value, {"form", "old", "new", "path"}, "consistency")
    old = read_signed(parts["old"], key, findings, "old")
    new = read_signed(parts["new"], key, findings, "new")
    path = a_path(parts["path"], "path")
    check_consistent((old.size, old.root), (new.size, new.root), path, findings)
    findings.note(f"the {new.size} leaves of the new checkpoint are to begin with the {old.size} of the old one")


class Rows(NamedTuple):
    """A share's rows: P and salt of the share of each, place of its class, 1 where it is held out, tokens."""

    classes: list[str]
    private: list[bytes]
    salts: list[bytes]
    places: list[int]
    held_out: list[int]
    tokens: list[int]


def integers(value: Json, place: str, most: int = MAX_INTEGER) -> list[int]:
    """A column of integers."""
    return [whole(item, f"{place} {at}", 0, most) for at, item in enumerate(a_list(value, place))]


def read_rows(value: Object) -> Rows:
    """The columns of a share."""
    classes = [text(name, "classes") for name in a_list(value["classes"], "classes")]
    if classes != sorted(set(classes)):
        raise WrongError("classes", classes, "sorted by code points, without doubles")
    rows = an_object(value["rows"], {"private", "salts", "class", "split", "tokens"}, "rows")
    private, salts = (from_base64(rows[name], f"rows: {name}") for name in ("private", "salts"))
    if len(private) % 32 or len(salts) % 16:
        raise MisshapenError("rows", f"{len(private)} and {len(salts)} bytes", "32 bytes and 16 bytes a row")
    return Rows(
        classes,
        cut(private, 32),
        cut(salts, 16),
        integers(rows["class"], "rows: class"),
        integers(rows["split"], "rows: split"),
        integers(rows["tokens"], "rows: tokens"),
    )


def check_share(value: Object, key: str | None, findings: Findings, _: Shares) -> None:
    """Every row's class and tokens: the root comes out of them, and the sums."""
    keys = {"form", "checkpoint", "before", "classes", "rows", "after", "shares"}
    parts = an_object(value, keys, "share")
    statement = read_signed(parts["checkpoint"], key, findings, "checkpoint")
    first, count = sealed_rows(statement)
    before = [from_base64(one, "before", 32) for one in a_list(parts["before"], "before")]
    after = [from_base64(one, "after", 32) for one in a_list(parts["after"], "after")]
    rows = read_rows(parts)
    lengths = {name: len(column) for name, column in rows._asdict().items() if name != "classes"}
    for name, length in lengths.items():
        findings.compare(f"rows: {name}: rows", length, count)
    findings.compare("before: leaves", len(before), first)
    findings.compare("after: leaves", len(after), statement.size - first - count)
    if set(lengths.values()) != {count}:
        return
    for at, (place, held_out) in enumerate(zip(rows.places, rows.held_out, strict=True)):
        if place >= len(rows.classes) or held_out > 1:
            raise WrongError(f"rows: row {at}", f"class {place}, split {held_out}", "a place in `classes`, and 0 or 1")
    tree, version, sums = Tree(), version_of(parts), [[0, 0] for _ in rows.classes]
    for leaf in before:
        tree.push(leaf)
    for at, (private, salt) in enumerate(zip(rows.private, rows.salts, strict=True)):
        place, split, tokens = rows.places[at], ("train", "held_out")[rows.held_out[at]], rows.tokens[at]
        share: Object = {"class": rows.classes[place], "split": split, "tokens": tokens}
        tree.push(example_leaf(private, field_digest("share", salt, share), version))
        if split == "train":
            sums[place] = [sums[place][0] + 1, sums[place][1] + tokens]
    for leaf in after:
        tree.push(leaf)
    findings.compare("rows: root over all leaves", tree.root().hex(), statement.root.hex())
    check_sums(parts["shares"], rows.classes, sums, findings)


def check_sums(stated: Json, classes: list[str], sums: list[list[int]], findings: Findings) -> None:
    """The stated shares against what the rows add up to."""
    shares = a_list(stated, "shares")
    if len(shares) != len(classes):
        raise WrongError("shares", f"{len(shares)} classes", f"{len(classes)} classes")
    total = sum(tokens for _, tokens in sums)
    for name, (count, tokens), one in zip(classes, sums, shares, strict=True):
        share = an_object(one, {"class", "rows", "tokens"}, "shares")
        for what, found in (("class", name), ("rows", count), ("tokens", tokens)):
            findings.compare(f"shares: {name}: {what}", share[what], found)
        percent = f"{100 * tokens / total:.4g} %" if total else "nothing of nothing"
        findings.note(f"{name}: {percent}, {tokens} supervised tokens in {count} rows")


def check_spot_check(value: Object, key: str | None, findings: Findings, shares: Shares) -> None:
    """The rows that the seed picks are opened, and no others."""
    keys = {"form", "checkpoint", "share", "seed", "draws", "rows"}
    parts = an_object(value, keys, "spot-check")
    statement = read_signed(parts["checkpoint"], key, findings, "checkpoint")
    seed, draws = text(parts["seed"], "seed"), whole(parts["draws"], "draws", 1, MAX_DRAWS)
    named = text(parts["share"], "share", TAGGED)
    if not shares:
        raise UnreadableError("a spot-check is checked with its share: give that file too")
    if named not in shares:
        raise WrongError("share", named, f"the digest of a share that was given: {', '.join(sorted(shares))}")
    share = shares[named]
    if share is None:
        raise WrongError("share", f"{named}, which does not hold", "a share that holds")
    if version_of(share) != version_of(parts):
        raise WrongError("form", parts["form"], f"the version of the share, {share['form']}")
    if share["checkpoint"] != parts["checkpoint"]:
        raise WrongError("checkpoint", told(parts["checkpoint"]), "the checkpoint of the share")
    rows = read_rows(share)
    train = [at for at, held_out in enumerate(rows.held_out) if not held_out]
    sums = list(itertools.accumulate(rows.tokens[at] for at in train))
    if not sums or not sums[-1]:
        raise WrongError("rows", "no supervised tokens", "some, to draw from")
    start = b"limbeck/spot/1" + statement.root + len(seed.encode()).to_bytes(4, "big") + seed.encode()
    picked = set()
    for draw in range(draws):
        x = int.from_bytes(sha256(start, draw.to_bytes(4, "big")), "big") % sums[-1]
        picked.add(train[bisect.bisect_right(sums, x)])
    opened = a_list(parts["rows"], "rows")
    found = [one.get("row") if isinstance(one, dict) else None for one in opened]
    if any(type(at) is not int for at in found) or found != sorted(picked):
        raise WrongError("rows", found, f"{sorted(picked)}, those that the seed picks")
    for at, one in zip(sorted(picked), opened, strict=True):
        findings.attempt(lambda at=at, one=one: check_opened(at, one, rows, findings))
    findings.note(f"{draws} draws by the seed {told(seed)} opened {len(picked)} rows")


def digest_in(value: Json) -> Json:
    """The digest in a field's value. Of `response`, leaves of version 2 have it beside the provider's id."""
    return value.get("digest") if isinstance(value, dict) else value


def check_opened(row: int, value: Json, rows: Rows, findings: Findings) -> None:
    """One opened row against the share."""
    place = f"rows: row {row}"
    raw = {"request", "response"} & set(value) if isinstance(value, dict) else set()
    parts = an_object(value, {"row", "fields", "salts"} | raw, place)
    fields = an_object(parts["fields"], set(FIELDS), f"{place}: fields")
    salts = cut(from_base64(parts["salts"], f"{place}: salts", 256), 16)
    level = [field_digest(name, salt, fields[name]) for name, salt in zip(FIELDS, salts, strict=True)]
    while len(level) > 1:
        level = [field_node(level[at], level[at + 1]) for at in range(0, len(level), 2)]
    findings.compare(f"{place}: fields: P", level[0].hex(), rows.private[row].hex())
    findings.compare(f"{place}: class", rows.classes[rows.places[row]], fields["teacher"])
    for name in sorted(raw):
        made = tagged(from_base64(parts[name], f"{place}: {name}"))
        findings.compare(f"{place}: {name}", made, digest_in(fields[name]))


FORMS: dict[str, Callable[[Object, str | None, Findings, Shares], None]] = {
    **{f"limbeck-share/{version}": check_share for version in EXAMPLE},
    **{f"limbeck-disclosure/{version}": check_disclosure for version in EXAMPLE},
    **{f"limbeck-spot-check/{version}": check_spot_check for version in EXAMPLE},
    "limbeck-consistency/1": check_consistency,
}


def check_envelope(value: Object, key: str | None, findings: Findings, _: Shares) -> None:
    """A checkpoint that was written to a file of its own."""
    statement = read_envelope(value, CHECKPOINT, key, findings, "checkpoint")
    findings.note(f"signed by {statement.keyid}; whose key that is, no file can say")
    findings.note(f"{statement.predicate['kind']}: root {statement.root.hex()} over {statement.size} leaves")


def verify_documents(paths: list[str], key: str | None = None) -> Findings:
    """Checks proofs; shares first, since spot-checks lean on them. Raises `UnreadableError`."""
    findings, read = Findings(), []
    shares: Shares = {}
    for path in paths:
        data = read_small(path, MAX_DOCUMENT).removesuffix(b"\n")
        try:
            value = read_canonical(data, path)
        except WrongError as wrong:
            raise UnreadableError(
                f"{wrong.place}: found {told(wrong.found)}, expected {told(wrong.expected)}"
            ) from None
        form = value.get("form") if isinstance(value, dict) else None
        check = FORMS.get(form) if isinstance(form, str) else None
        if isinstance(value, dict) and "payloadType" in value:
            check = check_envelope
        if not isinstance(value, dict) or check is None:
            raise UnreadableError(
                f"{path}: form {told(form)}; this verifier reads {', '.join(sorted(FORMS))}, and checkpoints"
            )
        read.append((path, value, check, tagged(data)))
    for path, value, check, digest in sorted(read, key=lambda one: one[2] is not check_share):
        within = Findings()
        try:
            check(value, key, within, shares)
        except MisshapenError as wrong:
            reason = f"{wrong.place}: found {told(wrong.found)}, expected {told(wrong.expected)}"
            raise UnreadableError(f"{path}: {reason}") from None
        except WrongError as wrong:
            within.add(wrong.place, wrong.found, wrong.expected)
        if check is check_share:
            shares[digest] = None if within.differences else value
        for place, found, expected in within.differences:
            findings.add(f"{path}: {place}", found, expected)
        for note in within.notes:
            findings.note(f"{path}: {note}")
    findings.note("unanchored: a proof says who signed, and nothing but the signer's own clock says when")
    return findings


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """The command: reads arguments, prints findings, gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="RUN|PROOF", help="a RUN directory, or files of proofs")
    parser.add_argument("--key", help="the public key, 64 hexadecimal digits, that has to have signed")
    parser.add_argument("--head", metavar="DIGEST", help="a head digest that the ledger still has to hold")
    parser.add_argument("--checkpoint", metavar="FILE", action="append", default=[], help="one that was kept elsewhere")
    given = parser.parse_args(arguments)
    try:
        findings = verify(given.what, given.key, given.head, tuple(given.checkpoint))
    except (UnreadableError, OSError) as error:
        print(f"cannot be read: {printable(str(error))}", file=sys.stderr)
        return 2
    for note in findings.notes:
        print(f"note: {note}")
    differences = findings.sorted()
    for place, found, expected in differences:
        print(f"{place}\n  found:    {found}\n  expected: {expected}")
    print(f"{len(differences)} differences" if differences else "verified: nothing differs")
    return 1 if differences else 0


def verify(what: list[str], key: str | None, head: str | None, kept: tuple[str, ...]) -> Findings:
    """A RUN directory, or proofs. Raises `UnreadableError`."""
    if key is not None and not HEX_32.fullmatch(key):
        raise UnreadableError(f"--key {key}: not 64 lower-case hexadecimal digits, as a checkpoint's `keyid` has them")
    if head is not None and not TAGGED.fullmatch(head):
        raise UnreadableError(
            f"--head {head}: not sha256: and 64 lower-case hexadecimal digits, as a verification ends with"
        )
    folders = [path for path in what if os.path.isdir(path)]
    if not folders:
        if head is not None or kept:
            raise UnreadableError("--head and --checkpoint are for a RUN directory")
        return verify_documents(what, key)
    if len(what) > 1:
        raise UnreadableError(f"{folders[0]}: one RUN directory by itself, or proofs by themselves")
    return verify_run(what[0], key, head, kept)


if __name__ == "__main__":
    sys.exit(main())
