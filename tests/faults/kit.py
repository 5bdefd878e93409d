"""What faults of a RUN directory are made of. Each is done to a copy of a good one; nothing else differs."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import runs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from faults import forger


class Case(NamedTuple):
    """What a fault may use: the copy, the signing key, another run of the same recipe, a checkpoint that was kept."""

    run: Path
    key: Ed25519PrivateKey
    other: Path
    kept: Path

    def rewrite(self, change: Callable, **options) -> None:
        forger.rewrite(self.run, change, key=self.key, **options)

    def sql(self, statement: str, *values: object) -> None:
        runs.forge(self.run / "ledger.db", (statement, values))

    def journal(self, statement: str) -> None:
        with closing(sqlite3.connect(self.run / "journal.db")) as db:
            db.execute(statement)
            db.commit()

    def raw_sql(self, *statements: str) -> None:
        """Without putting the triggers back."""
        with closing(sqlite3.connect(self.run / "ledger.db")) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()


class Fault(NamedTuple):
    """A fault, and a word of the place that each verifier has to name."""

    name: str
    do: Callable[[Case], object]
    place: str
    """What the second verifier has to print."""
    first: str | None = None
    """What the first has to print, where its words for the place are others."""
    options: tuple[str, ...] = ()
    """Options of both, with KEY for the key that has to have signed, KEPT for a checkpoint, HEAD for a head digest."""
    unseen: str = ""
    """Why the second verifier cannot see it, where it cannot."""


def flip(name: str, at: int = -1, bit: int = 1) -> Callable[[Case], None]:
    """One bit of one file; by default in its middle."""

    def do(case: Case) -> None:
        data = bytearray((case.run / name).read_bytes())
        data[at if at >= 0 else len(data) // 2] ^= bit
        (case.run / name).write_bytes(data)

    return do


def change(index: int, **values: object) -> Callable[[Case], None]:
    """Keys of one entry set to other values, and everything made to agree with it."""
    return lambda case: case.rewrite(lambda bodies, _: bodies[index].update(values))


def facts(index: int, **values: object) -> Callable[[Case], None]:
    return lambda case: case.rewrite(lambda bodies, _: bodies[index]["facts"].update(values))


def said(index: int, edit: Callable[[dict], object], sign: bool = True) -> Callable[[Case], None]:
    """What a checkpoint or note says, signed anew, or with the old signature."""

    def do(case: Case) -> None:
        def edit_one(bodies: list[dict], _: object) -> None:
            old = bodies[index]["facts"]["envelope"]
            statement = forger.statement_of(old)
            edit(statement)
            new = forger.envelope(statement, case.key)
            if not sign:
                new["signatures"] = old["signatures"]
            bodies[index] |= {"facts": {"envelope": new}, "keep envelope": True}

        case.rewrite(edit_one)

    return do


def enveloped(index: int, edit: Callable[[dict], object]) -> Callable[[Case], None]:
    """The envelope itself."""

    def do(case: Case) -> None:
        def edit_one(bodies: list[dict], _: object) -> None:
            edit(bodies[index]["facts"]["envelope"])
            bodies[index]["keep envelope"] = True

        case.rewrite(edit_one)

    return do


def formed(index: int, old: bytes, new: bytes) -> Callable[[Case], None]:
    """Other bytes for the same value in one body, and digest, chain, tree and signatures made to agree."""

    def form(body: dict, data: bytes) -> bytes:
        if body["index"] != index:
            return data
        assert old in data, (old, data)
        return data.replace(old, new, 1)

    return lambda case: case.rewrite(lambda *_: None, form=form)


def dropped(case: Case) -> None:
    case.rewrite(lambda bodies, examples: bodies.pop(3), resign=False)


def put(bodies: list[dict], examples: dict, order: list[int]) -> None:
    """Entries in another order, with their example leaves."""
    old, leaves = list(bodies), dict(examples)
    bodies[:] = [json.loads(json.dumps(old[at])) for at in order]
    examples.clear()
    examples.update({place: leaves[at] for place, at in enumerate(order)})


def replaced_envelope(index: int, find: Callable[[Case], dict]) -> Callable[[Case], None]:
    def do(case: Case) -> None:
        new = find(case)
        case.rewrite(lambda bodies, _: bodies[index].update({"facts": {"envelope": new}, "keep envelope": True}))

    return do


def envelope_of(run: Path, index: int) -> dict:
    return forger.read(run)[0][index]["facts"]["envelope"]


def resigned(case: Case) -> None:
    case.rewrite(lambda bodies, _: bodies[0]["facts"].update(rows=7))


def by_another(case: Case) -> None:
    forger.rewrite(case.run, lambda *_: None, key=Ed25519PrivateKey.generate())


def junk(name: str) -> Callable[[Case], None]:
    """A file beside the good ones, of bytes that nothing wrote."""

    def do(case: Case) -> None:
        (case.run / name).write_bytes(b"junk" * 1024)

    return do


def linked(name: str) -> Callable[[Case], None]:
    """The same bytes, but a link to them."""

    def do(case: Case) -> None:
        path = case.run / name
        outside = case.run.parent / f"outside-{path.name}"
        shutil.move(path, outside)
        os.symlink(outside, path)

    return do


def named(path: str) -> Callable[[Case], None]:
    """The report's entry says that it wrote this path; the bytes there are what the entry says."""

    def do(case: Case) -> None:
        (case.run.parent / "outside.html").write_bytes((case.run / "report.html").read_bytes())

        def edit(bodies: list[dict], _: object) -> None:
            digest = bodies[13]["outputs"].pop("report.html")
            bodies[13]["outputs"][path.replace("OUTSIDE", str(case.run.parent))] = digest

        case.rewrite(edit)

    return do


def hashes(edit: Callable[[list[bytes]], list[bytes]]) -> Callable[[Case], None]:
    """The stored leaf hashes alone."""

    def do(case: Case) -> None:
        _, leaves = forger.read(case.run)
        with closing(sqlite3.connect(case.run / "ledger.db")) as db:
            rows = db.execute("SELECT idx, digest, body FROM entries ORDER BY idx").fetchall()
        forger.write(case.run, rows, edit(leaves))

    return do


def node_for_leaf(leaves: list[bytes]) -> list[bytes]:
    return [*leaves[:6], forger.sha(b"\x01", leaves[6], leaves[7]), *leaves[8:]]


def swapped(leaves: list[bytes], a: int, b: int) -> list[bytes]:
    leaves[a], leaves[b] = leaves[b], leaves[a]
    return leaves


def half_byte(text: str) -> str:
    """Base64 of other bytes of the same number."""
    data = bytearray(base64.b64decode(text))
    data[3] ^= 1
    return base64.b64encode(data).decode()
