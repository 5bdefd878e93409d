"""Writes a ledger anew, consistently, by the documentation alone: neither verifier's code is used."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import rfc8785
import runs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

TYPE = "application/vnd.in-toto+json"
FACTS = ("checkpoint", "note")
"""Stages whose one fact is an envelope."""


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def tagged(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def root(leaves: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written there."""
    if len(leaves) < 2:
        return leaves[0] if leaves else sha()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return sha(b"\x01", root(leaves[:split]), root(leaves[split:]))


def envelope(statement: object, key: Ed25519PrivateKey) -> dict:
    """A DSSE envelope."""
    payload = statement if isinstance(statement, bytes) else rfc8785.dumps(statement)  # type: ignore[arg-type]
    message = b"DSSEv1 %d %s %d %s" % (len(TYPE), TYPE.encode(), len(payload), payload)
    signature = {"keyid": keyid(key), "sig": base64.b64encode(key.sign(message)).decode()}
    return {"payload": base64.b64encode(payload).decode(), "payloadType": TYPE, "signatures": [signature]}


def keyid(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def statement_of(envelope: dict) -> dict:
    return json.loads(base64.b64decode(envelope["payload"]))


def read(run: Path) -> tuple[list[dict], list[bytes]]:
    """The entries, and the leaf hashes."""
    with closing(sqlite3.connect(run / "ledger.db")) as db:
        bodies = [json.loads(body) for (body,) in db.execute("SELECT body FROM entries ORDER BY idx")]
        data = b"".join(data for (data,) in db.execute("SELECT data FROM hashes ORDER BY first"))
    return bodies, [data[at : at + 32] for at in range(0, len(data), 32)]


def example_leaves(bodies: list[dict], leaves: list[bytes]) -> dict[int, list[bytes]]:
    """Leaves of the examples that each entry sealed, by its place."""
    found, at = {}, 0
    for place, body in enumerate(bodies):
        count = body["facts"].get("leaves", {}).get("count", 0)
        found[place] = leaves[at : at + count]
        at += count + 1
    return found


def rewrite(
    run: Path,
    change: Callable[[list[dict], dict[int, list[bytes]]], object],
    *,
    key: Ed25519PrivateKey,
    resign: bool = True,
    form: Callable[[dict, bytes], bytes] = lambda body, data: data,
) -> None:
    """Changes entries and example leaves, then makes indices, chain, tree and signatures agree with them again.

    `form` may give a body other bytes than its canonical ones; an entry with `keep envelope` is not signed anew.
    """
    bodies, leaves = read(run)
    examples = example_leaves(bodies, leaves)
    change(bodies, examples)
    made, rows, previous, seal = [], [], tagged(b""), None
    for index, body in enumerate(bodies):
        kept = body.pop("keep envelope", False)
        own = examples.get(index, [])
        if "leaves" in body["facts"]:
            seal = {"count": len(own), "first": len(made)}
        made += own
        if body["stage"] in FACTS and resign and not kept:
            said = statement_of(body["facts"]["envelope"])
            said["subject"][0]["digest"]["sha256"] = root(made).hex()
            said["predicate"]["size"] = len(made)
            if "examples" in said["predicate"]:
                said["predicate"]["examples"] = seal
            body["facts"] = {"envelope": envelope(said, key)}
        body |= {"index": body.get("index at", index), "previous": body.get("previous at", previous)}
        body.pop("index at", None)
        body.pop("previous at", None)
        data = form(body, rfc8785.dumps(body))
        previous = tagged(data)
        rows.append((index, previous, data.decode()))
        made.append(sha(b"\x00\x02", sha(data)))
    write(run, rows, made)


def write(run: Path, rows: list[tuple[int, str, str]], leaves: list[bytes]) -> None:
    """Puts entries and leaf hashes in the place of those that are there (fewer than 256 leaves)."""
    statements: list[tuple[str, tuple[object, ...]]] = [("DELETE FROM entries", ()), ("DELETE FROM hashes", ())]
    statements += [("INSERT INTO entries VALUES (?, ?, ?)", row) for row in rows]
    statements += [("INSERT INTO hashes VALUES (?, ?)", (0, b"".join(leaves)))]
    runs.forge(run / "ledger.db", *statements)
