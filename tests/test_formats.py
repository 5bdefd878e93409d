"""What earlier releases wrote is read, or refused, as documented; for ever. tests/data/README.md has the files."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import runs
from command import ROOT, call
from verifier import second

from limbeck.collect.endpoints.batch_log import BatchLog, Row
from limbeck.collect.journal import Journal
from limbeck.collect.migrations import MIGRATIONS
from limbeck.collect.teachers import Request
from limbeck.errors import InputError, StaleError
from limbeck.ledger.layout import FORMAT
from limbeck.ledger.store import Ledger
from limbeck.records import Completion
from limbeck.signal.manifest import VERSION
from limbeck.signal.store import SignalStore
from limbeck.tables import read_records, write_records

DATA = ROOT / "tests" / "data"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in DATA.glob("*.tar.xz"))
RUNS = [name for name in NAMES if name.startswith(("ledger-", "waived-"))]
NEWEST = "ledger-2-written"
"""The fixture that has every table, column and fact of a run of today."""
ACCOUNT = "sha256:" + "a" * 64
MARKED = re.compile(r"urn:x-limbeck:[a-z-]+:[0-9]+|limbeck-[a-z-]+/[0-9]+")
"""How documents and statements name their format and its version."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("formats")
    for name in NAMES:
        with tarfile.open(DATA / f"{name}.tar.xz") as tar:
            tar.extractall(base / name, filter="data")
    (base / "journal-1").mkdir()
    shutil.copy(DATA / "journal-1.db", base / "journal-1" / "journal.db")
    return {path.name: path for path in base.iterdir()}


def copied(of: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of, tmp_path / of.name))


def verify_both(run: Path, capsys) -> tuple[int, int, str]:
    """Exit codes of both verifiers, and all they said."""
    first, code = call("ledger", "verify", run), second.main([str(run)])
    assert first.exception is None or isinstance(first.exception, SystemExit), first.exception
    return first.exit_code, code, first.output + "".join(capsys.readouterr())


