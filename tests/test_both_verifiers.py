"""Where both verifiers have to say the same: of what was mistyped, of files beside a database, of a value."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import runs
from command import call
from verifier import second

from limbeck.ledger.sealing import seal
from limbeck.ledger.store import Ledger
from limbeck.run import STAGES
from limbeck.rundir import RunDir


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


def test_leaves_of_both_versions_are_read_and_a_ledger_may_go_on_from_one_to_the_other(tmp_path, capsys, monkeypatch):
    """Sealed by an earlier release, everything holds under the older number; sealed again, under the newer."""
    with monkeypatch.context() as earlier:
        earlier.setattr("limbeck.ledger.sealing.NEWEST", 1)
        run = runs.make_run(tmp_path / "run", change=runs.from_seeds, until="seal")
    assert call("ledger", "checkpoint", run).exit_code == 0
    _handed_over(run, tmp_path / "1", 1, capsys)
    (stage,) = [stage for stage in STAGES if stage.name == "seal"]
    with Ledger(run / "ledger.db") as ledger:
        facts = seal(runs.RECIPE, RunDir(run))
        runs.enter(ledger, run, stage.name, stage.reads, stage.writes, facts)
    assert call("ledger", "checkpoint", run).exit_code == 0
    _handed_over(run, tmp_path / "2", 2, capsys)
    old = tmp_path / "1" / "share"
    mixed = call("ledger", "check", tmp_path / "2" / "spot-check", "--share", old)
    assert mixed.exit_code == second.main([str(tmp_path / "2" / "spot-check"), str(old)]) == 1


FORM = {"parents": "disclosure", "share": "share", "spot-check": "spot-check"}


def _handed_over(run: Path, folder: Path, version: int, capsys) -> None:
    """Run and proofs are accepted by both, and name this version."""
    folder.mkdir()
    first = call("ledger", "verify", run)
    assert first.exit_code == 0, first.output
    verified(capsys, run)
    for words in (
        ("disclose", "--row", 3, "--field", "parents"),
        ("share",),
        ("spot-check", "--seed", "a beacon", "--draws", 9),
    ):
        out = folder / {"disclose": "parents"}.get(words[0], words[0])
        assert call("ledger", words[0], run, *words[1:], "--out", out).exit_code == 0
        assert json.loads(out.read_bytes())["form"] == f"limbeck-{FORM[out.name]}/{version}"
        share = [folder / "share"] if words[0] == "spot-check" else []
        held = call("ledger", "check", out, *(["--share", *share] if share else []))
        assert held.exit_code == 0, held.output
        verified(capsys, out, *share)
    told = json.loads((folder / "parents").read_bytes())["value"]
    assert [type(one) for one in told] == ([str] if version == 1 else [list] * 3)


def test_a_strangers_text_says_no_line_of_its_own(tmp_path, capsys):
    """A name with a line feed in it could say that a file is anchored."""
    lie = "m\ntrust: anchored\nnote: anchored"

    def change(records: runs.Records) -> runs.Records:
        told = [one.model_copy(update={"model": lie, "teacher": lie}) for one in records.completions]
        verdicts = [v._replace(teacher=lie, completion=c.id) for v, c in zip(records.verdicts, told, strict=True)]
        return records._replace(completions=told, verdicts=verdicts)

    run = runs.make_run(tmp_path / "run", change=change, until="train")
    with Ledger(run / "ledger.db") as ledger:
        read = {f"prompts:{lie}": runs.OUTSIDE}
        ledger.append(
            stage="card", started=datetime.now(UTC), inputs=read, outputs={}, recipe=runs.RECIPE.digest, facts={}
        )
    proof, manifest = tmp_path / "proof", tmp_path / "share"
    printed = [
        call("ledger", "disclose", run, "--row", 0, "--field", "model", "--out", proof),
        call("ledger", "share", run, "--out", manifest),
        *(call("ledger", "check", path) for path in (proof, manifest)),
        call("ledger", "verify", run),
        call("ledger", "log", run),
    ]
    assert second.main([str(proof)]) == second.main([str(manifest)]) == 0
    for said in (*(one.stdout for one in printed), capsys.readouterr().out):
        assert said
        assert "anchored" in said or "entry" in said
        assert not [line for line in said.splitlines() if line.startswith(("trust: anchored", "note: anchored"))]
