"""Makes the fixture of a released version. Run with the code of the commit that the README beside this names:

    LIMBECK_HOME=$(mktemp -d) PYTHONPATH=OLD:OLD/tests python make.py NAME FOLDER

FOLDER gets NAME.tar.xz. Only what all those commits have is used; signing keys are made for this and thrown away.
"""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def run(base: Path) -> None:
    """A RUN directory, and what can be handed to strangers of it."""
    import runs
    from command import call

    made = runs.make_run(base / "run")
    if call("ledger", "note", "--help").exit_code == 0:
        call("ledger", "note", made, "Rows 1 to 5 read.", "--by", "A. Reader")
    if call("ledger", "disclose", "--help").exit_code == 0:
        _documents(base, made)


def _documents(base: Path, made: Path, *fields: str) -> None:
    """`fields` of row 3 are disclosed too."""
    from command import call

    from limbeck.ledger.canonical import canonical

    kept = canonical(_envelope(made))
    documents = base / "documents"
    documents.mkdir()
    (documents / "checkpoint").write_bytes(kept)
    for words in (
        ("disclose", "--row", "1", "--field", "terms"),
        ("share",),
        ("spot-check", "--seed", "a beacon", "--draws", "20"),
        ("consistency", "--checkpoint", str(documents / "checkpoint")),
        *(("disclose", "--row", "3", "--field", field) for field in fields),
    ):
        out = documents / (words[-1] if words[-1] in fields else words[0])
        result = call("ledger", words[0], str(made), *words[1:], "--out", str(out))
        if result.exit_code:
            raise SystemExit(result.output)


def written(base: Path) -> None:
    """The same, where a model wrote prompts from seeds and from earlier prompts; and what the parents of a row are."""
    import runs
    from command import call

    made = runs.make_run(base / "run", change=runs.from_seeds, gated=True)
    call("ledger", "note", made, "Rows 1 to 5 read.", "--by", "A. Reader")
    _documents(base, made, "parents")


def named(base: Path) -> None:
    """The same with answers of endpoints, alone and in batches, that their providers named."""
    import asked

    _documents(base, asked.make_run(base / "run"), "response", "weights")


def signalled(kind: str) -> Callable[[Path], None]:
    """A RUN directory whose signals are of a kind that is not stored: read off the text, or off a live teacher."""

    def made(base: Path) -> None:
        import runs

        from limbeck.recipe import Recipe
        from limbeck.render.examples import read_examples
        from limbeck.signal.manifest import SignalKey
        from limbeck.signal.store import write_manifest_only

        loss = {"text": "cross_entropy", "hidden": "forward_kl"}[kind]
        told = runs.RECIPE.model_dump(mode="json") | {"signal": {"kind": kind}}
        recipe = Recipe.model_validate(told | {"train": told["train"] | {"loss": loss}})

        def annotated(root: Path, _: object) -> None:
            learned = read_examples(root / "examples").train
            key = SignalKey(
                kind=kind, tokenizer=runs.OUTSIDE, templates={runs.TEACHER: runs.OUTSIDE},
                teachers={runs.TEACHER: runs.OUTSIDE}, examples=SignalKey.digest_of(learned), vocab_size=99,
                seed=recipe.seed, precision=None if kind == "text" else "float32",
            )  # fmt: skip
            write_manifest_only(root / "signals", key, learned)

        runs._WRITERS["annotate"] = annotated
        runs.make_run(base / "run", recipe=recipe)

    return made


def stamped(base: Path) -> None:
    """A RUN directory whose last checkpoint has an RFC 3161 time-stamp, and the authority's certificate."""
    import runs
    from stamping import Authority

    from limbeck.ledger.signing.timestamps import attach, read_authorities
    from limbeck.ledger.store import Ledger

    made, authority = runs.make_run(base / "run"), Authority(base / "authority", days=36500)
    response = authority.stamp(runs.signed(made)[-1].envelope.data)
    with Ledger(made / "ledger.db") as ledger:
        attach(ledger, response, read_authorities(authority.root))
    shutil.copy(authority.root, base / "authority.pem")
    shutil.rmtree(base / "authority")


def endpoints(base: Path) -> None:
    """A RUN directory whose answers came from endpoints, alone and in batches."""
    import asked

    asked.make_run(base / "run")