def flip(path: Path, inside: bytes = b"") -> None:
    """One bit: of a byte in the middle of what is looked for, or of the file."""
    data = bytearray(path.read_bytes())
    assert inside in data
    data[data.index(inside) + len(inside) // 2 if inside else len(data) // 2] ^= 1
    path.write_bytes(data)


def bodies(run: Path) -> list[str]:
    with closing(sqlite3.connect(run / "ledger.db")) as db:
        return [body for (body,) in db.execute("SELECT body FROM entries ORDER BY idx")]


def bring_up(run: Path) -> None:
    """What the next command that writes to a ledger of layout 1 does first."""
    with Ledger(run / "ledger.db"):
        pass


# ---------------------------------------------------------------- none is forgotten


def test_every_numbered_version_has_a_fixture(unpacked):
    """Whoever raises a number, or names a new form, has to add what the new code writes."""
    for kind, newest in (("ledger", FORMAT), ("journal", len(MIGRATIONS)), ("signals", VERSION)):
        for number in range(1, newest + 1):
            there = [name for name in unpacked if re.fullmatch(rf"{kind}-{number}(-.*)?", name)]
            assert there, f"no fixture of {kind} {number}: see tests/data/README.md"


def test_every_form_has_a_fixture(unpacked):
    named = {m for path in (ROOT / "limbeck").rglob("*.py") for m in MARKED.findall(path.read_text(encoding="utf-8"))}
    held: set[str] = set()
    for name in RUNS:
        for document in (unpacked[name] / "documents").glob("*"):
            held |= {json.loads(document.read_bytes()).get("form", "")}
        for body in bodies(unpacked[name] / "run"):
            payloads = re.findall(r'"payload":"([^"]+)"', body)
            held |= {json.loads(base64.b64decode(payload))["predicateType"] for payload in payloads}
    assert len(named) >= 8, named
    assert named <= held, f"no fixture of {sorted(named - held)}: see tests/data/README.md"


def columns(run: Path) -> dict[str, list[str]]:
    return {path.relative_to(run).as_posix(): pq.read_schema(path).names for path in run.rglob("*.parquet")}


def test_the_newest_fixture_has_what_a_run_has_now(unpacked, tmp_path):
    """A new column, stage or fact of a run needs a new fixture; the ones that are there stay as they are."""
    new, kept = runs.make_run(tmp_path / "run"), unpacked[NEWEST] / "run"
    assert columns(new) == columns(kept)
    now, then = ([json.loads(body) for body in bodies(run)] for run in (new, kept))
    assert [(b["stage"], sorted(b), sorted(b["facts"])) for b in now] == [
        (b["stage"], sorted(b), sorted(b["facts"])) for b in then[: len(now)]
    ]


def test_what_is_read_has_the_version_its_name_says(unpacked):
    for name, folder in unpacked.items():
        number = int(name.split("-")[1])
        for path in ([folder / "run" / "ledger.db"] if name in RUNS else []) + list(folder.glob("journal.db")):
            assert int.from_bytes(path.read_bytes()[60:64], "big") == number
        for path in folder.glob("signals/manifest.json"):
            assert json.loads(path.read_text(encoding="utf-8"))["version"] == number


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("name", RUNS)
def test_both_accept_each_run(name, unpacked, tmp_path, capsys):
    run = copied(unpacked[name] / "run", tmp_path)
    if name.startswith("ledger-1"):
        written = bodies(run)
        first, code, said = verify_both(run, capsys)
        assert (first, code) == (1, 2)
        assert "layout 1" in said
        assert "bring it up to date" in said
        assert "user_version is 0x1" in said
        bring_up(run)
        assert bodies(run) == written
    assert verify_both(run, capsys)[:2] == (0, 0)


FLIPPED = ("recipe.yaml", "completions.parquet", "examples/examples.parquet", "student/deep/weights.bin", "ledger.db")


@pytest.mark.parametrize("file", FLIPPED)
@pytest.mark.parametrize("name", RUNS)
def test_both_refuse_each_run_with_one_bit_flipped(name, file, unpacked, tmp_path, capsys):
    run = copied(unpacked[name] / "run", tmp_path)
    if name.startswith("ledger-1"):
        bring_up(run)
    flip(run / file, {"ledger.db": b'"stage":"render"', "recipe.yaml": b"tiny"}.get(file, b""))
    first, code, said = verify_both(run, capsys)
    assert first in (1, 2), said
    assert code in (1, 2), said


DOCUMENTED = [f"ledger-2-{name}" for name in ("ungated", "gated", "batches", "written", "named")]


@pytest.mark.parametrize("form", ["checkpoint", "disclose", "share", "spot-check", "consistency"])
@pytest.mark.parametrize("name", DOCUMENTED)
def test_documents_hold_and_not_with_one_bit_flipped(name, form, unpacked, tmp_path, capsys):
    folder = copied(unpacked[name] / "documents", tmp_path)
    path, share = folder / form, [folder / "share"] if form == "spot-check" else []
    words = [path, *(["--share", *share] if share else [])]
    if form != "checkpoint":
        assert call("ledger", "check", *words).exit_code == 0
    assert second.main([*map(str, [path, *share])]) == 0, capsys.readouterr()
    flip(path, re.findall(rb'"sig":"[^"]+"', path.read_bytes())[0])
    if form != "checkpoint":
        assert call("ledger", "check", *words).exit_code in (1, 2)
    assert second.main([*map(str, [path, *share])]) in (1, 2)


@pytest.mark.parametrize("kind", ["text", "hidden"])
def test_signals_that_are_not_stored_are_read_and_their_manifest_is_verified(kind, unpacked, tmp_path, capsys):
    run = copied(unpacked[f"ledger-2-{kind}"] / "run", tmp_path)
    store = SignalStore.open(run / "signals")
    counts = store.manifest.counts
    assert (store.manifest.key.kind, counts.examples, counts.positions) == (kind, 3, 12)
    flip(run / "signals" / "manifest.json", b'"positions"')
    first, code, said = verify_both(run, capsys)
    assert (first, code) == (1, 1)
    assert "signals" in said
    with pytest.raises(StaleError):
        SignalStore.open(run / "signals")


def test_a_time_stamp_of_an_earlier_release_still_anchors(unpacked, tmp_path, capsys):
    folder = copied(unpacked["ledger-2-stamped"], tmp_path)
    run, authority = folder / "run", folder / "authority.pem"
    held = call("ledger", "verify", run, "--authority", authority)
    assert held.exit_code == 0, held.output
    assert "anchored: the checkpoint of entry" in held.output
    assert "unanchored" not in held.output
    (stamp,) = [body for body in bodies(run) if json.loads(body)["stage"] == "timestamp"]
    told = json.loads(stamp)["facts"]
    (key,) = [key for key, value in told.items() if isinstance(value, str) and len(value) > 1000]
    flip(run / "ledger.db", told[key].encode()[:400])
    first, code, said = verify_both(run, capsys)
    assert first == 1, said
    assert code == 1, said


def test_answers_of_endpoints_of_an_earlier_release_are_still_read(unpacked, tmp_path, capsys):
    """Each API alone and in a batch; and nothing of them is left unread."""
    run = copied(unpacked["ledger-2-endpoints"] / "run", tmp_path)
    with closing(sqlite3.connect(run / "journal.db")) as db:
        keys = [key for (key,) in db.execute("SELECT key FROM answers")]
    with Journal(run / "journal.db") as journal:
        found = [
            (json.loads(one.request)["form"], one.raw[:7] == b"\x1ebatch ") for one in journal.get_all(keys).values()
        ]
    forms = ("openai-chat/1", "openai-responses/1", "anthropic-messages/1")
    assert {*found} == {(form, batch) for form in forms for batch in (False, True)}
    first, code, said = verify_both(run, capsys)
    assert (first, code) == (0, 0)
    assert "only their digest" not in said
    rows = [*read_records(run / "completions.parquet", Completion)]
    write_records(
        run / "completions.parquet", [one.model_copy(update={"prompt_tokens": 7_000}) for one in rows], Completion
    )
    said = verify_both(run, capsys)[2]
    for row in range(len(rows)):
        assert f"completions.parquet: row {row}: prompt_tokens answered" in said


def test_leaves_have_the_version_that_they_were_written_with(unpacked, capsys):
    """And what those of version 2 say of parents, a stranger reads out of a disclosure."""
    for name in RUNS:
        facts = [json.loads(body)["facts"] for body in bodies(unpacked[name] / "run")]
        versions = {fact["leaves"]["version"] for fact in facts if "leaves" in fact}
        assert versions <= {2 if name in ("ledger-2-written", "ledger-2-named") else 1}, name
    path = unpacked["ledger-2-written"] / "documents" / "parents"
    told = json.loads(path.read_bytes())
    assert [kind for kind, _ in told["value"]] == ["completion", "seed", "prompt"]
    assert (
        told["value"][2][1] in pq.read_table(unpacked["ledger-2-written"] / "run" / "prompts.parquet")["id"].to_pylist()
    )
    assert call("ledger", "check", path).exit_code == 0
    assert second.main([str(path)]) == 0, capsys.readouterr()


def test_how_a_provider_named_an_answer_is_read_out_of_a_disclosure(unpacked, capsys):
    """The fourth row's: the first that came in a batch."""
    run, folder = unpacked["ledger-2-named"] / "run", unpacked["ledger-2-named"] / "documents"
    told = {name: json.loads((folder / name).read_bytes())["value"] for name in ("response", "weights")}
    row = next(r for r in pq.read_table(run / "completions.parquet").to_pylist() if r["answer_id"] == "chatcmpl-1")
    assert told == {
        "response": {"digest": row["response"], "id": "chatcmpl-1"},
        "weights": {"digest": None, "fingerprint": "fp_1"},
    }
    for name in told:
        assert call("ledger", "check", folder / name).exit_code == 0
        assert second.main([str(folder / name)]) == 0, capsys.readouterr()


def test_completions_of_an_earlier_release_say_no_names_and_that_is_a_note(unpacked, tmp_path, capsys):
    run = copied(unpacked["ledger-2-endpoints"] / "run", tmp_path)
    assert {one.answer_id for one in read_records(run / "completions.parquet", Completion)} == {None}
    first, code, said = verify_both(run, capsys)
    assert (first, code) == (0, 0)
    assert "has no column: 11" in " ".join(said.split())


# ---------------------------------------------------------------- journals

REQUESTS = [Request.of({"number": number}) for number in range(4)]
RAWS = [b"answer %d " % number * 20 for number in range(3)]
JOURNALS = [f"journal-{number}" for number in range(1, len(MIGRATIONS) + 1)]


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_gives_what_it_was_given(name, unpacked, tmp_path):
    path = copied(unpacked[name], tmp_path) / "journal.db"
    sent = {} if name == "journal-1" else {"answered": (1, 7), "cut": (1, 100), "killed": (2, 200)}
    sent |= {"in a batch": (1, 50)} if name == "journal-3" else {}
    for _ in range(2):  # as it was, and after it was brought up to date
        with BatchLog(path) as log:
            assert (len(log), log.refused, log.next_number) == (3, 1, sum(n for n, _ in sent.values()) + 1)
            assert [log.get(request.key).raw for request in REQUESTS[:3]] == RAWS
            assert [log.get(request.key).request for request in REQUESTS[:3]] == [r.body for r in REQUESTS[:3]]
            assert log.outcomes(ACCOUNT) == sent
            if name != "journal-3":
                assert log.open_batches("a model") == []
                continue
            (batch,) = log.open_batches("a model")
            assert (batch.token, batch.rows, batch.name) == ("batch-token", 1, "batch-name")
            assert log.open_rows(batch.number) == {5: Row(REQUESTS[3].key, ACCOUNT, 50)}
            assert log.requests([(5, REQUESTS[3].key)]) == [REQUESTS[3]]


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_with_one_bit_flipped_is_refused(name, unpacked, tmp_path):
    path, key = copied(unpacked[name], tmp_path) / "journal.db", REQUESTS[0].key
    with closing(sqlite3.connect(path)) as db:
        packed = db.execute("SELECT raw FROM answers WHERE key = ?", (key,)).fetchone()[0]
    flip(path, packed)
    with Journal(path) as journal, pytest.raises(InputError):
        journal.get(key)


# ---------------------------------------------------------------- signals


def test_signals_of_version_1_are_refused(unpacked):
    with pytest.raises(StaleError, match="version") as error:
        SignalStore.open(unpacked["signals-1"] / "signals")
    assert "run again" in str(error.value)


@pytest.mark.parametrize("name", ["signals-2", "top_k-2"])
def test_signals_are_what_went_in_and_refused_with_one_bit_flipped(name, unpacked, tmp_path):
    folder = copied(unpacked[name], tmp_path)
    store = SignalStore.open(folder / "signals")
    for one, values in json.loads((folder / "expected.json").read_text(encoding="utf-8")).items():
        taken = store.take([one])
        assert {field: getattr(taken, field).tolist() for field in values} == values
    for path in (folder / "signals").glob("*[!n]"):
        data = path.read_bytes()
        flip(path)
        with pytest.raises(StaleError):
            SignalStore.open(folder / "signals")
        path.write_bytes(data)
