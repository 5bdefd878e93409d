"""tools/verify_ledger.py: accepts what is good, refuses each one-fault copy and names its place, as the first does."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import rfc8785
import runs
import stamping
from command import call
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from faults import entries, files, forger, gate, handed, names, parents, proofs, rows, signatures
from faults.kit import Case, Fault, formed
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from verifier import SCRIPT, second

from limbeck.ledger.store import Ledger
from limbeck.run import STAGES
from limbeck.terms.waivers import make_waiver

FORBIDDEN = "meta/llama-3/2024-04-18"
FAULTS = [*files.FAULTS, *rows.FAULTS, *entries.FAULTS, *signatures.FAULTS, *parents.FAULTS, *names.FAULTS]


def signing_key():
    return load_pem_private_key((Path(os.environ["LIMBECK_HOME"]) / "signing-key.pem").read_bytes(), None)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run, another of the same recipe, and a checkpoint of the first that was kept."""
    base = tmp_path_factory.mktemp("good")
    run, other = (runs.make_run(base / name, change=runs.from_seeds) for name in ("run", "other"))
    kept = runs.signed(run)[-1].envelope
    (base / "kept").write_bytes(kept.data)
    return run, other, base / "kept"


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_both_refuse(fault: Fault, good, tmp_path, capsys):
    run, other, kept = good
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    keyid = runs.signed(run)[-1].envelope.keyid
    head = second.verify_run(str(run)).notes[-1].rsplit(" ", 1)[-1]
    fault.do(Case(copy, signing_key(), other, kept))
    filled = {"KEY": keyid, "HEAD": head, "KEPT": str(kept)}
    options = [filled.get(word, word) for word in fault.options]
    command = ["consistency" if "KEPT" in fault.options else "verify", copy, *options]
    first = call("ledger", *command)
    code = second.main([str(copy), *options])
    printed = "".join(capsys.readouterr())
    told = f"first {first.exit_code}:\n{first.output[-3000:]}\nsecond {code}:\n{printed[-3000:]}"
    assert first.exception is None or isinstance(first.exception, SystemExit), told
    assert first.exit_code in (1, 2), told
    assert (fault.first or fault.place) in first.output, told
    if fault.unseen:
        assert code == 0, told
    else:
        assert code in (1, 2), told
        assert fault.place in printed, told


@pytest.fixture(scope="module")
def waived(tmp_path_factory) -> Path:
    """A run that trained under a waiver."""
    base = tmp_path_factory.mktemp("waived")
    made = make_waiver(FORBIDDEN, runs.RECIPE.use, by="A. Counsel", reason="a test", expires=date(2999, 12, 30))
    (base / "waiver.json").write_bytes(made.envelope.data)
    teacher = runs.RECIPE.teachers[0].model_copy(update={"terms": FORBIDDEN})
    update = {"teacher": teacher, "waivers": (str(base / "waiver.json"),)}
    return runs.make_run(base / "run", recipe=runs.RECIPE.model_copy(update=update))


def test_both_accept_a_run_under_a_waiver_that_is_in_force(waived, capsys):
    first = call("ledger", "verify", waived)
    assert first.exit_code == 0, first.output
    assert second.main([str(waived)]) == 0, capsys.readouterr()


