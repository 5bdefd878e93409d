"""Verification: recompute everything a ledger says and list every difference. Needs no torch and trusts no
path it reads.

Checked, for a whole run or a partial one:

- the ledger itself: its tables and triggers, the digest of every entry, the chain, the indices;
- the tree: its leaves are the entries and the examples, its stored subtrees are what lies under them
  (`limbeck.ledger.commitments`);
- what is signed: every checkpoint and note, its signature, its root, and its time-stamps
  (`limbeck.ledger.signing.checks`);
- the terms gate: every token, the set it is bound to, and every waiver, which has to have been in force when the
  training under it began (`limbeck.terms.evidence`);
- the recipe: every entry was made with the recipe that lies in RUN;
- the files: what the latest entry of each stage says it wrote is there, byte for byte;
- the arrows: whatever an entry read is what the stage before had written by then, and nothing newer exists;
- the records: every completion against the raw answer in the journal, and every record against its parents
  (`limbeck.ledger.parents`).

What this cannot show stands in the notes and in docs/ledger.md.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import yaml

from limbeck.errors import Problem, RunDirError
from limbeck.ledger.canonical import CARD, EMPTY, digest_json, digest_path, manifest
from limbeck.ledger.paths import OutsideError, read_bounded, refuse_other_than_run, safe_path
from limbeck.ledger.recipe_text import LONGEST, read_recipe_text
from limbeck.ledger.staleness import inside_run, overtaken
from limbeck.ledger.store import Ledger, Row, chain_problems, entry_body, parse_entry
from limbeck.records import Digest, Entry

if TYPE_CHECKING:
    from limbeck.ledger.commitments import Tree
    from limbeck.ledger.merkle.order import LeafSet
    from limbeck.ledger.signing.checkpoints import Made

ANCHORED = (
    "the head digest that was given is worth what the place is worth where it was kept, and says "
    "nothing of entries that came after it"
)
CAPTURE = "a ledger shows what was recorded; it does not show that what was captured is honest or complete"

_OURS = frozenset({"recipe.yaml", "ledger.db", "journal.db"})
"""Files of RUN that no stage writes as a whole."""

_REDO = "put back what the run wrote, or run the same recipe again: it is then done anew, and the ledger says so"


@dataclass(frozen=True)
class Verification:
    """What a verification came to."""

    run: str
    entries: int
    head: Digest
    """Digest of the last entry: stands for the whole history."""
    differences: tuple[Problem, ...]
    """All of them, sorted by place. `found` is what is there now, `expected` what the ledger or the parent
    says.
    """
    notes: tuple[str, ...]
    """What was not, or cannot be, checked; stages not done yet; files nobody recorded."""

    @property
    def ok(self) -> bool:
        """Nothing differs."""
        return not self.differences

    def to_json(self) -> str:
        """All of it as JSON text."""
        values = asdict(self) | {"ok": self.ok, "differences": [p._asdict() for p in self.differences]}
        return json.dumps(values, ensure_ascii=False, indent=2)


def verify(
    run: str | os.PathLike[str],
    *,
    head: Digest | None = None,
    key: str | None = None,
    salts: bytes | None = None,
    authority: str | os.PathLike[str] | None = None,
) -> Verification:
    """Recompute everything the ledger of a RUN directory says. Writes nothing.

    `head` is a head digest noted down earlier: the ledger must then still hold that entry, so that nothing up
    to it was removed or written anew. `key` is the public key (hex) that has to have signed every checkpoint and note.
    `salts` is the key to the run's salts, as `limbeck ledger salts` writes it; without it the secret on this machine is
    tried. `authority` is a PEM file with the root certificates of time-stamping authorities.

    Raises:
        RunDirError: not a RUN directory.
        InputError: `head` or `key` of another form, or no certificates in `authority`.

    """
    from limbeck.ledger.columns import rarely_collected
    from limbeck.ledger.commitments import leaf_differences
    from limbeck.ledger.parents import record_differences
    from limbeck.ledger.signing.checks import Against, check_signed, refuse_malformed, signed_notes
    from limbeck.ledger.signing.timestamps import read_authorities
    from limbeck.terms.evidence import gate_problems

    root = Path(run)
    refuse_malformed(head, key)
    refuse_other_than_run(root)
    against = Against(head, key, salts, read_authorities(Path(authority)) if authority is not None else ())
    entries, digests, differences, tree = _read_ledger(root)
    differences += _anchor(digests, head)
    signed = check_signed(entries, tree.roots, tree.sets, against)
    outputs = _latest_outputs(entries)
    present, file_differences = _files(root, outputs)
    with rarely_collected():
        record_problems, record_notes = record_differences(root, present)
        leaf_problems, leaf_notes = leaf_differences(root, tree, present, salts)
    differences += gate_problems(entries, tree.sets, tree.latest)
    differences += [*signed.problems, *leaf_problems, *_order(root, signed.made, tree.sets, salts, present)]
    differences += [*_recipe(root, entries), *_arrows(entries), *file_differences, *record_problems]
    notes = [
        *([ANCHORED] if head is not None else ()),
        *signed_notes(signed, entries, against),
        CAPTURE,
        *_code_notes(entries),
        *_progress_notes(entries),
        *record_notes,
        *leaf_notes,
        *_strangers(root, outputs),
    ]
    now = digests[-1] if digests else EMPTY
    return Verification(os.fspath(run), len(digests), now, tuple(sorted(set(differences), key=_place)), tuple(notes))


def _place(problem: Problem) -> tuple[list[tuple[int, str]], Problem]:
    """Sorts row 9 before row 10."""
    parts = re.split(r"(\d+)", problem.where)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)], problem


class _Read(NamedTuple):
    """Entries as far as they can be read, even where the chain is broken; the digests as stored; what is
    wrong.
    """

    entries: list[Entry]
    digests: list[Digest]
    problems: list[Problem]
    tree: Tree


def _read_ledger(root: Path) -> _Read:
    from limbeck.ledger.commitments import Tree, check_tree

    try:
        with Ledger(safe_path(root, "ledger.db"), read_only=True, as_it_lies=True) as ledger:
            problems = ledger.schema_problems()
            if problems:  # a view could be endless, and a damaged file hold the same page everywhere
                return _Read([], [], problems, Tree())
            rows = ledger.rows()
            entries = list(_entries(rows))
            tree = check_tree(ledger, rows, entries)
    except RunDirError as error:
        return _Read([], [], list(error.problems), Tree())
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        found = f"cannot be read: {error}"
        return _Read([], [], [Problem("ledger.db", found, "a ledger", "put back a sound copy")], Tree())
    problems += [*chain_problems(rows), *tree.problems]
    return _Read(entries, [str(row.digest) for row in rows], problems, tree)


def _entries(rows: Sequence[Row]) -> Iterator[Entry]:
    for row in rows:
        with suppress(ValueError, RecursionError):
            entry = parse_entry(str(row.body))
            entry_body(entry)  # what has no canonical bytes cannot be compared either
            yield entry


def _order(
    root: Path, made: Sequence[Made], sets: Sequence[LeafSet] | None, key: bytes | None, present: frozenset[str]
) -> list[Problem]:
    """Commitments to the data's order against the recipe, where the salts are known."""
    from limbeck.ledger.sealing import known_salts
    from limbeck.ledger.signing.checkpoints import order_commitment
    from limbeck.ledger.signing.checks import order_problems
    from limbeck.rundir import RunDir

    if not sets or "recipe.yaml" not in present or (salts := known_salts(sets[-1], key)) is None:
        return []
    with suppress(ValueError, OSError, RecursionError, yaml.YAMLError):  # said elsewhere
        return order_problems(made, order_commitment(RunDir(root).recipe(), salts.order()), sets[-1])
    return []


