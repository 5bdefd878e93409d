"""Laws of what strangers get: it holds, it shows nothing else, and no change to it holds."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import runs
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, VerificationError
from limbeck.ledger.canonical import canonical, digest_bytes
from limbeck.ledger.merkle.fields import FIELDS
from limbeck.ledger.proofs.consistency import check_consistency, continues
from limbeck.ledger.proofs.disclosure import NAMES, check_disclosure, disclose
from limbeck.ledger.proofs.documents import Disclosure, ShareDocument, SpotCheckDocument, document_bytes, read_document
from limbeck.ledger.proofs.share import check_share, share
from limbeck.ledger.proofs.spot_check import check_spot_check, spot_check
from limbeck.ledger.sealing import leaves
from limbeck.ledger.signing import keys
from limbeck.ledger.signing.envelope import sign

ROWS = runs.PROMPTS - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def manifest(whole):
    return share(whole)


@pytest.fixture(scope="module")
def checked(whole, manifest):
    return spot_check(whole, manifest, "seed", 20, raw=True)


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def holds(proof: Disclosure) -> bool:
    try:
        check_disclosure(proof)
    except ValueError:
        return False
    return True


# Disclosure


@pytest.mark.parametrize("field", NAMES)
def test_every_field_of_every_row_can_be_shown_to_a_stranger(whole, field):
    records = list(leaves(runs.RECIPE, whole, 2))
    assert len(records) == ROWS
    for row, leaf in enumerate(records):
        proof = disclose(whole, row, field)
        assert proof.value == (leaf.share.value() if field == "share" else leaf.values[field])
        assert check_disclosure(proof).statement.predicate.kind in ("training-intended", "training-done")


def test_a_disclosure_shows_nothing_else(whole):
    """Two rows that differ in all fields but one give proofs with nothing of the others in them."""
    text = document_bytes(disclose(whole, 1, "terms")).decode()
    other = list(leaves(runs.RECIPE, whole, 2))[1]
    for name, value in other.values.items():
        if name not in ("terms", "gate", "provider", "route", "weights"):
            assert canonical(value).decode() not in text, name
    assert runs.TEACHER not in text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_disclosure_holds(whole, data):
    row, field = data.draw(st.integers(0, ROWS - 1)), data.draw(st.sampled_from(NAMES))
    proof = disclose(whole, row, field)
    assert holds(proof)
    path = base64.b64decode(proof.path)
    at = data.draw(st.integers(0, len(path) - 1))
    others = [name for name in NAMES if name != field]
    changed = [
        {"path": base64.b64encode(path[:at] + bytes([path[at] ^ 1]) + path[at + 1 :]).decode()},
        {"path": base64.b64encode(path[32:]).decode()},
        {"path": base64.b64encode(path + path[:32]).decode()},
        {"path": base64.b64encode(path[:-1]).decode()},
        {"path": ""},
        {"salt": base64.b64encode(os.urandom(16)).decode()},
        {"salt": base64.b64encode(os.urandom(15)).decode()},
        {"value": "another"},
        {"row": (row + 1) % ROWS},
        {"row": row + ROWS},
        {"field": data.draw(st.sampled_from(others))},
        {"field": "entry"},
        {"form": "limbeck-disclosure/1"},
    ]
    for change in changed:
        assert not holds(proof.model_copy(update=change)), change


def test_a_proof_of_another_run_or_under_another_signature_does_not_hold(whole, tmp_path):
    other = runs.make_run(tmp_path / "other")
    mine, theirs = disclose(whole, 0, "terms"), disclose(other, 0, "terms")
    assert not holds(mine.model_copy(update={"checkpoint": theirs.checkpoint}))
    root = mine.checkpoint
    assert not holds(mine.model_copy(update={"checkpoint": root.model_copy(update={"keyid": "11" * 32})}))
    statement = json.loads(json.dumps(root.statement))
    statement["predicate"]["examples"]["first"] = 4
    assert not holds(mine.model_copy(update={"checkpoint": root.model_copy(update={"statement": statement})}))
    # Signed anew by somebody who holds a key, the path still leads to one root only.
    statement["subject"][0]["digest"]["sha256"] = "00" * 32
    signed = sign(statement, keys.signing_key())
    forged = root.model_copy(update={"statement": statement, "sig": signed.sig, "keyid": signed.keyid})
    assert not holds(mine.model_copy(update={"checkpoint": forged}))


@pytest.mark.parametrize(("row", "field"), [(-1, "terms"), (ROWS, "terms"), (0, "class"), (0, "")])
def test_rows_and_fields_that_are_not_there_are_refused(whole, row, field):
    with pytest.raises(InputError, match="no such"):
        disclose(whole, row, field)


def test_nothing_is_disclosed_of_rows_that_were_changed(copy):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(copy / "leaves.parquet")
    rows = table.to_pylist()
    rows[0]["fields"] = rows[0]["fields"].replace('"own-model"', '"mit"')
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy / "leaves.parquet")
    with pytest.raises(VerificationError, match="not what the ledger committed to"):
        disclose(copy, 0, "terms")
    with pytest.raises(VerificationError, match="not what the ledger committed to"):
        share(copy)


def test_nothing_is_disclosed_without_the_secret_or_a_signature(whole, tmp_path, monkeypatch):
    unsigned = runs.make_run(tmp_path / "unsigned", until="annotate", signed=False)
    with pytest.raises(InputError, match="nothing signed covers"):
        disclose(unsigned, 0, "terms")
    with pytest.raises(InputError, match="nothing is sealed"):
        share(runs.make_run(tmp_path / "short", until="curate"))
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "stranger"))
    with pytest.raises(InputError, match="another secret"):
        disclose(whole, 0, "terms")


# Shares


def test_shares_are_those_of_the_examples_and_anybody_can_add_them_up(whole, manifest):
    from limbeck.render.examples import read_examples

    due = Counter()
    for example in read_examples(whole / "examples").train:
        due[example.teacher] += example.supervised
    assert {s.name: s.tokens for s in manifest.shares} == dict(due)
    held = check_share(manifest)
    assert held.total == due.total()
    assert held.root.examples.count == ROWS


def test_a_manifest_shows_only_class_split_and_tokens(whole, manifest):
    text = document_bytes(manifest).decode()
    for leaf in leaves(runs.RECIPE, whole, 2):
        for name in ("completion", "prompt", "request", "response", "created", "example", "terms"):
            assert canonical(leaf.values[name]).decode() not in text, name


def shares_hold(document: ShareDocument) -> bool:
    try:
        check_share(document)
    except ValueError:
        return False
    return True


def test_no_changed_manifest_holds(manifest):
    rows, first = manifest.rows, manifest.shares[0]
    more = [rows.tokens[0] + 1, *rows.tokens[1:]]
    wrong = [
        {"rows": rows.model_copy(update={"tokens": more})},
        {"rows": rows.model_copy(update={"tokens": more}), "shares": [first.model_copy(update={"tokens": 17})]},
        {"rows": rows.model_copy(update={"tokens": rows.tokens[:-1]})},
        {"rows": rows.model_copy(update={"split": [1 - s for s in rows.split]})},
        {"rows": rows.model_copy(update={"class_": [1] * ROWS})},
        {"rows": rows.model_copy(update={"private": rows.private[44:]})},
        {"rows": rows.model_copy(update={"salts": base64.b64encode(bytes(16 * ROWS)).decode()})},
        {"classes": ["another"], "shares": [first.model_copy(update={"name": "another"})]},
        {"classes": []},
        {"before": manifest.before[:-1]},
        {"after": [*manifest.after, manifest.before[0]]},
        {"before": manifest.before[::-1]},
        {"shares": []},
        {"shares": [first.model_copy(update={"rows": first.rows + 1})]},
    ]
    assert shares_hold(manifest)
    for change in wrong:
        assert not shares_hold(manifest.model_copy(update=change)), change


# Spot-checks


def spot_holds(document: SpotCheckDocument, manifest: ShareDocument) -> bool:
    try:
        check_spot_check(document, manifest, digest_bytes(document_bytes(manifest)))
    except ValueError:
        return False
    return True


def test_the_picked_rows_are_opened_and_hold(whole, manifest, checked):
    assert spot_holds(checked, manifest)
    records = list(leaves(runs.RECIPE, whole, 2))
    assert checked.rows
    for opened in checked.rows:
        assert opened.fields == records[opened.row].values
        assert records[opened.row].share.split == "train"
        assert digest_bytes(base64.b64decode(opened.response or "")) == opened.fields["response"]["digest"]
    assert spot_check(whole, manifest, "seed", 20, raw=True) == checked


def test_no_changed_spot_check_holds(manifest, checked):
    first = checked.rows[0]
    others = checked.rows[1:]
    assert set(first.fields) == set(FIELDS)
    digest = first.fields["response"]["digest"]
    wrong = [
        {"rows": others},
        {"rows": checked.rows[::-1]},
        {"rows": [first, *checked.rows]},
        {"draws": 1},
        {"share": "sha256:" + "0" * 64},
        {"rows": [first.model_copy(update={"fields": first.fields | {"terms": "mit"}}), *others]},
        {"rows": [first.model_copy(update={"fields": {"terms": "mit"}}), *others]},
        {"rows": [first.model_copy(update={"salts": base64.b64encode(bytes(256)).decode()}), *others]},
        {"rows": [first.model_copy(update={"salts": ""}), *others]},
        {"rows": [first.model_copy(update={"response": "YQ=="}), *others]},
        {"rows": [first.model_copy(update={"fields": first.fields | {"response": digest}}), *others]},
    ]
    for change in wrong:
        assert not spot_holds(checked.model_copy(update=change), manifest), change


# Files and commands


def test_files_are_read_strictly(whole, tmp_path, manifest, checked):
    path = tmp_path / "file"
    for document in (disclose(whole, 0, "share"), manifest, checked):
        data = document_bytes(document)
        for good in (data, data + b"\n"):
            path.write_bytes(good)
            assert read_document(path).document == document
        value = json.loads(data)
        for bad in (
            json.dumps(value).encode(),
            canonical(value | {"more": 1}),
            canonical({k: v for k, v in value.items() if k != "checkpoint"}),
            canonical(value | {"form": "limbeck-disclosure/3"}),
            canonical(value | {"form": []}),
            data[:-1] + b',"form":"x"}',
            data[:-5],
            b"[" * 100_000,
            b"",
            b"null",
        ):
            path.write_bytes(bad)
            with pytest.raises(InputError):
                read_document(path)


def test_the_commands_make_proofs_that_the_command_checks(whole, tmp_path):
    proof, manifest, spot = tmp_path / "proof", tmp_path / "manifest", tmp_path / "spot"
    said = call("ledger", "disclose", whole, "--row", 2, "--field", "teacher")
    assert said.exit_code == 0, said.output
    proof.write_text(said.stdout)
    shares = json.loads(call("ledger", "share", whole, "--out", manifest, "--json").stdout)
    assert [s["share"] for s in shares["shares"]] == [1.0]
    words = ("--seed", "s", "--draws", 60, "--share", manifest, "--out", spot, "--json")
    bound = json.loads(call("ledger", "spot-check", whole, *words).stdout)
    assert bound["misstated_at_most"] == pytest.approx(0.0487, abs=1e-4)
    for words in ((proof,), (manifest,), (spot, "--share", manifest)):
        found = call("ledger", "check", *words, "--json")
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["root"] in (
            shares["root"],
            json.loads(call("ledger", "check", proof, "--json").stdout)["root"],
        )
        assert call("ledger", "check", *words, "--key", shares["key"]).exit_code == 0
        assert call("ledger", "check", *words, "--key", "00" * 32).exit_code == 1
    assert call("ledger", "check", spot).exit_code == 2
    assert call("ledger", "check", spot, "--share", proof).exit_code == 2
    assert call("ledger", "check", tmp_path / "nothing").exit_code == 2
    proof.write_text(said.stdout.replace(runs.TEACHER, "wheel:another==1"))
    assert call("ledger", "check", proof).exit_code == 1
    assert call("ledger", "share", whole, "--out", manifest).exit_code == 2


def test_a_kept_checkpoint_is_continued_or_the_ledger_was_written_anew(copy, tmp_path):
    first, last = runs.signed(copy)[0].envelope, runs.signed(copy)[-1].envelope
    kept, proof = tmp_path / "kept", tmp_path / "proof"
    for envelope in (first, last):
        document = continues(copy, envelope)
        check_consistency(document)
        for change in ({"old": document.new, "new": document.old}, {"path": document.path + "AAAA"}, {"path": "AAAA"}):
            if envelope is first or "path" in change:
                with pytest.raises(ValueError, match=r"continue|path"):
                    check_consistency(document.model_copy(update=change))
    kept.write_bytes(first.data)
    assert call("ledger", "consistency", copy, "--checkpoint", kept, "--out", proof).exit_code == 0
    assert call("ledger", "check", proof).exit_code == 0
    assert call("ledger", "consistency", copy, "--checkpoint", proof).exit_code == 2
    other = runs.make_run(tmp_path / "other")
    refused = call("ledger", "consistency", other, "--checkpoint", kept)
    assert refused.exit_code == 1
    assert "does not continue this checkpoint" in refused.stderr
    kept.write_bytes(last.data.replace(b'"sig":"', b'"sig":"AAAA'))
    assert call("ledger", "consistency", copy, "--checkpoint", kept).exit_code == 2


def test_what_is_printed_says_what_it_means(tmp_path):
    """A checkpoint without a stamp, a share, and the gate's field; each as JSON too, which says the same."""
    run, out = runs.make_run(tmp_path / "run"), tmp_path / "share"
    printed = call("ledger", "checkpoint", run).stdout
    assert "None" not in printed
    assert "unanchored" in printed
    assert "--timestamp FILE" in printed
    assert json.loads(call("ledger", "checkpoint", run, "--json").stdout)["stamped"] is None
    assert call("ledger", "share", run, "--out", out).exit_code == 0
    held = call("ledger", "check", out).stdout
    assert "100.00 %" in held
    assert "{" not in held
    told = call("ledger", "disclose", run, "--row", 0, "--field", "gate")
    proof = tmp_path / "proof"
    proof.write_text(told.stdout, encoding="utf-8")
    held = call("ledger", "check", proof)
    assert held.exit_code == 0
    for said in (told.stderr, held.stdout):
        assert "rules on the whole set after that was sealed" in said
    assert "rules on" not in call("ledger", "disclose", run, "--row", 0, "--field", "terms").stderr


