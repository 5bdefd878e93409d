"""Laws of time-stamps, with an authority of one's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import runs
import stamping
from command import call

from limbeck.errors import InputError
from limbeck.ledger import verify
from limbeck.ledger.signing.checkpoints import worth_signing
from limbeck.ledger.signing.timestamps import attach, parse_stamp, read_authorities, vouched
from limbeck.ledger.store import Ledger


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


# Time-stamps


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return stamping.Authority(tmp_path_factory.mktemp("authority") / "here")


@stamping.needed
@pytest.mark.parametrize(
    ("more", "algorithm"), [((), "sha256"), (("-token_out",), "sha256"), ((), "sha384"), ((), "sha512")]
)
def test_a_time_stamp_anchors_a_checkpoint(copy, authority, more, algorithm):
    last = runs.signed(copy)[-1]
    path = authority.stamp(last.envelope.data, *more, algorithm=algorithm)
    with Ledger(copy / "ledger.db") as ledger:
        covered, _ = attach(ledger, path, read_authorities(authority.root))
        assert covered == last
        attach(ledger, path)
        assert [e.stage for e in ledger.entries()].count("timestamp") == 1
        assert worth_signing(ledger.entries())
    result = verify(copy, authority=authority.root)
    assert result.ok
    assert any(note.startswith("anchored: the checkpoint of entry 11 (training-done)") for note in result.notes)
    assert not any(note.startswith("unanchored") for note in result.notes)
    unknown = verify(copy)
    assert unknown.ok
    assert any(note.startswith("unanchored") for note in unknown.notes)
    assert any("was not checked against its authority" in note for note in unknown.notes)


@stamping.needed
def test_a_time_stamp_of_something_else_or_of_somebody_else_is_refused(copy, authority, tmp_path):
    stranger = stamping.Authority(tmp_path / "stranger")
    right = runs.signed(copy)[-1].envelope.data
    with Ledger(copy / "ledger.db") as ledger:
        for data, trusted, why in (
            (right + b" ", (), "something else"),
            (right, read_authorities(stranger.root), "does not vouch"),
        ):
            with pytest.raises(InputError, match=why):
                attach(ledger, authority.stamp(data), trusted)
        assert "timestamp" not in [e.stage for e in ledger.entries()]
        attach(ledger, authority.stamp(right))
    found = verify(copy, authority=stranger.root).differences
    assert [p.where for p in found] == ["ledger.db: entry 15 (timestamp): authority"]


@stamping.needed
def test_a_changed_time_stamp_does_not_vouch(authority):
    good = authority.stamp(b"data").read_bytes()
    roots = read_authorities(authority.root)
    assert vouched(parse_stamp(good), roots) is None
    accepted = 0
    for at in range(0, len(good), 7):
        bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        try:
            stamp = parse_stamp(bad)
        except ValueError:
            continue
        # What is not signed, such as the text of a status, may change; time and imprint may not.
        if vouched(stamp, roots) is None:
            accepted += 1
            assert (stamp.at, stamp.imprint) == (parse_stamp(good).at, parse_stamp(good).imprint)
    assert accepted < 10


@pytest.mark.parametrize("content", [b"", b"\x30\x03\x02\x01\x02", os.urandom(200), b"0" * 5000])
def test_what_is_no_time_stamp_is_refused(copy, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with Ledger(copy / "ledger.db") as ledger, pytest.raises(InputError, match="no time-stamp"):
        attach(ledger, tmp_path / "file")


@stamping.needed
def test_the_commands_of_the_page_anchor_a_run(copy, authority, tmp_path):
    """Those of docs/ledger.md that need an authority."""
    out = tmp_path / "checkpoint.json"
    made = json.loads(call("ledger", "checkpoint", copy, "--out", out, "--json").stdout)
    assert made["kind"] == "by-hand"
    assert made["trust"].startswith("unanchored")
    assert call("ledger", "checkpoint", copy, "--out", out).exit_code == 2  # never overwrites
    response = authority.stamp(out.read_bytes())
    unknown = json.loads(call("ledger", "checkpoint", copy, "--timestamp", response, "--json").stdout)
    assert unknown["trust"].startswith("unanchored")
    stamped = call("ledger", "checkpoint", copy, "--timestamp", response, "--authority", authority.root, "--json")
    told = json.loads(stamped.stdout)
    assert told["trust"].startswith("anchored")
    assert told["envelope"] == made["envelope"]
    assert "anchored: the checkpoint" in call("ledger", "verify", copy, "--authority", authority.root).stdout
    assert call("ledger", "verify", copy, "--authority", response).exit_code == 2
    last = json.loads(call("ledger", "checkpoint", copy, "--json").stdout)
    assert last["entry"] == made["entry"]  # nothing new to sign
