"""What tools/verify_ledger.py says of differences and roots: each word in its place, as `limbeck show` has it."""

from __future__ import annotations

import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import runs
from command import call
from verifier import second

from limbeck.ledger.canonical import digest_file
from limbeck.ledger.store import Ledger


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_run(tmp_path_factory.mktemp("good") / "run")


def test_a_changed_weight_is_found_where_the_ledger_and_the_signature_expect_another(good: Path, tmp_path: Path):
    """Each line has what lies there as found, and what was written, or signed, as expected."""
    copy, name = tmp_path / "run", "student/deep/weights.bin"
    shutil.copytree(good, copy)
    was = digest_file(copy / name)
    (copy / name).write_bytes(b"another")
    told = [one for one in second.verify_run(str(copy)).differences if one.place.endswith(name)]
    assert [(one.found, one.expected) for one in told] == [(f"sha256:{sha256(b'another').hexdigest()}", was)] * 2
    (copy / name).unlink()
    told = [one for one in second.verify_run(str(copy)).differences if one.place.endswith(name)]
    assert [(one.found, one.expected) for one in told] == [("not there", was)] * 2


def test_the_roots_are_those_that_show_tells(good: Path):
    shown, notes = call("show", good).stdout, second.verify_run(str(good)).notes
    told = re.search(r"(root at the last checkpoint) +(sha256:[0-9a-f]{64} over [0-9]+ leaves)", shown)
    assert told, shown
    assert f"{told[1]}: {told[2]}" in notes
    with Ledger(good / "ledger.db", read_only=True) as ledger:
        assert f"root now sha256:{ledger.tree.root().hex()}, head " in notes[-1]
        assert ledger.tree.root().hex() not in told[2]  # the checkpoint's own entry came after it