def test_a_spot_check_of_a_later_checkpoint_says_how_to_open_rows_for_the_share_at_hand(tmp_path):
    run, share = runs.make_run(tmp_path / "run"), tmp_path / "share"
    assert call("ledger", "share", run, "--out", share).exit_code == 0
    assert call("ledger", "note", run, "Read.").exit_code == 0
    assert call("ledger", "checkpoint", run).exit_code == 0
    words = ("ledger", "spot-check", run, "--seed", "a beacon", "--draws", 9)
    assert call(*words, "--out", tmp_path / "later").exit_code == 0
    wrong = call("ledger", "check", tmp_path / "later", "--share", share)
    assert wrong.exit_code == 1
    assert "limbeck ledger spot-check RUN --seed S --share FILE" in " ".join(wrong.output.split())
    assert call(*words, "--share", share, "--out", tmp_path / "right").exit_code == 0
    assert call("ledger", "check", tmp_path / "right", "--share", share).exit_code == 0


def test_every_file_that_the_commands_write_is_read_by_check(copy, tmp_path):
    """A checkpoint too: whole, by its key, and under no other; a change of one character of it does not hold."""
    out = tmp_path / "kept.json"
    assert call("ledger", "checkpoint", copy, "--out", out).exit_code == 0
    made = runs.signed(copy)[-1]
    told = json.loads(call("ledger", "check", out, "--json", "--key", made.envelope.keyid).stdout)
    root = made.statement.root.hex()
    assert (told["ok"], told["root"], told["key"], told["digest"]) == (
        True, root, made.envelope.keyid, digest_bytes(out.read_bytes())
    )  # fmt: skip
    assert root in call("ledger", "check", out).stdout
    assert call("ledger", "check", out, "--key", "ab" * 32).exit_code == 1
    assert call("ledger", "check", out, "--key", "00").exit_code == 2
    value = json.loads(out.read_bytes())
    payload = json.loads(base64.b64decode(value["payload"]))
    payload["predicate"]["size"] += 1
    value["payload"] = base64.b64encode(canonical(payload)).decode()
    (tmp_path / "changed").write_bytes(canonical(value))
    assert call("ledger", "check", tmp_path / "changed").exit_code == 1
    (tmp_path / "spaced").write_bytes(json.dumps(json.loads(out.read_bytes())).encode())
    assert call("ledger", "check", tmp_path / "spaced").exit_code == 2
    (tmp_path / "none").write_text("{}")
    told = call("ledger", "check", tmp_path / "none").stderr
    assert all(word in told for word in ("disclose", "share", "spot-check", "consistency", "checkpoint"))
    assert call("ledger", "check", out, "--share", out).exit_code == 2
