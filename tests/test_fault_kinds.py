"""The corpus of faults (`tests/faults/`) has every kind that evidence is known to be attacked by. That both verifiers
refuse each one, and name it, is asked in test_second_verifier.py.
"""

from __future__ import annotations

import pytest
from faults import entries, files, gate, handed, names, parents, proofs, rows, signatures

ALL = (*files.FAULTS, *rows.FAULTS, *entries.FAULTS, *signatures.FAULTS, *gate.FAULTS, *parents.FAULTS, *names.FAULTS)
RUNS = {f.name: f for f in ALL}
PROOFS = {f"{f.form}: {f.name}": f for f in (*proofs.FAULTS, *handed.FAULTS)}

KINDS = {
    "bit flipped in each kind of file": (
        *(f"a bit flipped in {name}" for name in (*files.FILES, *files.INNER, "student/README.md")),
        *(
            "a character changed in the recipe",
            "a bit flipped in an example's leaf",
            "a bit flipped in an entry's leaf",
        ),
        *("a bit flipped in a signature", "an answer in the journal replaced"),
        *(f"{form}: a bit flipped in the signature" for form in ("disclosure", "share", "spot-check", "consistency")),
    ),
    "row dropped": (
        *(f"a row of {name} dropped{how}" for name in rows.TABLES for how in ("", ", all written anew")),
        *("an entry dropped", "an entry dropped, the rest written anew", "an example's leaf dropped"),
        *("share: a row dropped", "spot-check: a row left out"),
    ),
    "row reordered": (
        *(f"a row of {name} reordered{how}" for name in rows.TABLES for how in ("", ", all written anew")),
        *("two examples' leaves swapped", "share: two rows swapped", "spot-check: rows in another order"),
    ),
    "row doubled": (
        *(f"a row of {name} doubled{how}" for name in rows.TABLES for how in ("", ", all written anew")),
        *("an example's leaf doubled", "spot-check: a row twice"),
    ),
    "salts swapped": ("share: salts of two rows swapped", "spot-check: salts of two fields swapped"),
    "tree truncated": ("the tree cut off", "cut off before a kept checkpoint", "a row of leaves missing"),
    "stale checkpoint": ("a stale checkpoint", "consistency: old and new exchanged"),
    "proof from another log": (
        "a checkpoint of another log",
        *(f"{form}: the checkpoint of another log" for form in ("disclosure", "share", "spot-check")),
        *(f"{form}: the path of another log" for form in ("disclosure", "consistency")),
        *("spot-check: a spot-check of another log", "consistency: an old checkpoint of another log"),
        "consistency: a new checkpoint of another log",
    ),
    "leaf taken for node": ("a node taken for a leaf", "disclosure: a leaf taken for a node"),
    "Unicode forms": (
        *("a letter as an escape", "half of a surrogate pair", "disclosure: another form of the same letters"),
        "disclosure: UTF-16",
    ),
    "number forms": (
        *("a number with a point", "a number with an exponent", "minus zero", "NaN", "an integer of 2^64"),
        *("disclosure: a row with a point", "disclosure: row true"),
    ),
    "wrong key": (
        *("signed by another key", "another key's name", "a waiver by another key", "a token of another key"),
        *(f"consistency: {one} checkpoint by another key where one is demanded" for one in ("an old", "a new")),
        *(
            f"{form}: another key where one is demanded"
            for form in ("disclosure", "share", "spot-check", "consistency")
        ),
    ),
    "expired waiver": ("an expired waiver", "training after the waiver had expired"),
    "re-signed after edit without consistency": (
        "signed anew after an edit, against a kept head",
        "signed anew after an edit, against a kept checkpoint",
    ),
    "parents changed": (
        *(f"parents of a row of {name}: {how}" for name in ("leaves", "prompts") for how in parents.EDITS),
        *(f"parents: {how}" for how in ("dropped", "swapped", "altered", "of another kind")),
    ),
    "provider's names changed": (
        *(f"{name} of a completion altered{how}" for name in names.FIELDS for how in ("", ", all signed anew")),
        *(f"{name} of a leaf {how}" for name in names.FIELDS for how in names.EDITS),
        *(f"{form}: another id of the provider's" for form in ("response", "spot-check")),
        "spot-check: another fingerprint",
    ),
    "version of leaves changed": (
        *("leaves of an unknown version", "leaves said to be older", "older leaves after newer ones"),
        *(f"{form}: leaves said to be older" for form in ("disclosure", "parents", "response", "share", "spot-check")),
    ),
    "edited weights": ("weights replaced", "weights renamed", "a bit flipped in student/deep/weights.bin"),
    "edited recipe": ("a character changed in the recipe", "a number changed in the recipe"),
}
"""Each kind, and the faults that are of it."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_faults_and_the_second_verifier_sees_it_too(kind):
    missing = [name for name in KINDS[kind] if name not in RUNS and name not in PROOFS]
    assert not missing
    assert [name for name in KINDS[kind] if name in PROOFS or not RUNS[name].unseen]


def test_the_corpus_is_no_smaller_than_promised_and_each_fault_has_a_name_and_a_place():
    names = [f.name for f in ALL]
    assert len(names) == len(RUNS)
    assert len([*proofs.FAULTS, *handed.FAULTS]) == len(PROOFS)
    assert len(names) >= 60
    assert all((fault.first or fault.place) if fault.unseen else fault.place for fault in RUNS.values())
    assert all(fault.place for fault in PROOFS.values())
