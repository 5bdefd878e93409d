"""An example as the ledger hashes it: sixteen salted fields, and a share that can be opened beside them.

    leaf = H(00 | 01 | P | S)    P: root over the fields' digests    S: digest of the share

docs/ledger-format.md is the contract. What an example's fields say comes from `limbeck.ledger.sealing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from json.encoder import encode_basestring as quoted
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from limbeck.ledger.canonical import canonical
from limbeck.ledger.merkle.salts import SALT, Salts
from limbeck.ledger.merkle.tree import LEAF, Hash, inclusion_path, leaf_hash, root, root_from_path, subtree_of

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
"""The private fields of an example, sorted."""
SHARE = "share"

NOT_ASKED = "not asked"
"""The gate's decision where no gate was asked."""

_FIELD, _NODE = b"\x02", b"\x03"
_EXAMPLE, _ENTRY = b"\x01", b"\x02"


class Share(BaseModel):
    """What a leaf counts for."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    teacher: str = Field(alias="class")
    split: Literal["train", "held_out"]
    tokens: int = Field(ge=0, lt=2**53)
    """Supervised tokens."""

    def value(self) -> dict[str, JsonValue]:
        """As it is hashed."""
        return {"class": self.teacher, "split": self.split, "tokens": self.tokens}


class Leaf(NamedTuple):
    """One kept example, as the ledger commits to it."""

    fields: tuple[JsonValue, ...]
    """Values, in the order of `FIELDS`."""
    share: Share

    @property
    def values(self) -> dict[str, JsonValue]:
        """The private fields by name."""
        return dict(zip(FIELDS, self.fields, strict=True))


def field_digest(name: str, salt: bytes, data: bytes) -> Hash:
    """Digest of a field whose value's canonical bytes are `data`."""
    return sha256(_FIELD + salt + bytes([len(name)]) + name.encode() + data).digest()


def fields_root(digests: Sequence[Hash]) -> Hash:
    """P, from the digests of the fields in their order."""
    return root(digests, _NODE)


def fields_path(digests: Sequence[Hash], place: int) -> list[Hash]:
    """From a field's digest to P."""
    return inclusion_path(subtree_of(digests, _NODE), place, len(digests))


def fields_root_from_path(digest: Hash, place: int, path: Sequence[Hash]) -> Hash:
    """The P that a path leads to. Raises `ValueError` for a path of the wrong length."""
    return root_from_path(digest, place, len(FIELDS), path, _NODE)


def example_hash(private: Hash, share: Hash) -> Hash:
    """Hash of an example's leaf."""
    return leaf_hash(_EXAMPLE + private + share)


def entry_hash(body: bytes) -> Hash:
    """Hash of an entry's leaf."""
    return leaf_hash(_ENTRY + sha256(body).digest())


class Committed(NamedTuple):
    """A leaf with what its commitments are made of."""

    salts: list[bytes]
    """In the order of `FIELDS`; the share's comes last."""
    digests: list[Hash]
    """Of the private fields."""
    private: Hash
    share: Hash
    hash: Hash


class Encoded(NamedTuple):
    """The canonical bytes of a leaf's values."""

    fields: tuple[bytes, ...]
    share: bytes

    def text(self) -> str:
        """The canonical JSON object of the private fields."""
        return (_OBJECT % self.fields).decode()


class Encoder:
    """Makes values canonical. A set has few ways of sampling and few writers, in objects that many rows share."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[JsonValue, bytes]] = {}

    def encode(self, leaf: Leaf) -> Encoded:
        """Raises `ValueError` for values JSON cannot say exactly."""
        share = leaf.share
        fields = tuple([quoted(v).encode() if type(v) is str else self._nested(v) for v in leaf.fields])
        return Encoded(fields, share_bytes(canonical(share.teacher), share.split, share.tokens))

    def _nested(self, value: JsonValue) -> bytes:
        if type(value) is list and len(value) == 1 and type(value[0]) is str:  # one parent, another in each row
            return f"[{quoted(value[0])}]".encode()
        if not value or not (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], list))):
            return canonical(value)
        known = self._known.get(id(value))
        if known is None:
            known = (value, canonical(value))
            if len(self._known) < _REMEMBERED:
                self._known[id(value)] = known  # holds the object, so no other gets its id
        return known[1]


_REMEMBERED = 1024


def encode(leaf: Leaf) -> Encoded:
    """The canonical bytes of one leaf."""
    return Encoder().encode(leaf)


def share_bytes(teacher: bytes, split: str, tokens: int) -> bytes:
    """The canonical bytes of a share, from those of its class: its names are sorted, and only a class needs escapes."""
    return b'{"class":%b,"split":"%b","tokens":%d}' % (teacher, split.encode(), tokens)


_OBJECT = b"{%b}" % b",".join(b'"%b":%%b' % name.encode() for name in FIELDS)
_PREFIXES = tuple(bytes([len(name)]) + name.encode() for name in FIELDS)
_SHARE = bytes([len(SHARE)]) + SHARE.encode()
_LEAF_EXAMPLE = LEAF + _EXAMPLE
_SALTS_AT = tuple(range(0, SALT * len(FIELDS), SALT))


def commit(salts: Salts, row: int, encoded: Encoded) -> Committed:
    """The hashes of a row."""
    own = salts.row(row, len(FIELDS) + 1)
    digests = [
        sha256(_FIELD + salt + prefix + data).digest()
        for salt, prefix, data in zip(own, _PREFIXES, encoded.fields, strict=False)
    ]
    private, share = root(digests, _NODE), field_digest(SHARE, own[-1], encoded.share)
    return Committed(own, digests, private, share, example_hash(private, share))


def commit_hash(salts: Salts, row: int, encoded: Encoded) -> Hash:
    """The hash of `commit` alone, in less time: sealing and verifying want no more of a million rows."""
    data = salts.row_bytes(row, len(FIELDS) + 1)
    level = [
        sha256(_FIELD + data[at : at + SALT] + prefix + value).digest()
        for at, prefix, value in zip(_SALTS_AT, _PREFIXES, encoded.fields, strict=True)
    ]
    while len(level) > 1:  # a whole tree: the number of fields is a power of two
        level = [sha256(_NODE + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=True)]
    share = sha256(_FIELD + data[-SALT:] + _SHARE + encoded.share).digest()
    return sha256(_LEAF_EXAMPLE + level[0] + share).digest()


def salts_of(data: bytes) -> list[bytes]:
    """Salts that lie one after the other."""
    return [data[i : i + SALT] for i in range(0, len(data), SALT)]
