"""Disclosures out of a ledger of a million examples, of which five are real and the rest are only hashes."""

from __future__ import annotations

import os
import time

import pytest
import runs

from limbeck.ledger.proofs.disclosure import NAMES, check_disclosure, disclose
from limbeck.ledger.proofs.documents import document_bytes
from limbeck.ledger.sealing import leaf_hashes, seal
from limbeck.ledger.signing.checkpoints import sign_checkpoint
from limbeck.ledger.store import Ledger
from limbeck.rundir import RunDir

MILLION = 1_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    run = runs.make_run(tmp_path_factory.mktemp("large") / "run", until="render")
    facts = seal(runs.RECIPE, RunDir(run))
    noise = os.urandom(32 * MILLION)
    leaves = leaf_hashes(run, facts)
    leaves += [noise[i : i + 32] for i in range(32 * len(leaves), 32 * MILLION, 32)]
    told = facts["leaves"]
    assert isinstance(told, dict)
    told["count"] = MILLION
    with Ledger(run / "ledger.db") as ledger:
        last = ledger.entries()[-1]
        ledger.append(
            stage="seal",
            started=last.started,
            inputs={},
            outputs={},
            recipe=last.recipe,
            facts=facts,
            leaves=leaves,
        )
        sign_checkpoint(ledger, "training-intended", runs.RECIPE)
    return run


def test_a_disclosure_stays_under_two_kilobytes(large):
    for field in NAMES:
        proof = disclose(large, 3, field)
        assert check_disclosure(proof).examples.count == MILLION
        assert len(document_bytes(proof)) < 2000, field


def test_a_disclosure_reads_a_few_rows_and_not_a_million(large):
    """Recomputing the tree takes a second; the fastest of five disclosures must not."""
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        disclose(large, 4, "teacher")
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.1
