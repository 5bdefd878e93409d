"""Faults of the tree, of what is signed, and of signatures."""

from __future__ import annotations

from faults import forger
from faults.kit import (
    Fault,
    by_another,
    envelope_of,
    enveloped,
    half_byte,
    hashes,
    node_for_leaf,
    replaced_envelope,
    resigned,
    said,
    swapped,
)

FAULTS = [
    Fault(
        "no payloadType",
        enveloped(8, lambda e: e.pop("payloadType")),
        "payloadType",
    ),
    Fault(
        "weights that another stage than train wrote",
        lambda case: case.rewrite(lambda bodies, _: bodies[9].update(stage="x")),
        "entry 10: envelope: student/deep/weights.bin",
        "student/deep/weights.bin",
    ),
    Fault(
        "weights that no manifest has",
        lambda case: case.rewrite(lambda bodies, _: bodies[9]["facts"].pop("manifests")),
        "entry 10: envelope: student/deep/weights.bin",
        "student/deep/weights.bin",
    ),
    # the tree
    Fault(
        "a bit flipped in an example's leaf",
        hashes(lambda h: [*h[:6], bytes([h[6][0] ^ 1]) + h[6][1:], *h[7:]]),
        "entry 8: envelope: root",
        "leaves.parquet",
    ),
    Fault(
        "a bit flipped in an entry's leaf",
        hashes(lambda h: [bytes([h[0][0] ^ 1]) + h[0][1:], *h[1:]]),
        "leaf 0",
        "leaf 0",
    ),
    Fault(
        "two examples' leaves swapped", hashes(lambda h: swapped(h, 6, 7)), "entry 8: envelope: root", "leaves.parquet"
    ),
    Fault("an example's leaf doubled", hashes(lambda h: [*h[:6], h[6], *h[6:]]), "leaf 10", "20 leaves"),
    Fault("an example's leaf dropped", hashes(lambda h: [*h[:6], *h[7:]]), "leaf 10", "18 leaves"),
    Fault("the tree cut off", hashes(lambda h: h[:-1]), "leaf 18", "18"),
    Fault("a leaf too many", hashes(lambda h: [*h, h[0]]), "hashes", "20"),
    Fault("a node taken for a leaf", hashes(node_for_leaf), "leaf 10", "18 leaves"),
    Fault(
        "leaves that are no hashes",
        lambda c: c.sql("UPDATE hashes SET data = substr(data, 1, 31) WHERE first = 18"),
        "hashes: row 18",
        "18",
    ),
    Fault("a row of leaves missing", lambda c: c.sql("DELETE FROM hashes WHERE first = 3"), "hashes: row 4", "hashes"),
    Fault(
        "a subtree that is not",
        lambda c: c.sql("INSERT INTO subtrees VALUES (1, 0, zeroblob(32))"),
        "subtrees: level 1, place 0",
        "subtree 0 of level 1",
    ),
    Fault(
        "examples sealed anew",
        lambda c: c.rewrite(lambda b, e: e.update({5: [forger.sha(bytes([at])) for at in range(5)]})),
        "",
        "leaves.parquet",
        unseen="leaves.parquet holds the same leaves, and is Parquet",
    ),
    # signatures
    Fault(
        "a bit flipped in a signature",
        enveloped(8, lambda e: e["signatures"][0].update(sig=half_byte(e["signatures"][0]["sig"]))),
        "entry 8: envelope: sig",
        "entry 8",
    ),
    Fault(
        "a signature of another statement",
        said(8, lambda s: s["predicate"].update(at="2020-01-01T00:00:00Z"), sign=False),
        "entry 8: envelope: sig",
        "entry 8",
    ),
    Fault(
        "another key's name",
        enveloped(8, lambda e: e["signatures"][0].update(keyid="00" * 32)),
        "entry 8: envelope: sig",
        "entry 8",
    ),
    Fault("no signature", enveloped(8, lambda e: e.update(signatures=[])), "entry 8", "entry 8"),
    Fault("two signatures", enveloped(8, lambda e: e["signatures"].append(e["signatures"][0])), "entry 8", "entry 8"),
    Fault("another payloadType", enveloped(8, lambda e: e.update(payloadType="text/plain")), "entry 8", "entry 8"),
    Fault(
        "base64 without padding",
        enveloped(8, lambda e: e["signatures"][0].update(sig=e["signatures"][0]["sig"].rstrip("="))),
        "entry 8",
        "entry 8",
    ),
    Fault(
        "base64 with a line break",
        enveloped(8, lambda e: e.update(payload=e["payload"][:76] + "\n" + e["payload"][76:])),
        "entry 8",
        "entry 8",
    ),
    Fault("a key too many in an envelope", enveloped(8, lambda e: e.update(more=1)), "entry 8", "entry 8"),
    Fault(
        "another root, signed",
        said(8, lambda s: s["subject"][0]["digest"].update(sha256="00" * 32)),
        "entry 8: envelope: root",
        "entry 8",
    ),
    Fault(
        "another size, signed", said(8, lambda s: s["predicate"].update(size=12)), "entry 8: envelope: size", "entry 8"
    ),
    Fault(
        "other examples, signed",
        said(8, lambda s: s["predicate"]["examples"].update(count=4)),
        "entry 8: envelope: examples",
        "entry 8",
    ),
    Fault(
        "another recipe, signed",
        said(8, lambda s: s["predicate"].update(recipe="00" * 32)),
        "entry 8: envelope: recipe",
        "entry 8",
    ),
    Fault("no order of the data, signed", said(8, lambda s: s["predicate"].pop("order")), "entry 8", "entry 8"),
    Fault(
        "another kind, signed",
        said(10, lambda s: s["predicate"].update(kind="collection-open")),
        "entry 10",
        "entry 10",
    ),
    Fault(
        "other weights, signed",
        said(10, lambda s: s["subject"][1]["digest"].update(sha256="00" * 32)),
        "entry 10: envelope: student/deep/weights.bin",
        "student/deep/weights.bin",
    ),
    Fault(
        "no weights, signed",
        said(10, lambda s: s["subject"].pop(1)),
        "entry 10: envelope: student/deep/weights.bin",
        "entry 10",
    ),
    Fault(
        "weights that nothing wrote, signed",
        said(10, lambda s: s["subject"].append({"name": "student/x.bin", "digest": {"sha256": "00" * 32}})),
        "student/x.bin",
        "student/x.bin",
    ),
    Fault(
        "a stale checkpoint",
        replaced_envelope(8, lambda c: envelope_of(c.run, 2)),
        "entry 8: envelope: size",
        "entry 8",
    ),
    Fault(
        "a checkpoint of another log",
        replaced_envelope(8, lambda c: envelope_of(c.other, 8)),
        "entry 8: envelope: root",
        "entry 8",
    ),
    Fault(
        "a note for a checkpoint",
        replaced_envelope(
            8,
            lambda c: forger.envelope(
                {
                    "_type": "https://in-toto.io/Statement/v1",
                    "predicateType": "urn:x-limbeck:note:1",
                    "predicate": {"at": "2026-01-01T00:00:00Z", "by": None, "size": 13, "text": "x"},
                    "subject": [{"name": "ledger", "digest": {"sha256": "00" * 32}}],
                },
                c.key,
            ),
        ),
        "entry 8",
        "entry 8",
    ),
    Fault("signed by another key", by_another, "entry 2: envelope: keyid", "entry 2", options=("--key", "KEY")),
    Fault("signed anew after an edit, against a kept head", resigned, "head", "head", options=("--head", "HEAD")),
    Fault(
        "signed anew after an edit, against a kept checkpoint",
        resigned,
        "kept checkpoint: root over 15 leaves",
        "does not continue",
        options=("--checkpoint", "KEPT"),
    ),
    Fault(
        "cut off before a kept checkpoint",
        lambda c: c.rewrite(lambda b, _: b.__delitem__(slice(8, None))),
        "kept checkpoint",
        "does not continue",
        options=("--checkpoint", "KEPT"),
    ),
]
