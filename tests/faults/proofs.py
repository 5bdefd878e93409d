"""Faults of what is handed to strangers: a disclosure, a share, a spot-check, a consistency proof."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from faults import forger

Doc = dict


class Proofs(NamedTuple):
    """Good documents of one run, documents of another run, and the key that signed."""

    docs: dict[str, Doc]
    others: dict[str, Doc]
    key: Ed25519PrivateKey


class Fault(NamedTuple):
    """A fault of a document: its new bytes, and a word of the place that the second verifier has to name."""

    name: str
    form: str
    make: Callable[[Proofs], bytes | Doc]
    place: str
    options: tuple[str, ...] = ()
    first: str = ""
    """What the first has to print."""


def edit(form: str, change: Callable[[Doc], object]) -> Callable[[Proofs], Doc]:
    """A copy of a document, changed in place."""

    def make(proofs: Proofs) -> Doc:
        copy = json.loads(json.dumps(proofs.docs[form]))
        change(copy)
        return copy

    return make


def bytes_of(form: str, old: bytes, new: bytes) -> Callable[[Proofs], bytes]:
    def make(proofs: Proofs) -> bytes:
        data = rfc8785.dumps(proofs.docs[form])
        assert old in data, (old, data)
        return data.replace(old, new, 1)

    return make


def decoded(holder: Doc, key: str, change: Callable[[bytearray], object]) -> None:
    """Other bytes in the place of what stands there as base64."""
    data = bytearray(base64.b64decode(holder[key]))
    changed = change(data)
    holder[key] = base64.b64encode(changed if isinstance(changed, bytes | bytearray) else data).decode()


def flip(holder: Doc, key: str, at: int = 3) -> None:
    def one(data: bytearray) -> None:
        data[at] ^= 1

    decoded(holder, key, one)


def swap(items: list, a: int, b: int) -> None:
    items[a], items[b] = items[b], items[a]


def swap_pieces(holder: Doc, key: str, size: int) -> None:
    """The first two of the pieces of this size change places."""
    decoded(holder, key, lambda data: data[size : 2 * size] + data[:size] + data[2 * size :])


def signed_anew(form: str, change: Callable[[Doc], object]) -> Callable[[Proofs], Doc]:
    """Another statement under the same key."""

    def make(proofs: Proofs) -> Doc:
        def one(doc: Doc) -> None:
            for name in ("checkpoint",) if "checkpoint" in doc else ("old", "new"):
                statement = doc[name]["statement"]
                change(statement)
                signature = forger.envelope(statement, proofs.key)["signatures"][0]
                doc[name] = {"statement": statement} | signature

        return edit(form, one)(proofs)

    return make


def another_key(form: str) -> Callable[[Proofs], Doc]:
    return lambda proofs: signed_anew(form, lambda _: None)(proofs._replace(key=Ed25519PrivateKey.generate()))


def others(form: str, key: str) -> Callable[[Proofs], Doc]:
    """One key of the document as another log's document has it."""
    return lambda proofs: proofs.docs[form] | {key: proofs.others[form][key]}


def deep(proofs: Proofs) -> bytes:
    return b'{"form":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def nested(depth: int) -> Callable[[Doc], None]:
    def one(doc: Doc) -> None:
        for _ in range(depth):
            doc["value"] = [doc["value"]]

    return one


def huge_path(doc: Doc) -> None:
    doc["path"] = base64.b64encode(bytes(32) * 10_000).decode()


def moved(doc: Doc) -> None:
    """One supervised token of the first row counts for the second."""
    doc["rows"]["tokens"][0] -= 1
    doc["rows"]["tokens"][1] += 1
    for row, step in ((0, -1), (1, 1)):
        doc["shares"][doc["rows"]["class"][row]]["tokens"] += step


def without_row(doc: Doc) -> None:
    for name, size in (("private", 32), ("salts", 16)):
        decoded(doc["rows"], name, lambda data, size=size: data[size:])
    for name in ("class", "split", "tokens"):
        del doc["rows"][name][0]


def leaf_as_node(doc: Doc) -> None:
    """The path begins one level higher, as if the example's leaf were the node above it."""
    decoded(doc, "path", lambda data: data[: 5 * 32] + data[6 * 32 :])


def exchanged(doc: Doc) -> None:
    doc["old"], doc["new"] = doc["new"], doc["old"]


