"""The whole system on one page.

    Recipe --prompts, collect--> Completion --curate--> Verdict --render--> Example --seal--> Leaf
           Leaf --gate--> RUN/gate, without which nothing is trained
           Example --annotate--> Signal --student, train--> Checkpoint --evaluate--> Score --card, report--> Report

Every arrow is a stage: it reads files of the RUN directory, writes its own, and leaves an Entry in the ledger. A stage
whose last entry has the same recipe and inputs, and whose outputs are still what that entry says, is done and is not
run again. That is all there is to resuming: run the same command again.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck import ranks
from limbeck.ledger.canonical import digest_path, manifest

if TYPE_CHECKING:
    from limbeck.ledger.signing.statements import Kind
    from limbeck.ledger.store import Ledger
    from limbeck.progress import Progress
    from limbeck.recipe import Recipe
    from limbeck.records import Digest, Score
    from limbeck.rundir import RunDir


class Stage(NamedTuple):
    """One arrow: `work(recipe, run) -> facts` reads and writes the named files of RUN."""

    name: str
    work: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: tuple[str, ...] = ()
    """What only this stage needs while it works; removed when the ledger has its entry."""
    waivers: bool = False
    """Whether a waiver of the recipe that was signed anew makes it due again."""
    shows_notes: bool = False
    """Whether a new signed note makes it due again."""
    together: bool = False
    """Whether all processes take part, where several were started (`limbeck.ranks`)."""
    signs: Kind | None = None
    """The moment that is signed once this stage and those before it are done."""


STAGES = (
    Stage("prompts", "limbeck.collect.prompts:gather", (), ("prompts.parquet",)),
    Stage(
        "collect",
        "limbeck.collect.collect:collect",
        ("prompts.parquet",),
        ("completions.parquet",),
        signs="collection-closed",
    ),
    Stage("curate", "limbeck.curate.curate:curate", ("completions.parquet",), ("verdicts.parquet",)),
    Stage("render", "limbeck.render.render:render", ("completions.parquet", "verdicts.parquet"), ("examples",)),
    Stage(
        "seal",
        "limbeck.ledger.sealing:seal",
        ("prompts.parquet", "completions.parquet", "verdicts.parquet", "examples"),
        ("leaves.parquet",),
    ),
    Stage("gate", "limbeck.terms.stage:gate", ("prompts.parquet", "leaves.parquet"), ("gate",), waivers=True),
    Stage("annotate", "limbeck.signal.annotate:annotate", ("examples", "completions.parquet"), ("signals",)),
    Stage("student", "limbeck.student.begin:begin", ("examples",), ("beginning",), signs="training-intended"),
    Stage(
        "train",
        "limbeck.train.stage:train",
        ("beginning", "examples", "signals", "leaves.parquet", "gate"),
        ("student", "training.json", "rollouts.parquet"),
        scratch=("checkpoints",),
        together=True,
        signs="training-done",
    ),
    Stage(
        "evaluate",
        "limbeck.evaluate.evaluate:evaluate",
        ("beginning", "student", "examples", "completions.parquet"),
        ("scores.json", "answers.json"),
    ),
    Stage(
        "card",
        "limbeck.export.card:card",
        (
            "prompts.parquet",
            "completions.parquet",
            "verdicts.parquet",
            "examples",
            "gate",
            "student",
            "training.json",
            "scores.json",
        ),
        ("student/README.md",),
    ),
    Stage(
        "report",
        "limbeck.report.report:report",
        (
            "prompts.parquet",
            "completions.parquet",
            "verdicts.parquet",
            "examples",
            "gate",
            "training.json",
            "scores.json",
            "answers.json",
        ),
        ("report.html",),
        shows_notes=True,
    ),
)


class Run(NamedTuple):
    """What a run hands back."""

    root: Path
    student: Path
    scores: tuple[Score, ...]
    report: Path


def run(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    until: str = STAGES[-1].name,
    progress: Progress | None = None,
    offline: bool = False,
) -> Run:
    """Distil as the recipe says into the directory `out`, up to and with the stage `until`. Run it again to resume.
    Offline, nothing is sent to a teacher's endpoint: what the journal lacks is an error.

    Raises:
        InputError: something in the recipe, the prompts, the models or `out` is wrong; nothing was spent.
        RefusedError: the terms gate refuses the recipe's use, before anything is bought or of the answers there are;
            or a cap left prompts without an answer. What was answered is kept.
        EndpointError: an endpoint left prompts without an answer; what was answered is kept.
        DiskFullError: no room, or so little that training could not end; what was finished is kept.
    """
    from limbeck.collect.glance import collected
    from limbeck.collect.journal import journal_path
    from limbeck.errors import InputError, Problem
    from limbeck.ledger.signing.checkpoints import sign_if_due
    from limbeck.ledger.store import Ledger
    from limbeck.preflight import preflight
    from limbeck.progress import Progress
    from limbeck.recipe_file import load_recipe
    from limbeck.rundir import RunDir, open_run, refuse_unfit

    recipe = load_recipe(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    if until not in (names := [stage.name for stage in STAGES]):
        raise InputError("no such stage", [Problem("until", until, f"one of {', '.join(names)}")])
    if not ranks.first():
        ranks.follow(partial(_together, recipe, out))
        return open_result(out)
    refuse_unfit(out, recipe, collected)
    progress = progress or Progress.silent()
    progress.begin(f"{recipe.name}: looking at prompts, terms and models; models that are not here are fetched first")
    sources = preflight(
        recipe,
        answered=offline or (Path(out) / "completions.parquet").exists(),
        unasked=not offline and not journal_path(recipe, RunDir(out)).exists(),
    )
    if names.index(until) >= names.index("student") and not (Path(out) / "beginning").exists():
        from limbeck.train.room import refuse_without_room

        refuse_without_room(recipe, out, progress)
    with open_run(out, recipe, progress, collected) as held, Ledger(held / "ledger.db") as ledger:
        held.offline = offline
        for place, stage in enumerate(STAGES):
            _advance(stage, recipe, held, ledger, sources)
            if stage.signs:
                sign_if_due(ledger, stage.signs, recipe, names[: place + 1])
            if stage.name == until:
                break
    ranks.dismiss()
    return open_result(out)


def _advance(stage: Stage, recipe: Recipe, run: RunDir, ledger: Ledger, sources: dict[str, Digest]) -> None:
    """Do one stage, unless the ledger says that it is done and its outputs still are what they were."""
    from limbeck.ledger.sealing import leaf_hashes
    from limbeck.ledger.signing.notes import INPUT, notes_digest

    outside = {name: digest for name, digest in sources.items() if stage.waivers or not name.startswith("waiver:")}
    inputs = outside | {name: digest_path(run / name) for name in stage.reads}
    if stage.shows_notes and (told := notes_digest(ledger.entries())):
        inputs[INPUT] = told
    last = ledger.last(stage.name)
    if last and last.recipe == recipe.digest and last.inputs == inputs and _intact(run, last.outputs):
        _clear(stage, run)
        return
    started = datetime.now(UTC)
    if stage.together:
        ranks.call()
    facts = pkgutil.resolve_name(stage.work)(recipe, run)
    outputs = {name: digest_path(run / name) for name in stage.writes}
    facts |= {"manifests": {name: manifest(run / name) for name in stage.writes if (run / name).is_dir()}}
    leaves = leaf_hashes(run.root, facts)
    ledger.append(
        stage=stage.name,
        started=started,
        inputs=inputs,
        outputs=outputs,
        recipe=recipe.digest,
        facts=facts,
        leaves=leaves,
    )
    _clear(stage, run)


def _together(recipe: Recipe, out: str | os.PathLike[str]) -> None:
    """The part of a process that is not the first, in the one stage that all take part in."""
    from limbeck.rundir import RunDir

    (stage,) = (stage for stage in STAGES if stage.together)
    pkgutil.resolve_name(stage.work)(recipe, RunDir(out))


def _clear(stage: Stage, run: RunDir) -> None:
    """Remove what only the stage's work needed; a kill may have come between the entry and this."""
    for name in stage.scratch:
        shutil.rmtree(run / name, ignore_errors=True)


def _intact(run: RunDir, outputs: dict[str, Digest]) -> bool:
    return all((run / name).exists() and digest_path(run / name) == was for name, was in outputs.items())


def open_result(out: str | os.PathLike[str]) -> Run:
    """What a run has come to so far."""
    from limbeck.evaluate.scores import read_scores

    root = Path(out)
    scores = read_scores(root / "scores.json") if (root / "scores.json").exists() else ()
    return Run(root, root / "student", tuple(scores), root / "report.html")