def waived(base: Path) -> None:
    """A RUN directory that was trained under a waiver."""
    from datetime import date

    import runs

    from limbeck.terms.waivers import make_waiver

    terms = "meta/llama-3/2024-04-18"
    made = make_waiver(terms, runs.RECIPE.use, by="A. Counsel", reason="a test", expires=date(2999, 12, 30))
    (base / "waiver.json").write_bytes(made.envelope.data)
    teacher = runs.RECIPE.teachers[0].model_copy(update={"terms": terms})
    update = {"teacher": teacher, "waivers": (str(base / "waiver.json"),)}
    runs.make_run(base / "run", recipe=runs.RECIPE.model_copy(update=update))


def journal(base: Path) -> None:
    """A journal with a row or more in every table: `test_formats.py` says what it holds."""
    from limbeck.collect.journal import Ended, Journal, Sent
    from limbeck.collect.teachers import Answer, Request

    requests = [Request.of({"number": number}) for number in range(4)]
    answers = [Answer(request, b"answer %d " % number * 20) for number, request in enumerate(requests[:3])]
    account, path = "sha256:" + "a" * 64, base / "journal.db"
    with Journal(path) as made:
        made.put_group([*answers, Answer(requests[0], b"another")])
        made.put_traffic([Sent(n + 1, request.key, account, 100) for n, request in enumerate(requests)], [], [])
        made.put_traffic([], [], [Ended(1, "answered", 7), Ended(2, "cut", 100)])
    try:
        from limbeck.collect.endpoints.batch_log import BatchLog, Planned
    except ImportError:  # version 2
        return
    with BatchLog(path) as log:
        with log.intending("batch-token", "a model", account) as intent:
            intent.add(Planned(requests[3], 50))
        log.asking(1)
        log.named(1, "batch-name")


def signals(base: Path) -> None:
    """A store of signals, and what went in."""
    import test_store

    sizes, tau, width = [[3, 5], [4]], test_store.KEY.tau, test_store.KEY.vocab_size
    from limbeck.signal.encoding import decode_sampled

    inside = test_store.write(base / "signals", sizes)
    decoded = {name: decode_sampled(one, tau=tau, vocab_size=width) for name, one in inside.items()}
    names = ("n_head_N", "n_tail_N", "ids_E", "head_probs_H", "entropy_N")
    _expect(base, {one: {name: getattr(said, name).tolist() for name in names} for one, said in decoded.items()})


def top_k(base: Path) -> None:
    """The same of a teacher's likeliest tokens."""
    import test_top_k
    import torch

    from limbeck.signal.store import Planned, SignalWriter
    from limbeck.signal.top_k import TopKCodec

    codec, plan = TopKCodec.of(test_top_k.TOP), [Planned("example-0", 3), Planned("example-1", 5)]
    inside = [test_top_k.random_signal(one.positions, seed, codec) for seed, one in enumerate(plan)]
    writer = SignalWriter(base / "signals", test_top_k.TOP, [plan])
    writer.write(0, [codec.encode([one], torch.Generator()) for one in inside])
    writer.finish()
    names = ("ids_NK", "log_probs_NK", "tail_mass_N")
    said = {p.id: {n: getattr(one, n).tolist() for n in names} for p, one in zip(plan, inside, strict=True)}
    _expect(base, said)


def _expect(base: Path, said: dict[str, dict[str, list[float]]]) -> None:
    (base / "expected.json").write_text(json.dumps(said), encoding="utf-8")


def _envelope(made: Path) -> object:
    with closing(sqlite3.connect(made / "ledger.db")) as db:
        bodies = [json.loads(body) for (body,) in db.execute("SELECT body FROM entries ORDER BY idx")]
    return next(body["facts"]["envelope"] for body in bodies if body["stage"] == "checkpoint")


def pack(base: Path, path: Path) -> None:
    """The files of `base`, in order, without owners or times."""
    with tarfile.open(path, "w:xz", preset=9) as tar:
        for file in sorted(base.rglob("*")):
            if file.is_file():
                info = tarfile.TarInfo(file.relative_to(base).as_posix())
                info.size = file.stat().st_size
                tar.addfile(info, io.BytesIO(file.read_bytes()))


KINDS = {
    "ledger-2-text": signalled("text"),
    "ledger-2-hidden": signalled("hidden"),
    "ledger-2-stamped": stamped,
    "ledger-2-endpoints": endpoints,
    "ledger-2-written": written,
    "ledger-2-named": named,
    "ledger": run,
    "waived": waived,
    "journal": journal,
    "signals": signals,
    "top_k": top_k,
}

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        (KINDS.get(name) or KINDS[name.split("-")[0]])(Path(scratch))
        pack(Path(scratch), Path(folder) / f"{name}.tar.xz")