@pytest.mark.parametrize("fault", gate.FAULTS, ids=[fault.name for fault in gate.FAULTS])
def test_both_refuse_a_gate(fault: Fault, waived, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(waived, copy)
    fault.do(Case(copy, signing_key(), waived, waived))
    first, code = call("ledger", "verify", copy), second.main([str(copy)])
    printed = "".join(capsys.readouterr())
    assert first.exit_code == 1, first.output
    assert "(gate)" in first.output
    assert (fault.first or fault.place) in first.output, first.output
    assert code == 1, printed
    assert fault.place in printed, printed


def two_teachers(records: runs.Records) -> runs.Records:
    """Every other answer is another teacher's, so that a share has two classes; some prompts have parents."""
    records = runs.from_seeds(records)
    names = [runs.TEACHER if at % 2 else "other" for at in range(runs.PROMPTS)]
    completions = [c.model_copy(update={"teacher": n}) for c, n in zip(records.completions, names, strict=True)]
    verdicts = [
        v._replace(teacher=n, completion=c.id) for v, c, n in zip(records.verdicts, completions, names, strict=True)
    ]
    return records._replace(completions=completions, verdicts=verdicts)


def hand_over(run: Path, folder: Path) -> dict[str, dict]:
    """Every kind of document, written by the command line."""
    folder.mkdir()
    old, documents = forger.read(run)[0][8]["facts"]["envelope"], {}
    (folder / "kept").write_bytes(rfc8785.dumps(old))
    for words in (
        ("disclose", "--row", 1, "--field", "terms"),
        ("disclose", "--row", 3, "--field", "parents"),
        ("disclose", "--row", 3, "--field", "response"),
        ("share",),
        ("spot-check", "--seed", "a beacon", "--draws", 20, "--raw"),
        ("consistency", "--checkpoint", folder / "kept"),
    ):
        name = "disclosure" if "terms" in words else words[-1] if words[0] == "disclose" else words[0]
        result = call("ledger", words[0], run, *words[1:], "--out", folder / name)
        assert result.exit_code == 0, result.output
        documents[name] = json.loads((folder / name).read_bytes())
    return documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> tuple[Path, proofs.Proofs]:
    base = tmp_path_factory.mktemp("handed")
    run, other = runs.make_run(base / "run", change=two_teachers), runs.make_run(base / "other", change=two_teachers)
    own, others = hand_over(run, base / "documents"), hand_over(other, base / "others")
    return base / "documents", proofs.Proofs(own, others, signing_key())


PROOFS = [*proofs.FAULTS, *handed.FAULTS]


@pytest.mark.parametrize("fault", PROOFS, ids=[f"{fault.form}: {fault.name}" for fault in PROOFS])
def test_both_refuse_a_document(fault: proofs.Fault, documents, tmp_path, capsys):
    folder, given = documents
    path, share = tmp_path / "proof", [folder / "share"] if fault.form == "spot-check" else []
    proofs.write(path, fault.make(given))
    options = [forger.keyid(given.key) if word == "KEY" else word for word in fault.options]
    first = call("ledger", "check", path, *(["--share", *share] if share else []), *options)
    code = second.main([*map(str, [path, *share]), *options])
    printed = "".join(capsys.readouterr())
    told = f"first {first.exit_code}:\n{first.output[-3000:]}\nsecond {code}:\n{printed[-3000:]}"
    assert first.exception is None or isinstance(first.exception, SystemExit), told
    assert first.exit_code in (1, 2), told
    assert fault.first in first.output, told
    assert code in (1, 2), told
    assert fault.place in printed, told


@pytest.mark.parametrize("name", ["disclosure", "parents", "response", "share", "consistency", "kept"])
def test_a_good_document_holds(name, documents, capsys):
    assert second.main([str(documents[0] / name)]) == 0, "".join(capsys.readouterr())


def test_a_good_spot_check_holds_with_its_share_and_not_without(documents, capsys):
    folder, _ = documents
    assert second.main([str(folder / "spot-check"), str(folder / "share")]) == 0, "".join(capsys.readouterr())
    assert second.main([str(folder / "spot-check")]) == 2
    assert "give that file too" in capsys.readouterr().err


def test_every_field_of_every_row_can_be_shown(documents, tmp_path, capsys):
    run, out = documents[0].parent / "run", tmp_path / "proof"
    for row in range(runs.PROMPTS - 1):
        for field in (*second.FIELDS, "share"):
            assert call("ledger", "disclose", run, "--row", row, "--field", field, "--out", out).exit_code == 0
            assert second.main([str(out)]) == 0, "".join(capsys.readouterr())
            out.unlink()


# ---------------------------------------------------------------- good ledgers of other shapes


def verified(capsys, *words: object) -> str:
    code = second.main([str(word) for word in words])
    printed = "".join(capsys.readouterr())
    assert code == 0, printed
    return printed


def test_a_good_run_is_verified_and_what_is_not_checked_is_said(good, capsys):
    run, _, kept = good
    assert call("ledger", "verify", run).exit_code == 0
    printed = verified(capsys, run, "--checkpoint", kept)
    assert "Parquet and journal.db are NOT read" in printed
    assert "unanchored" in printed


@pytest.mark.parametrize("until", [stage.name for stage in STAGES])
def test_a_run_that_is_not_done_yet(until, tmp_path, capsys):
    run = runs.make_run(tmp_path / "run", until=until)
    assert call("ledger", "verify", run).exit_code == 0
    verified(capsys, run)


def test_a_run_that_signed_nothing(tmp_path, capsys):
    run = runs.make_run(tmp_path / "run", signed=False)
    assert call("ledger", "verify", run).exit_code == 0
    assert "nothing is signed" in verified(capsys, run)


def test_notes_and_checkpoints_by_hand(good, tmp_path, capsys):
    run = shutil.copytree(good[0], tmp_path / "run")
    for words in (
        ("note", run, "Rows 1 to 5 read.", "--by", "Ä. Reader"),
        ("checkpoint", run),
        ("note", run, "Again."),
    ):
        assert call("ledger", *words).exit_code == 0
    assert call("ledger", "verify", run).exit_code == 0
    verified(capsys, run, "--checkpoint", good[2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rows":6', b'"rows":' + b"[" * 62 + b"]" * 62),
        (b'"rows":6', b'"rows":' + b'{"":' * 61 + b"{}" + b"}" * 61),
        (b'"rows":6', b'"rows":9007199254740991'),
        (b'"rows":6', b'"rows":[-9007199254740991,1e+21,1e-7,5e-324]'),
        (b'"rows":6', rb'"rows":"\\ud83d"' + b',"smile":"\xf0\x9f\x98\x80\\u0000"'),
    ],
    ids=["64 lists", "64 objects", "2^53 - 1", "numbers", "an escape that is text"],
)
def test_what_is_just_within_the_limits_is_accepted_by_both(old, new, good, tmp_path, capsys):
    run = shutil.copytree(good[0], tmp_path / "run")
    formed(13, old, new)(Case(run, signing_key(), good[1], good[2]))
    result = call("ledger", "verify", run)
    assert result.exit_code == 0, result.output
    verified(capsys, run)


def test_a_tree_of_two_levels(good, tmp_path, capsys):
    """As many leaves as `subtrees` has a row of the second level for, then one of its rows changed."""
    run = shutil.copytree(good[0], tmp_path / "run")
    leaves = [forger.sha(at.to_bytes(4, "big")) for at in range(66_000)]
    with Ledger(run / "ledger.db") as ledger:
        fact = {"version": 2, "count": len(leaves), "nonce": "00" * 32, "salts": runs.OUTSIDE}
        inputs = {name: digest for name, digest in ledger.entries()[5].inputs.items()}
        ledger.append(
            stage="seal",
            started=datetime.now(UTC),
            inputs=inputs,
            outputs=ledger.entries()[5].outputs,
            recipe=runs.RECIPE.digest,
            facts={"leaves": fact},
            leaves=leaves,
        )
    assert call("ledger", "checkpoint", run).exit_code == 0
    verified(capsys, run)
    with closing(sqlite3.connect(run / "ledger.db")) as db:
        assert db.execute("SELECT max(level) FROM subtrees").fetchone() == (2,)
    runs.forge(run / "ledger.db", ("UPDATE subtrees SET hash = zeroblob(32) WHERE level = 2", ()))
    assert second.main([str(run)]) == 1
    assert "subtrees: level 2, place 0" in capsys.readouterr().out


@stamping.needed
def test_a_time_stamp_is_compared_with_the_envelope(good, tmp_path, capsys):
    run = shutil.copytree(good[0], tmp_path / "run")
    authority = stamping.Authority(tmp_path / "authority")
    made = runs.signed(run)
    response = authority.stamp(made[-1].envelope.data, algorithm="sha384")
    result = call("ledger", "checkpoint", run, "--timestamp", response, "--authority", authority.root)
    assert result.exit_code == 0, result.output
    assert "whose it is, is NOT checked" in verified(capsys, run)
    other = base64.b64encode(authority.stamp(b"something else").read_bytes()).decode()
    forger.rewrite(run, lambda bodies, _: bodies[-1]["facts"].update(response=other), key=signing_key(), resign=False)
    assert call("ledger", "verify", run).exit_code == 1
    assert second.main([str(run)]) == 1
    assert "facts: response: imprint" in capsys.readouterr().out


# ---------------------------------------------------------------- alone, and among enemies


def alone(*words: object) -> subprocess.CompletedProcess[str]:
    """In a Python that has its standard library and nothing else."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_runs_with_the_standard_library_alone(good, documents, tmp_path):
    script = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='there'); " + (
        "print([m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names and m != '__main__'])"
    )
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert bare.stdout.strip() == "[]"
    run, folder = alone(good[0]), documents[0]
    assert run.returncode == 0, run.stderr
    assert "signatures are NOT checked" in run.stdout
    assert alone(folder / "spot-check", folder / "share").returncode == 0
    broken = shutil.copytree(good[0], tmp_path / "run")
    (broken / "report.html").write_text("x")
    assert alone(broken).returncode == 1
    assert alone(tmp_path / "nothing").returncode == 2


def test_no_file_is_touched(good, tmp_path, capsys):
    run = shutil.copytree(good[0], tmp_path / "run")
    for path in (run, *run.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (run, *run.rglob("*"))}
    verified(capsys, run)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (run, *run.rglob("*"))} == before
    for path in (run, *run.rglob("*")):
        path.chmod(0o700)


def test_nothing_outside_of_run_is_opened(good, tmp_path):
    """By Python's own audit hook, in a run whose entries and links all lead out of it."""
    run = shutil.copytree(good[0], tmp_path / "run")
    outside = tmp_path / "outside.html"
    shutil.move(run / "report.html", outside)
    (run / "report.html").symlink_to(outside)
    shutil.move(run / "signals", tmp_path / "signals")
    (run / "signals").symlink_to(tmp_path / "signals")
    code = f"""
import runpy, sys
opened = []
EVENTS = ("open", "os.scandir", "sqlite3.connect")
sys.addaudithook(lambda name, given: opened.append(str(given[0])) if name in EVENTS else None)
sys.argv = ["x", {str(run)!r}]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as left:
    strange = [path for path in opened if {str(tmp_path)!r} in path and {str(run)!r} not in path]
    print(left.code, strange)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 []", done.stdout


BOMBS = {
    "nested lists": lambda path: path.write_bytes(b"[" * 50_000_000),
    "a huge number": lambda path: path.write_bytes(b'{"form":' + b"9" * 50_000_000 + b"}"),
    "more than a proof can have": lambda path: (path.write_bytes(b""), os.truncate(path, 1 << 40)),
    "zeros": lambda path: (path.write_bytes(b""), os.truncate(path, 100 << 20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded(name, tmp_path):
    """One GiB of address space, and seconds, are enough to refuse."""
    path = tmp_path / "bomb"
    BOMBS[name](path)
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); " + (
        f"sys.argv = ['x', {str(path)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-1000:]
    assert done.stderr.startswith("cannot be read: ")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_a_document_are_refused_and_never_crash(documents, data, tmp_path_factory):
    name = data.draw(st.sampled_from(["disclosure", "share", "spot-check", "consistency"]))
    good = (documents[0] / name).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(0, 20))
    new = data.draw(st.one_of(st.binary(max_size=20), st.sampled_from([b"1e9", b"[]", b"{}", b"null", b"true", b'""'])))
    changed = good[:at] + new + good[at + length :]
    assume(changed.removesuffix(b"\n") != good)
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(changed)
    assert second.main([str(path), str(documents[0] / "share")]) in (1, 2)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_in_a_database_never_crash(good, data, tmp_path_factory):
    """A flip where nothing lies is no difference; all else is refused, and nothing is more than a refusal."""
    run = tmp_path_factory.getbasetemp() / "fuzzed-run"
    if not run.exists():
        shutil.copytree(good[0], run)
    content = bytearray((good[0] / "ledger.db").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    (run / "ledger.db").write_bytes(content)
    assert second.main([str(run)]) in (0, 1, 2)
