"""A RUN directory: where everything of one run lies, who may write there, and how files come to be whole or not at all.

RUN/recipe.yaml            the recipe as resolved
RUN/journal.db             raw answers, before anyone parsed them
RUN/prompts.parquet        Prompt
RUN/completions.parquet    Completion
RUN/verdicts.parquet       Verdict
RUN/examples/              Example
RUN/leaves.parquet         what the ledger commits to, an example a row
RUN/gate/                  the terms gate's rulings and its token
RUN/signals/               Signal
RUN/checkpoints/           where training resumes from; not evidence
RUN/student/               the student, in Hugging Face layout
RUN/training.json          the loss curve
RUN/rollouts.parquet       Rollout
RUN/scores.json            Score
RUN/answers.json           answers side by side
RUN/report.html            Report
RUN/ledger.db              Entry
"""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from limbeck.errors import LimbeckError, Problem, RunDirError
from limbeck.progress import Progress

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

_HALF = ".half"
"""Suffix of a file or directory that is still being written."""

_BEFORE_COLLECTED = (".", "journal.db", "ledger.db", "recipe.yaml", "prompts.parquet")
"""How the names begin that can lie in RUN before the stage `collect` has an entry."""

Collected = Callable[["RunDir", "Recipe"], str]
"""What was collected in RUN by the recipe that lies there, or may be under way, in words; empty where nothing was."""