def _anchor(digests: Sequence[Digest], head: Digest | None) -> list[Problem]:
    if head is None or head == EMPTY or head in digests:
        return []
    remedy = "entries were removed or written anew after this head was noted down, or it is another run's"
    return [Problem("ledger.db: head", "no entry with this digest", head, remedy)]


def _latest_outputs(entries: Sequence[Entry]) -> dict[str, tuple[Entry, Digest]]:
    """What each file or directory has to be: by the latest entry that wrote it."""
    latest = {entry.stage: entry for entry in entries}
    return {
        name: (entry, digest)
        for entry in sorted(latest.values(), key=lambda e: e.index)
        for name, digest in entry.outputs.items()
    }


def _recipe(root: Path, entries: Sequence[Entry]) -> list[Problem]:
    """Taken from the text, not from today's `Recipe`: one with more keys must still verify older runs."""
    try:
        digest = digest_json(read_recipe_text(read_bounded(safe_path(root, "recipe.yaml"), LONGEST)))
    except OutsideError as error:
        return list(error.problems)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        return [Problem("recipe.yaml", f"cannot be read: {error}", "the recipe as resolved", _REDO)]
    return [
        Problem(
            f"recipe.yaml, of which entry {entry.index} ({entry.stage}) was made",
            digest,
            entry.recipe,
            "put back the recipe this run was made by",
        )
        for entry in entries
        if entry.recipe != digest
    ]


