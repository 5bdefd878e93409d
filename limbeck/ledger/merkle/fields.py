"""An example as the ledger hashes it: sixteen salted fields, and a share that can be opened beside them.

    leaf = H(00 | V | P | S)    V: a byte for the version    P: root over the fields' digests    S: digest of the share

docs/ledger-format.md is the contract. What an example's fields say comes from `limbeck.ledger.sealing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from limbeck.ledger.canonical import canonical
from limbeck.ledger.merkle.salts import SALT, Salts
from limbeck.ledger.merkle.tree import Hash, inclusion_path, leaf_hash, root, root_from_path, subtree_of

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

FIELD, FIELD_NODE = b"\x02", b"\x03"
"""Stand before what is hashed of a field, and of two of their hashes."""
_ENTRY = b"\x02"


def whole_number(value: object) -> object:
    """The value itself. Raises `ValueError` for `true`, which pydantic takes for the literal 1."""
    if type(value) is not int:
        raise ValueError(f"{value!r}, expected an integer")
    return value


Version = Annotated[Literal[1, 2], BeforeValidator(whole_number)]
"""Of an example's leaf. From 2 on its parents are named with their kinds, and those of its prompt are among them, and
it says how the provider names the answer, and the weights that gave it."""
NEWEST: Version = 2
"""What is written now; the others are read."""
EXAMPLE: dict[Version, bytes] = {1: b"\x01", 2: b"\x03"}
"""Stands before what is hashed of an example, so that a leaf of one version cannot be taken for one of another."""


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
    return sha256(FIELD + salt + bytes([len(name)]) + name.encode() + data).digest()


def fields_root(digests: Sequence[Hash]) -> Hash:
    """P, from the digests of the fields in their order."""
    return root(digests, FIELD_NODE)


def fields_path(digests: Sequence[Hash], place: int) -> list[Hash]:
    """From a field's digest to P."""
    return inclusion_path(subtree_of(digests, FIELD_NODE), place, len(digests))


def fields_root_from_path(digest: Hash, place: int, path: Sequence[Hash]) -> Hash:
    """The P that a path leads to. Raises `ValueError` for a path of the wrong length."""
    return root_from_path(digest, place, len(FIELDS), path, FIELD_NODE)


def example_hash(private: Hash, share: Hash, version: Version) -> Hash:
    """Hash of an example's leaf."""
    return leaf_hash(EXAMPLE[version] + private + share)


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
        told = (f'"{name}":{value.decode()}' for name, value in zip(FIELDS, self.fields, strict=True))
        return f"{{{','.join(told)}}}"


def encode(leaf: Leaf) -> Encoded:
    """The canonical bytes of one leaf. Raises `ValueError` for values JSON cannot say exactly."""
    share = leaf.share
    return Encoded(tuple(map(canonical, leaf.fields)), share_bytes(canonical(share.teacher), share.split, share.tokens))


def share_bytes(teacher: bytes, split: str, tokens: int) -> bytes:
    """The canonical bytes of a share, from those of its class: its names are sorted, and only a class needs escapes."""
    return b'{"class":%b,"split":"%b","tokens":%d}' % (teacher, split.encode(), tokens)


def commit(salts: Salts, row: int, encoded: Encoded, version: Version) -> Committed:
    """The hashes of a row."""
    own = salts.row(row, len(FIELDS) + 1)
    digests = [field_digest(*field) for field in zip(FIELDS, own[:-1], encoded.fields, strict=True)]
    private, share = root(digests, FIELD_NODE), field_digest(SHARE, own[-1], encoded.share)
    return Committed(own, digests, private, share, example_hash(private, share, version))


def salts_of(data: bytes) -> list[bytes]:
    """Salts that lie one after the other."""
    return [data[i : i + SALT] for i in range(0, len(data), SALT)]