def not_picked(proofs: Proofs) -> Doc:
    """One draw, and another row opened than the one it picks (monetary-unit sampling, done slowly)."""
    spot, share = json.loads(json.dumps(proofs.docs["spot-check"])), proofs.docs["share"]
    tokens = [0 if held else n for held, n in zip(share["rows"]["split"], share["rows"]["tokens"], strict=True)]
    root = bytes.fromhex(share["checkpoint"]["statement"]["subject"][0]["digest"]["sha256"])
    seed = spot["seed"].encode()
    drawn = forger.sha(b"limbeck/spot/1", root, len(seed).to_bytes(4, "big"), seed, bytes(4))
    x = int.from_bytes(drawn, "big") % sum(tokens)
    picked = next(row for row in range(len(tokens)) if sum(tokens[: row + 1]) > x)
    spot |= {"draws": 1, "rows": [opened for opened in spot["rows"] if opened["row"] != picked][:1]}
    assert spot["rows"]
    return spot


NOTE = "urn:x-limbeck:note:1"
D, S, P, C = "disclosure", "share", "spot-check", "consistency"
ROOT = "00" * 32


def root_away(statement: Doc) -> None:
    statement["subject"][0]["digest"]["sha256"] = ROOT


FORMS = [
    fault
    for form in (D, S, P, C)
    for name in ("old" if form == C else "checkpoint",)
    for fault in (
        Fault("a bit flipped in the signature", form, edit(form, lambda d, n=name: flip(d[n], "sig")), "sig"),
        Fault(
            "a later clock under the old signature",
            form,
            edit(form, lambda d, n=name: d[n]["statement"]["predicate"].update(at="2030-01-01T00:00:00Z")),
            "sig",
        ),
        Fault("another root, signed", form, signed_anew(form, root_away), "checkpoint" if form == P else "root"),
        Fault(
            "another key where one is demanded",
            form,
            another_key(form),
            "keyid",
            ("--key", "KEY"),
            "a spot-check at the checkpoint" if form == P else "signed by",
        ),
        Fault(
            "a note in the place of a checkpoint",
            form,
            signed_anew(form, lambda s: s.update(predicateType=NOTE)),
            "predicateType",
        ),
        Fault("a key too many", form, edit(form, lambda d: d.update(more=1)), "more"),
        Fault("a key too few", form, edit(form, lambda d, n=name: d.pop(n)), name),
        Fault("another version", form, edit(form, lambda d: d.update(form=d["form"][:-1] + "3")), "form"),
        Fault("not canonical: spaces", form, lambda p, f=form: json.dumps(p.docs[f]).encode(), "byte"),
        Fault("not canonical: a letter as an escape", form, bytes_of(form, b'"form"', b'"\\u0066orm"'), "byte"),
        Fault("two line feeds at the end", form, lambda p, f=form: rfc8785.dumps(p.docs[f]) + b"\n\n", "byte"),
        Fault("a byte order mark", form, lambda p, f=form: b"\xef\xbb\xbf" + rfc8785.dumps(p.docs[f]), "JSON"),
        Fault("cut off", form, lambda p, f=form: rfc8785.dumps(p.docs[f])[:-1], "JSON"),
        Fault("a key twice", form, bytes_of(form, b'"form":', b'"form":1,"form":'), "twice"),
        Fault("UTF-16", form, lambda p, f=form: json.dumps(p.docs[f]).encode("utf-16"), "JSON"),
    )
]

