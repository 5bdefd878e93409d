"""What no standard has a field for, as names and texts under `limbeck:`. The same names stand in every format."""

from __future__ import annotations

from pathlib import PurePath

from limbeck.export.facts import Facts, TeacherTold

PREFIX = "limbeck:"


def ledger_properties(facts: Facts) -> list[tuple[str, str]]:
    """The ledger: root, size, head, signers, and what that is worth."""
    told = facts.ledger
    return [
        (PREFIX + "ledger:root", f"sha256:{told.root}"),
        (PREFIX + "ledger:size", str(told.size)),
        (PREFIX + "ledger:head", told.head),
        (PREFIX + "ledger:entries", str(told.entries)),
        (PREFIX + "ledger:trust", told.trust),
        *((PREFIX + "ledger:signer", f"ed25519:{key}") for key in told.keys),
        *([(PREFIX + "ledger:signed", told.signed)] if told.signed else []),
    ]


def use_properties(facts: Facts) -> list[tuple[str, str]]:
    """What the student is declared to be for, and what the gate said of all that it learnt from."""
    use, ruled = facts.evidence.recipe.use, facts.evidence.rulings
    return [
        (PREFIX + "use:distribution", use.distribution),
        (PREFIX + "use:purpose", use.purpose),
        (PREFIX + "use:commercial", "true" if use.commercial else "false"),
        (PREFIX + "gate:verdict", ruled.verdict.value if ruled else "not asked"),
        *((PREFIX + "gate:waiver", waiver.words) for waiver in (ruled.waivers if ruled else ())),
        *((PREFIX + "gate:obligation", f"{o.kind}: {o.value}") for o in (ruled.obligations if ruled else ())),
    ]


def teacher_properties(teacher: TeacherTold) -> list[tuple[str, str]]:
    """A teacher: share, how it was reached, its terms and what they come to for the declared use."""
    seen, ruling = teacher.seen, teacher.ruling
    return [
        (PREFIX + "role", "teacher"),
        (PREFIX + "share", f"{teacher.share:.6f}"),
        (PREFIX + "supervised-tokens", str(teacher.tokens)),
        (PREFIX + "training-examples", str(teacher.rows)),
        (PREFIX + "provider", seen.provider),
        (PREFIX + "route", seen.route),
        (PREFIX + "model-that-answered", seen.model),
        *([(PREFIX + "weights", seen.weights)] if seen.weights else []),
        *((PREFIX + "fingerprint", fingerprint) for fingerprint in seen.fingerprints),
        *([(PREFIX + "from-file", PurePath(seen.file).name)] if seen.file else []),
        *(
            [(PREFIX + "answers-in-batches", str(seen.batched)), (PREFIX + "batches", str(seen.batches))]
            if seen.batched
            else []
        ),
        *(
            [(PREFIX + "generated:first", str(teacher.first)), (PREFIX + "generated:last", str(teacher.last))]
            if teacher.first
            else []
        ),
        (PREFIX + "terms", seen.terms),
        (PREFIX + "terms:verdict", ruling.verdict.value),
        (PREFIX + "terms:reason", ruling.reason),
        *([(PREFIX + "terms:clause", ruling.clause)] if ruling.clause else []),
        *([(PREFIX + "terms:read", teacher.terms.read)] if teacher.terms else []),
        *((PREFIX + "obligation", f"{o.kind}: {o.value}") for o in ruling.obligations),
    ]