_WHOSE = ("base_url", "teacher.model")
"""How keys of the recipe end without which an answer is another's."""
_ASKED = (
    *("seed", "collect.max_tokens", "collect.temperature", "collect.top_p", "collect.tools", "collect.json_schema"),
    *("collect.logprobs", "teacher.api", "teacher.extra", "teacher.kind", "teacher.limit_key", "teacher.omit"),
    *("teacher.path", "teacher.precision"),
)
"""Keys, with all below them, that are part of each request: another value is another request."""
_NO_KEY = object()
"""Stands where one of two mappings lacks a key of the other."""
_SHOWN = 4
"""Differences that are shown of a recipe that gave way."""


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the block ends well, what is there (a file or a directory) is synced
    and takes the name `path`, replacing what had it. When the block raises, nothing is left and `path` is untouched.
    """
    final = Path(path)
    half = final.with_name(f".{final.name}{_HALF}")
    _remove(half)
    half.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield half
        _sync(half)
        if final.is_dir():
            _remove(final)
        os.replace(half, final)
        _sync_one(final.parent)
    except BaseException:
        _remove(half)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in path.rglob("*"):
            _sync_one(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunDir:
    """One RUN directory, held by this process. Make it with `open_run` (to write) or `RunDir(root)` (to read)."""

    def __init__(self, root: str | os.PathLike[str], progress: Progress | None = None):
        self.root = Path(root)
        self.progress = progress or Progress.silent()
        self.offline = False
        """Whether nothing may be sent to an endpoint."""

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def recipe(self) -> Recipe:
        """The recipe this run was made by. Raises `RunDirError` where there is none."""
        from limbeck.recipe import Recipe

        path = self / "recipe.yaml"
        if not path.is_file():
            found = "no recipe.yaml" if self.root.is_dir() else "no such directory"
            raise RunDirError(
                "not a RUN directory",
                [
                    Problem(
                        str(self.root),
                        found,
                        "a directory that `limbeck run ... --out` made",
                        "check the path",
                    ),
                ],
            )
        data = self._written()
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            from limbeck.recipe_problems import dotted, problems

            if not isinstance(data, dict):
                raise _unreadable(path, f"{type(data).__name__}, not a mapping of keys to values") from error
            found = problems(error.errors(include_url=False), data, lambda keys: f"{path}: {dotted(keys)}".rstrip(": "))
            remedy = f"use the limbeck that made this run{self._made_by()}, or put back the file as the run wrote it"
            told = [problem._replace(remedy=remedy) for problem in found]
            raise RunDirError("the recipe of this run is none that this version of limbeck knows", told) from error

    def _written(self) -> object:
        """The value of recipe.yaml, as it lies there. Raises `RunDirError` where it cannot be read."""
        path = self / "recipe.yaml"
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise _unreadable(path, " ".join(str(error).split())[:300]) from error

    def _made_by(self) -> str:
        """Which versions of limbeck the ledger names, in brackets; empty where it names none."""
        from limbeck.ledger.store import Ledger, is_empty

        try:
            if is_empty(self / "ledger.db"):
                return ""
            with Ledger(self / "ledger.db", read_only=True) as ledger:
                named = dict.fromkeys(
                    f"{entry.limbeck}{f' at commit {entry.commit[:12]}' if entry.commit else ''}"
                    for entry in ledger.entries()
                )
        except (LimbeckError, sqlite3.Error):  # what the ledger lacks is said by who reads it for its own sake
            return ""
        return f" ({', '.join(named)})" if named else ""


def _unreadable(path: Path, found: str) -> RunDirError:
    problem = Problem(str(path), found, "the recipe as the run resolved it", "put back the file as it was")
    return RunDirError("the recipe of this run cannot be read", [problem])


@contextmanager
def open_run(
    root: str | os.PathLike[str], recipe: Recipe, progress: Progress | None = None, collected: Collected | None = None
) -> Iterator[RunDir]:
    """Hold a RUN directory for writing: make it if it is not there, refuse it if another recipe made it or another
    process holds it. Where the ledger has no entry yet, or `collected` knows of nothing and no entry is of more than
    the prompts, nothing rests on the recipe there: this one takes its place, with a ledger that begins anew, and the
    journal stays. The hold ends with the process, however it ends.

    Raises:
        RunDirError: all keys in which the recipes differ, with both values; or who holds the directory.
    """
    run = RunDir(root, progress)
    _refuse_foreign(run.root)
    run.root.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+", encoding="utf-8") as lock:
        _hold(lock, run.root)
        if _gives_way(run, recipe, collected):
            # The ledger first: whatever a kill leaves, no entry names another recipe than the one that lies there.
            for name in ("ledger.db-journal", "ledger.db"):
                (run / name).unlink(missing_ok=True)
            text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            with atomic(run / "recipe.yaml") as half:
                half.write_text(text, encoding="utf-8")
        yield run


def refuse_unfit(root: str | os.PathLike[str], recipe: Recipe, collected: Collected | None = None) -> None:
    """Refuse what `open_run` would refuse, but for a process that holds it, before anything is fetched for the run.

    Raises:
        RunDirError: as `open_run`.
    """
    run = RunDir(root)
    _refuse_foreign(run.root)
    if run.root.is_dir():
        _gives_way(run, recipe, collected)


def _gives_way(run: RunDir, recipe: Recipe, collected: Collected | None) -> bool:
    """Whether this recipe takes the place of what lies in RUN; False where it made that. Raises `RunDirError` where
    another one did, and something rests on it.
    """
    if not (run / "recipe.yaml").exists():
        return True
    stages = _stages(run)
    if stages == set():
        return True
    there, here = run.recipe(), recipe.model_dump(mode="json")
    # As it lies there: every entry names the digest of that, which a key that is new in this version changes.
    if not (differ := differences(run._written(), here)):
        return False
    told = collected(run, there) if collected is not None else ""
    if stages != {"prompts"} or collected is None or told:
        same = {key for key, _, _ in differ} - {key for key, _, _ in differences(there.model_dump(mode="json"), here)}
        raise _other_recipe(run, differ, told, same)
    shown = "; ".join(f"{key} was {was}, is {now}" for key, was, now in differ[:_SHOWN])
    more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    said = f"{run.root}: nothing was collected by the recipe that lay there; this one takes its place: {shown}{more}"
    run.progress.begin(said)
    run.progress.say(said)
    return True


def _stages(run: RunDir) -> set[str] | None:
    """Stages that have left an entry; None where a later one than the first left files: a RUN that lost its ledger was
    begun.
    """
    from limbeck.ledger.store import Ledger, is_empty

    if not all(path.name.startswith(_BEFORE_COLLECTED) for path in run.root.iterdir()):
        return None
    if is_empty(run / "ledger.db"):
        return set()
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        return {entry.stage for entry in ledger.entries()}


def _refuse_foreign(root: Path) -> None:
    """A directory with things in it that no run put there is not ours to write into."""
    if root.exists() and not root.is_dir():
        raise RunDirError(
            "not a directory", [Problem(str(root), "a file", "a directory or nothing", "use another --out")]
        )
    if root.is_dir() and not (root / "recipe.yaml").exists():
        strange = sorted(p.name for p in root.iterdir() if not p.name.startswith((".", "journal.db")))
        if strange:
            raise RunDirError(
                "the directory is not empty and is not a RUN directory",
                [
                    Problem(
                        str(root),
                        ", ".join(strange[:8]),
                        "an empty directory, or one with a recipe.yaml",
                        "use another --out",
                    ),
                ],
            )


def _hold(lock, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        found = f"held by process {lock.read().strip() or 'unknown'}, which works on it"
        remedy = (
            "wait until it has ended, or stop it; then run the same command again; `limbeck show` says how far it is"
        )
        problem = Problem(str(root), found, "no other process", remedy)
        raise RunDirError("the RUN directory is in use", [problem]) from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def _other_recipe(run: RunDir, differ: list[tuple[str, str, str]], told: str, new: set[str]) -> RunDirError:
    """`new` are the keys that say the same, but were not known to the version that made the run."""
    remedy = (
        "use the recipe that made this one, or another --out; journal.db* may be copied there, so nothing is paid twice"
    )
    elsewhere = (
        "use the recipe that made this one, or another --out; answers of another address or model are others, and none "
        "of those in the journal counts for it"
    )
    otherwise = (
        "use the recipe that made this one, or another --out; what is asked with another value is asked and paid for "
        "anew, whatever the journal holds"
    )
    older = (
        f"go on with the limbeck that made this run{run._made_by()}, which did not know the key, or use another --out; "
        "journal.db* may be copied there, so nothing is paid twice"
    )

    def remedy_of(key: str, was: str, now: str) -> str:
        if key in new:
            return older
        if moved := _moved(was, now):
            return moved
        plain = ".".join(step for step in key.split(".") if not step.isdigit())  # the place in a list is no matter
        if plain.endswith(_WHOSE):
            return elsewhere
        return otherwise if any(f"{plain}.".startswith(f"{asked}.") for asked in _ASKED) else remedy

    problems = [Problem(f"{run / 'recipe.yaml'}: {row[0]}", *row[1:], remedy_of(*row)) for row in differ]
    by = "version of limbeck" if new == {key for key, _, _ in differ} else "recipe"
    summary = f"the RUN directory was made by another {by} (found: there, expected: this {by})"
    return RunDirError(f"{summary}; {told}" if told else summary, problems)


def _moved(was: str, now: str) -> str:
    """What to do where a file of the recipe lies elsewhere than it did; empty where that is not so."""
    old, new = Path(was), Path(now)
    alike = old.is_absolute() and new.is_absolute() and old.name == new.name
    if not alike or os.path.lexists(old) or not os.path.exists(new):
        return ""
    while old.name == new.name and not os.path.lexists(old.parent):
        old, new = old.parent, new.parent
    made = "" if old.parent.is_dir() else shlex.join(["mkdir", "-p", str(old.parent)]) + " && "
    link = shlex.join(["ln", "-s", str(new), str(old)])
    return (
        f"if it was moved: a run records the paths of its files; let the old one lead there (`{made}{link}`), and name "
        "the recipe as it was named"
    )


def differences(there: object, here: object, key: str = "") -> list[tuple[str, str, str]]:
    """Every key in which two JSON values differ, sorted, with both values as text: as YAML has them in one line, but
    for "nothing" where that is null and "no such key" where there is none.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return [
            row
            for name in sorted({*there, *here})
            for row in differences(
                there.get(name, _NO_KEY), here.get(name, _NO_KEY), f"{key}.{name}" if key else str(name)
            )
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return differences(dict(enumerate(there)), dict(enumerate(here)), key)
    return [] if there == here else [(key or ".", _in_words(there), _in_words(here))]


def _in_words(value: object) -> str:
    if value is None or value is _NO_KEY:
        return "nothing" if value is None else "no such key"
    if value in ("nothing", "no such key"):
        return f"'{value}'"
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
