"""Where both verifiers have to say the same: of what was mistyped, of files beside a database, of a value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from command import call
from verifier import second


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return runs.make_run(tmp_path_factory.mktemp("both") / "run")


def verified(capsys, *words: object) -> str:
    code = second.main([str(word) for word in words])
    printed = "".join(capsys.readouterr())
    assert code == 0, printed
    return printed


def test_files_beside_a_database_are_not_noted_as_strangers(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    for name in ("journal.db-lock", "journal.db-shm", "ledger.db-wal", "stranger"):
        (run / name).write_bytes(b"")
    assert [line for line in verified(capsys, run).splitlines() if "in no entry" in line] == [
        "note: in no entry: stranger"
    ]
    told = call("ledger", "verify", run).stdout.splitlines()
    assert [line for line in told if "in no entry" in line] == ["note: in RUN but in no entry: stranger"]


@pytest.mark.parametrize(
    "given", [("--key", "00"), ("--key", "AB" * 32), ("--head", "sha256:00"), ("--head", "ab" * 32)]
)
def test_what_is_no_key_or_head_is_refused_by_both(given, run, capsys):
    first, code = call("ledger", "verify", run, *given), second.main([str(run), *given])
    told = capsys.readouterr()
    assert (first.exit_code, code, first.stdout, told.out) == (2, 2, "", "")
    for said in (first.stderr, told.err):
        assert "64" in said
        assert "hexadecimal digits" in said
        assert given[0] in said
        assert given[1] in said


def test_a_key_and_a_head_that_are_malformed_are_both_named(run):
    told = call("ledger", "verify", run, "--key", "00", "--head", "x").stderr
    assert "--key" in told
    assert "--head" in told


def test_the_gates_field_is_explained_alike_by_all(run, tmp_path, capsys):
    out, other = tmp_path / "proof", tmp_path / "other"
    told = call("ledger", "disclose", run, "--row", 0, "--field", "gate", "--out", out, "--json")
    meant = json.loads(told.stdout)["meaning"]
    assert "rules on the whole set" in meant
    assert meant in call("ledger", "check", out).stdout
    assert json.loads(call("ledger", "check", out, "--json").stdout)["meaning"] == meant
    assert meant in verified(capsys, out)
    assert call("ledger", "disclose", run, "--row", 0, "--field", "terms", "--out", other).exit_code == 0
    terms = verified(capsys, other)
    assert meant not in terms