DISCLOSURES = [
    Fault("another value", D, edit(D, lambda d: d.update(value="x")), "path: root"),
    Fault(
        "another form of the same letters",
        D,
        edit(D, lambda d: d.update(value="own\u2010model")),
        "path: root",
        first="the path leads to root",
    ),
    Fault("a value nested deeply", D, edit(D, nested(100)), "nested"),
    Fault("65 levels", D, edit(D, nested(64)), "nested"),
    Fault("another row", D, edit(D, lambda d: d.update(row=d["row"] + 1)), "path: root"),
    Fault("a row that is not", D, edit(D, lambda d: d.update(row=5)), "row"),
    Fault("a negative row", D, edit(D, lambda d: d.update(row=-1)), "row"),
    Fault("row true", D, edit(D, lambda d: d.update(row=True)), "row"),
    Fault(
        "a row with a point", D, bytes_of(D, b'"row":1', b'"row":1.0'), "byte", first="Input should be a valid integer"
    ),
    Fault("a row of 2^64", D, bytes_of(D, b'"row":1', b'"row":18446744073709551616'), "2^53", first="2^53"),
    Fault("another field", D, edit(D, lambda d: d.update(field="teacher")), "path: root"),
    Fault("a field that is not", D, edit(D, lambda d: d.update(field="nothing")), "field"),
    Fault("another salt", D, edit(D, lambda d: flip(d, "salt")), "path: root"),
    Fault("a longer salt", D, edit(D, lambda d: decoded(d, "salt", lambda b: b + b"x")), "salt"),
    Fault("base64 with spare bits", D, edit(D, lambda d: d.update(salt=d["salt"][:-3] + "x==")), "salt"),
    *(
        Fault(
            f"a bit flipped in digest {at} of the path",
            D,
            edit(D, lambda d, at=at: flip(d, "path", 32 * at)),
            "path: root",
        )
        for at in range(9)
    ),
    Fault("two digests of the path exchanged", D, edit(D, lambda d: swap_pieces(d, "path", 32)), "path: root"),
    Fault("a digest too few", D, edit(D, lambda d: decoded(d, "path", lambda b: b[:-32])), "path"),
    Fault("a digest too many", D, edit(D, lambda d: decoded(d, "path", lambda b: b + bytes(32))), "path"),
    Fault("half of a digest", D, edit(D, lambda d: decoded(d, "path", lambda b: b[:-16])), "path"),
    Fault("no path", D, edit(D, lambda d: d.update(path="")), "path"),
    Fault("a path of 10,000 digests", D, edit(D, huge_path), "path"),
    Fault("a leaf taken for a node", D, edit(D, leaf_as_node), "path", first="an inclusion path that is too short"),
    Fault("the checkpoint of another log", D, others(D, "checkpoint"), "path: root", first="the path leads to root"),
    Fault("the path of another log", D, others(D, "path"), "path: root", first="the path leads to root"),
    Fault(
        "no examples under the checkpoint",
        D,
        signed_anew(D, lambda s: s["predicate"].update(examples=None)),
        "examples",
    ),
    Fault(
        "more examples than leaves",
        D,
        signed_anew(D, lambda s: s["predicate"]["examples"].update(count=2**50)),
        "examples",
    ),
    Fault("deep JSON", D, deep, "nested"),
]

SHARES = [
    Fault("tokens moved from row to row", S, edit(S, moved), "root over"),
    Fault("tokens changed", S, edit(S, lambda d: d["rows"]["tokens"].__setitem__(0, 9)), "root over"),
    Fault("tokens true", S, edit(S, lambda d: d["rows"]["tokens"].__setitem__(0, True)), "tokens"),
    Fault("negative tokens", S, edit(S, lambda d: d["rows"]["tokens"].__setitem__(0, -4)), "tokens"),
    Fault("another class for a row", S, edit(S, lambda d: swap(d["rows"]["class"], 1, 2)), "root over"),
    Fault("a class that is not", S, edit(S, lambda d: d["rows"]["class"].__setitem__(0, 7)), "row 0"),
    Fault("a split that is not", S, edit(S, lambda d: d["rows"]["split"].__setitem__(0, 2)), "row 0"),
    Fault("a row held out", S, edit(S, lambda d: d["rows"]["split"].__setitem__(0, 1)), "root over"),
    Fault(
        "a class renamed",
        S,
        edit(S, lambda d: (d["classes"].__setitem__(0, "a"), d["shares"][0].update({"class": "a"}))),
        "root over",
    ),
    Fault("classes in another order", S, edit(S, lambda d: swap(d["classes"], 0, 1)), "classes"),
    Fault("a class twice", S, edit(S, lambda d: d["classes"].insert(0, d["classes"][0])), "classes"),
    Fault("a row dropped", S, edit(S, without_row), "rows: private", first="count=5"),
    Fault(
        "salts of two rows swapped",
        S,
        edit(S, lambda d: swap_pieces(d["rows"], "salts", 16)),
        "root over",
        first="the rows make root",
    ),
    Fault(
        "two rows swapped",
        S,
        edit(S, lambda d: swap_pieces(d["rows"], "private", 32)),
        "root over",
        first="the rows make root",
    ),
    Fault("a bit flipped in a P", S, edit(S, lambda d: flip(d["rows"], "private")), "root over"),
    Fault("a bit flipped in a salt", S, edit(S, lambda d: flip(d["rows"], "salts")), "root over"),
    Fault("a sum changed", S, edit(S, lambda d: d["shares"][0].update(tokens=99)), "shares"),
    Fault("a count changed", S, edit(S, lambda d: d["shares"][0].update(rows=99)), "shares"),
    Fault("a sum left out", S, edit(S, lambda d: d["shares"].pop()), "shares"),
    Fault("a leaf before left out", S, edit(S, lambda d: d["before"].pop()), "before"),
    Fault("a leaf after left out", S, edit(S, lambda d: d["after"].pop()), "after"),
    Fault("a leaf moved over the examples", S, edit(S, lambda d: d["after"].append(d["before"].pop())), "before"),
    Fault("two leaves before swapped", S, edit(S, lambda d: swap(d["before"], 0, 1)), "root over"),
    Fault("a leaf of 31 bytes", S, edit(S, lambda d: d["before"].__setitem__(0, d["before"][0][:40])), "before"),
    Fault("the checkpoint of another log", S, others(S, "checkpoint"), "root over", first="the rows make root"),
]