def _arrows(entries: Sequence[Entry]) -> list[Problem]:
    """Each thing read in RUN is what its writer had last written by then; and each stage's latest entry is
    not older than a later, different writing of what it read.
    """
    problems: list[Problem] = []
    written: dict[str, tuple[Digest, Entry]] = {}
    for entry in entries:
        for name, digest in inside_run(entry.inputs).items():
            where = f"entry {entry.index} ({entry.stage}): input {name}"
            if name not in written:
                problems.append(
                    Problem(where, digest, "an earlier entry that wrote it", "the order of the stages is broken")
                )
            elif written[name][0] != digest:
                due, writer = written[name]
                problems.append(
                    Problem(
                        where,
                        digest,
                        f"{due}, as entry {writer.index} ({writer.stage}) wrote it",
                        "this stage read something that no stage wrote",
                    )
                )
        written |= {name: (digest, entry) for name, digest in entry.outputs.items()}
    problems += [
        Problem(
            f"entry {entry.index} ({entry.stage}): stale, made from an earlier {name}",
            entry.inputs[name],
            f"{writer.outputs[name]}, as entry {writer.index} ({writer.stage}) wrote it since",
            "run the same recipe again: the stage is then done anew",
        )
        for entry, name, writer in overtaken(entries)
    ]
    return problems


def _files(root: Path, outputs: Mapping[str, tuple[Entry, Digest]]) -> tuple[frozenset[str], list[Problem]]:
    """Names of RUN that are there and may be read; and every file that is not what its entry says."""
    present: set[str] = set()
    problems: list[Problem] = []
    for name, (entry, due) in outputs.items():
        try:
            path = safe_path(root, name)
            if not path.is_dir() and not path.is_file():
                found = "neither a file nor a directory" if path.exists() else "nothing"
                problems.append(Problem(name, found, f"{due}, as entry {entry.index} ({entry.stage}) wrote it", _REDO))
                continue
            problems += _compare(path, name, entry, due)
            present.add(name)
        except OutsideError as error:
            problems += error.problems
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}", due, "make it readable"))
    for name in ("recipe.yaml", "journal.db") if "completions.parquet" in present else ():
        try:
            path = safe_path(root, name)
            if name == "recipe.yaml" and path.exists() and path.stat().st_size > LONGEST:
                continue  # said elsewhere
            present.add(name)  # even where it is missing: that is a difference
        except OutsideError as error:
            problems += error.problems
    return frozenset(present), problems


