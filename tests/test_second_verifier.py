"""tools/verify_ledger.py: accepts what is good, refuses each one-fault copy and names its place, as the first does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import rfc8785
import runs
from command import ROOT, call
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from faults import entries, files, forger, proofs, signatures
from faults.kit import Case, Fault

FAULTS = [*files.FAULTS, *entries.FAULTS, *signatures.FAULTS]

SCRIPT = ROOT / "tools" / "verify_ledger.py"


def load():
    spec = importlib.util.spec_from_file_location("verify_ledger", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify_ledger"] = module
    spec.loader.exec_module(module)
    return module


second = load()


def signing_key():
    return load_pem_private_key((Path(os.environ["LIMBECK_HOME"]) / "signing-key.pem").read_bytes(), None)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run, another of the same recipe, and a checkpoint of the first that was kept."""
    base = tmp_path_factory.mktemp("good")
    run, other = runs.make_run(base / "run"), runs.make_run(base / "other")
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
    if fault.missed:
        assert first.exit_code == 0, told
    else:
        assert first.exit_code in (1, 2), told
        assert (fault.first or fault.place) in first.output, told
    if fault.unseen:
        assert code == 0, told
    else:
        assert code in (1, 2), told
        assert fault.place in printed, told


def two_teachers(records: runs.Records) -> runs.Records:
    """Every other answer is another teacher's, so that a share has two classes."""
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
        ("share",),
        ("spot-check", "--seed", "a beacon", "--draws", 20, "--raw"),
        ("consistency", "--checkpoint", folder / "kept"),
    ):
        out = folder / {"disclose": "disclosure"}.get(words[0], words[0])
        result = call("ledger", words[0], run, *words[1:], "--out", out)
        assert result.exit_code == 0, result.output
        documents[out.name] = json.loads(out.read_bytes())
    return documents


@pytest.fixture(scope="module")
def handed(tmp_path_factory) -> tuple[Path, proofs.Proofs]:
    base = tmp_path_factory.mktemp("handed")
    run, other = runs.make_run(base / "run", change=two_teachers), runs.make_run(base / "other", change=two_teachers)
    documents, others = hand_over(run, base / "documents"), hand_over(other, base / "others")
    return base / "documents", proofs.Proofs(documents, others, signing_key())


@pytest.mark.parametrize("fault", proofs.FAULTS, ids=[f"{fault.form}: {fault.name}" for fault in proofs.FAULTS])
def test_both_refuse_a_document(fault: proofs.Fault, handed, tmp_path, capsys):
    folder, given = handed
    path, share = tmp_path / "proof", [folder / "share"] if fault.form == "spot-check" else []
    proofs.write(path, fault.make(given))
    options = [forger.keyid(given.key) if word == "KEY" else word for word in fault.options]
    first = call("ledger", "check", path, *(["--share", *share] if share else []), *options)
    code = second.main([*map(str, [path, *share]), *options])
    printed = "".join(capsys.readouterr())
    told = f"first {first.exit_code}:\n{first.output[-3000:]}\nsecond {code}:\n{printed[-3000:]}"
    assert first.exception is None or isinstance(first.exception, SystemExit), told
    assert first.exit_code in ((0,) if fault.missed else (1, 2)), told
    assert code in (1, 2), told
    assert fault.place in printed, told


@pytest.mark.parametrize("name", ["disclosure", "share", "consistency", "kept"])
def test_a_good_document_holds(name, handed, capsys):
    assert second.main([str(handed[0] / name)]) == 0, "".join(capsys.readouterr())


def test_a_good_spot_check_holds_with_its_share_and_not_without(handed, capsys):
    folder, _ = handed
    assert second.main([str(folder / "spot-check"), str(folder / "share")]) == 0, "".join(capsys.readouterr())
    assert second.main([str(folder / "spot-check")]) == 2
    assert "give that file too" in capsys.readouterr().err


def test_every_field_of_every_row_can_be_shown(handed, tmp_path, capsys):
    run, out = handed[0].parent / "run", tmp_path / "proof"
    for row in range(runs.PROMPTS - 1):
        for field in (*second.FIELDS, "share"):
            assert call("ledger", "disclose", run, "--row", row, "--field", field, "--out", out).exit_code == 0
            assert second.main([str(out)]) == 0, "".join(capsys.readouterr())
            out.unlink()