SPOT_CHECKS = [
    Fault("a row that the seed did not pick", P, not_picked, "rows"),
    Fault("fewer draws", P, edit(P, lambda d: d.update(draws=1)), "rows"),
    Fault("no draws", P, edit(P, lambda d: d.update(draws=0, rows=[])), "draws"),
    Fault("draws without end", P, edit(P, lambda d: d.update(draws=2**53 - 1)), "draws"),
    Fault("draws true", P, edit(P, lambda d: d.update(draws=True)), "draws"),
    Fault("another share", P, edit(P, lambda d: d.update(share=forger.tagged(b"x"))), "share"),
    Fault("a row left out", P, edit(P, lambda d: d["rows"].pop()), "rows"),
    Fault("a row twice", P, edit(P, lambda d: d["rows"].append(d["rows"][-1])), "rows"),
    Fault("rows in another order", P, edit(P, lambda d: swap(d["rows"], 0, 1)), "rows"),
    Fault("another value", P, edit(P, lambda d: d["rows"][0]["fields"].update(terms="x")), "rows: row"),
    Fault("a field left out", P, edit(P, lambda d: d["rows"][0]["fields"].pop("terms")), "fields"),
    Fault(
        "salts of two fields swapped",
        P,
        edit(P, lambda d: swap_pieces(d["rows"][0], "salts", 16)),
        "rows: row",
        first="fields that the ledger did not commit to",
    ),
    Fault("salts cut off", P, edit(P, lambda d: decoded(d["rows"][0], "salts", lambda b: b[:-16])), "salts"),
    Fault("another raw request", P, edit(P, lambda d: flip(d["rows"][0], "request")), "request"),
    Fault("another raw response", P, edit(P, lambda d: flip(d["rows"][0], "response")), "response"),
    Fault("a spot-check of another log", P, lambda p: p.others[P], "share", first="a spot-check of share"),
    Fault(
        "the checkpoint of another log",
        P,
        others(P, "checkpoint"),
        "checkpoint",
        first="a spot-check at the checkpoint",
    ),
]

CONSISTENCIES = [
    Fault(
        "training intended by no recipe, signed",
        C,
        signed_anew(C, lambda s: s["predicate"].pop("recipe", None)),
        "recipe",
    ),
    Fault(
        "a file among the subjects of a checkpoint that is not of the training's end",
        C,
        signed_anew(C, lambda s: s["subject"].append({"name": "student/x.bin", "digest": {"sha256": "00" * 32}})),
        "subject",
    ),
    Fault(
        "more examples than leaves under a checkpoint",
        C,
        signed_anew(C, lambda s: s["predicate"].update(examples={"first": 0, "count": 2**50})),
        "examples",
    ),
    Fault("old and new exchanged", C, edit(C, exchanged), "size"),
    Fault("no path", C, edit(C, lambda d: d.update(path="")), "path"),
    Fault("a bit flipped in the path", C, edit(C, lambda d: flip(d, "path")), "path"),
    Fault("a digest too few", C, edit(C, lambda d: decoded(d, "path", lambda b: b[:-32])), "path"),
    Fault("a digest too many", C, edit(C, lambda d: decoded(d, "path", lambda b: b + bytes(32))), "path"),
    Fault("two digests exchanged", C, edit(C, lambda d: swap_pieces(d, "path", 32)), "path"),
    Fault(
        "an old checkpoint of another log", C, others(C, "old"), "path: root of the old one", first="does not continue"
    ),
    Fault(
        "a new checkpoint of another log", C, others(C, "new"), "path: root of the new one", first="does not continue"
    ),
    Fault("the path of another log", C, others(C, "path"), "path", first="does not continue"),
    Fault("a size as large as can be", C, signed_anew(C, lambda s: s["predicate"].update(size=2**53 - 1)), "root"),
    Fault("one path, where both are the same", C, lambda p: p.docs[C] | {"old": p.docs[C]["new"]}, "path"),
]

FAULTS = [*FORMS, *DISCLOSURES, *SHARES, *SPOT_CHECKS, *CONSISTENCIES]


def write(path: Path, made: bytes | Doc) -> None:
    path.write_bytes(made if isinstance(made, bytes) else rfc8785.dumps(made))
