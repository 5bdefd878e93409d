"""Faults of entries: of what they say, of their order, of their bytes."""

from __future__ import annotations

import json

from faults import forger
from faults.kit import Fault, change, dropped, facts, formed, put

FAULTS = [
    Fault(
        "no version of the leaves",
        lambda c: c.rewrite(lambda b, _: b[5]["facts"]["leaves"].pop("version")),
        "entry 5: facts: leaves",
    ),
    # entries, alone
    Fault(
        "a body changed",
        lambda c: c.sql("UPDATE entries SET body = replace(body, '\"rows\":6', '\"rows\":7') WHERE idx = 3"),
        "entry 3",
    ),
    Fault(
        "a digest changed",
        lambda c: c.sql("UPDATE entries SET digest = ? WHERE idx = 4", forger.tagged(b"x")),
        "entry 4",
    ),
    Fault(
        "the newest body changed",
        lambda c: c.sql("UPDATE entries SET body = replace(body, '\"rows\":6', '\"rows\":7') WHERE idx = 13"),
        "entry 13",
    ),
    Fault("an entry dropped", lambda c: c.sql("DELETE FROM entries WHERE idx = 3"), "entry 3"),
    Fault("the first entry dropped", lambda c: c.sql("DELETE FROM entries WHERE idx = 0"), "entry 0"),
    Fault("the end dropped", lambda c: c.sql("DELETE FROM entries WHERE idx >= 12"), "hashes", "leaves"),
    Fault(
        "an entry doubled at the end",
        lambda c: c.sql("INSERT INTO entries SELECT 14, digest, body FROM entries WHERE idx = 13"),
        "entry 14",
    ),
    Fault(
        "a body of bytes", lambda c: c.sql("UPDATE entries SET body = CAST(body AS BLOB) WHERE idx = 13"), "entry 13"
    ),
    Fault("a body that is no JSON", lambda c: c.sql("UPDATE entries SET body = 'x' WHERE idx = 13"), "entry 13"),
    Fault(
        "a body of 20 MB",
        lambda c: c.sql("UPDATE entries SET body = printf('%.*c', 20000000, '[') WHERE idx = 13"),
        "too big",
    ),
    # entries, and everything written anew without signing
    Fault("an entry dropped, the rest written anew", dropped, "entry 7: envelope", "entry 7"),
    Fault(
        "two entries reordered",
        lambda c: c.rewrite(lambda b, e: put(b, e, [1, 0, *range(2, 14)]), resign=False),
        "entry 2: envelope: root",
        "entry 2",
    ),
    Fault(
        "an entry doubled",
        lambda c: c.rewrite(lambda b, e: put(b, e, [0, 1, 1, *range(2, 14)]), resign=False),
        "entry 3: envelope",
        "entry 3",
    ),
    # values of entries, and everything written anew and signed
    Fault(
        "a digest of an input changed",
        lambda c: c.rewrite(lambda b, _: b[1]["inputs"].update({"prompts.parquet": forger.tagged(b"x")})),
        "entry 1: inputs: prompts.parquet",
        "prompts.parquet",
    ),
    Fault(
        "an input that nothing wrote",
        lambda c: c.rewrite(lambda b, _: b[1]["inputs"].update({"more.parquet": forger.tagged(b"x")})),
        "entry 1: inputs: more.parquet",
        "more.parquet",
    ),
    Fault(
        "a digest of an output changed",
        lambda c: c.rewrite(lambda b, _: b[13]["outputs"].update({"report.html": forger.tagged(b"x")})),
        "report.html",
    ),
    Fault(
        "a digest of another form",
        lambda c: c.rewrite(lambda b, _: b[13]["outputs"].update({"report.html": "md5:" + "0" * 32})),
        "entry 13",
    ),
    Fault(
        "a stage done again, and nothing after it",
        lambda c: c.rewrite(
            lambda b, e: b.append(json.loads(json.dumps(b[0])) | {"outputs": {"prompts.parquet": forger.tagged(b"x")}})
        ),
        "prompts.parquet",
    ),
    Fault("another recipe in one entry", change(12, recipe=forger.tagged(b"x")), "recipe"),
    Fault("another version", change(13, version=2), "entry 13"),
    Fault("version true", change(13, version=True), "entry 13"),
    Fault("another index", change(13, **{"index at": 12}), "entry 13"),
    Fault("another previous", change(13, **{"previous at": forger.tagged(b"x")}), "entry 13"),
    Fault("a key too many", change(13, more=1), "entry 13"),
    Fault("a key too few", lambda c: c.rewrite(lambda b, _: b[13].pop("dirty")), "entry 13"),
    Fault("a time without microseconds", change(13, finished="2026-11-25T03:23:25Z"), "entry 13"),
    Fault("a day that is not", change(13, finished="2026-02-30T03:23:25.000000Z"), "entry 13"),
    Fault(
        "leaves of a stage that seals nothing",
        facts(13, leaves={"count": 0, "nonce": "00" * 32, "salts": forger.tagged(b""), "version": 1}),
        "entry 13",
    ),
    Fault(
        "no leaves of the seal",
        lambda c: c.rewrite(lambda b, e: (b[5]["facts"].pop("leaves"), e.update({5: []}))),
        "entry 5",
        first="seal",
    ),
    Fault(
        "a count of leaves as large as can be",
        lambda c: c.rewrite(lambda b, _: b[5]["facts"]["leaves"].update(count=2**53 - 1), resign=False),
        "entry 5",
        first="seal",
    ),
    Fault(
        "a negative count of leaves",
        lambda c: c.rewrite(lambda b, _: b[5]["facts"]["leaves"].update(count=-5), resign=False),
        "entry 5",
        first="seal",
    ),
    # forms of Unicode and numbers, everything written anew and signed
    Fault("a space in a body", formed(13, b'"version":1', b'"version": 1'), "entry 13"),
    Fault("keys in another order", formed(13, b'"stage":"report","started"', b'"started"'), "entry 13"),
    Fault("a number with a point", formed(13, b'"version":1', b'"version":1.0'), "entry 13"),
    Fault("a number with an exponent", formed(13, b'"rows":6', b'"rows":6e0'), "entry 13"),
    Fault("minus zero", formed(13, b'"rows":6', b'"rows":-0'), "entry 13"),
    Fault(
        "an integer of 2^53",
        formed(13, b'"rows":6', b'"rows":9007199254740992'),
        "9007199254740992",
    ),
    Fault("an integer of -2^53", formed(13, b'"rows":6', b'"rows":-9007199254740992'), "-9007199254740992"),
    Fault("an integer of 2^64", formed(13, b'"rows":6', b'"rows":18446744073709551616'), "18446744073709551616"),
    Fault("an integer of 5,000 digits", formed(13, b'"rows":6', b'"rows":' + b"9" * 5000), "entry 13"),
    Fault("NaN", formed(13, b'"rows":6', b'"rows":NaN'), "entry 13"),
    Fault("a number without end", formed(13, b'"rows":6', b'"rows":1e999'), "entry 13"),
    Fault("a letter as an escape", formed(13, b'"stage":"report"', b'"stage":"\\u0072eport"'), "entry 13"),
    Fault("half of a surrogate pair", formed(13, b'"stage":"report"', b'"stage":"\\ud800"'), "entry 13"),
    Fault("a key twice", formed(13, b'"rows":6', b'"rows":6,"rows":6'), "entry 13"),
    Fault("deep nesting", formed(13, b'"rows":6', b'"rows":' + b"[" * 5000 + b"]" * 5000), "nested too deeply"),
    Fault("65 levels", formed(13, b'"rows":6', b'"rows":' + b"[" * 63 + b"]" * 63), "nested too deeply"),
    Fault("65 levels of objects", formed(13, b'"rows":6', b'"rows":' + b'{"":' * 62 + b"{}" + b"}" * 62), "nested too"),
]