def _compare(path: Path, name: str, entry: Entry, due: Digest) -> list[Problem]:
    """A directory's differences are told by file where the entry holds its manifest."""
    found = digest_path(path)
    written = f"as entry {entry.index} ({entry.stage}) wrote it"
    manifests = entry.facts.get("manifests")
    was = manifests.get(name) if isinstance(manifests, dict) else None
    if was is not None and digest_json(was) != due:
        return [
            Problem(
                f"entry {entry.index} ({entry.stage}): manifest of {name}",
                digest_json(was),
                due,
                "the entry contradicts itself",
            )
        ]
    if found == due:
        return []
    if not isinstance(was, dict) or not path.is_dir():
        return [Problem(name, found, f"{due}, {written}", _REDO)]
    now = manifest(path)
    return [
        Problem(f"{name}/{file}", now.get(file, "nothing"), f"{was.get(file, 'nothing')}, {written}", _REDO)
        for file in sorted({*now, *was})
        if now.get(file) != was.get(file)
    ]


def _code_notes(entries: Sequence[Entry]) -> list[str]:
    notes = []
    if dirty := [f"{entry.stage} (entry {entry.index})" for entry in entries if entry.dirty]:
        notes.append(f"made from a checkout with uncommitted changes: {', '.join(dirty)}")
    versions = sorted({f"{entry.limbeck} {entry.commit or ''}".strip() for entry in entries})
    if len(versions) > 1:
        notes.append(f"made by {len(versions)} versions of limbeck: {', '.join(versions)}")
    for entry, after in pairwise(entries):
        if after.finished < entry.finished or after.finished < after.started:
            notes.append(f"the clock went backwards before entry {after.index} ({after.stage}) was written")
    return notes


def _progress_notes(entries: Sequence[Entry]) -> list[str]:
    from limbeck.ledger.signing.checkpoints import SIGNED
    from limbeck.ledger.signing.notes import INPUT, notes_digest
    from limbeck.run import STAGES

    done = {entry.stage for entry in entries}
    notes = []
    if missing := [stage.name for stage in STAGES if stage.name not in done]:
        notes.append(f"stages not done yet: {', '.join(missing)}")
    if unknown := sorted(done - {stage.name for stage in STAGES} - {*SIGNED}):
        notes.append(f"stages unknown to this version, their files checked all the same: {', '.join(unknown)}")
    shown = next((entry.inputs.get(INPUT) for entry in reversed(entries) if entry.stage == "report"), None)
    if "report" in done and shown != notes_digest(entries):
        notes.append("there are signed notes that report.html does not show; `limbeck report` makes it anew")
    if outside := sorted({name for entry in entries for name in entry.inputs} - _all_inside(entries) - {INPUT}):
        notes.append(f"lies outside RUN, digest recorded but not compared: {', '.join(outside)}")
    return notes


def _all_inside(entries: Sequence[Entry]) -> set[str]:
    return {name for entry in entries for name in inside_run(entry.inputs)}


def _strangers(root: Path, outputs: Mapping[str, object]) -> list[str]:
    """Files that no entry speaks of. Checkpoints and what a database or a lock leaves beside it are no
    evidence.
    """
    strange = []
    for folder, folders, files in os.walk(root):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        if here == PurePosixPath("."):
            folders[:] = [f for f in folders if f != "checkpoints"]
        for file in files:
            name = here / file
            recorded = str(name) in outputs or any(
                str(parent) in outputs and name != parent / CARD for parent in name.parents
            )
            if not recorded and str(name) not in _OURS and not _beside(str(name)):
                strange.append(str(name))
    return [f"in RUN but in no entry: {name}" for name in sorted(strange)]


def _beside(name: str) -> bool:
    """The lock, and the files SQLite keeps beside a database that is in use."""
    return name == ".lock" or any(
        name == f"{db}{end}" for db in ("ledger.db", "journal.db") for end in ("-journal", "-wal", "-shm", "-lock")
    )
