"""Has an endpoint asked by several Ray workers, each with its part of the requests and a journal of its own.

Imported only where a recipe has `collect.ray`: it needs the extra `ray`. RUN, or the shared journal, lies where all
machines of the Ray cluster see it. Ray starts no task a second time (`max_retries=0`): one that is lost leaves its
journal, the driver merges it, and the same command asks the rest.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from limbeck.collect.endpoints.asking import Asked, Purpose, ask
from limbeck.collect.endpoints.budget import Budget
from limbeck.collect.endpoints.keys import read_key
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import held
from limbeck.collect.shards import SPAN, merge_shards, shards_of
from limbeck.collect.teachers import Request
from limbeck.errors import EndpointError, InputError, LimbeckError, Problem, RefusedError
from limbeck.ledger.canonical import digest_bytes
from limbeck.recipe import EndpointTeacher, RayWorkers, Recipe
from limbeck.records import Digest

if TYPE_CHECKING:
    from ray import ObjectRef

    from limbeck.collect.journal import Journal
    from limbeck.progress import Line

_STRETCH = 256
"""Requests that a worker reads together."""
_LOOK = 0.5
"""Seconds between two looks at how far the workers are."""
_STORE = 100_000_000
"""Bytes for objects where Ray is started here: nothing but small messages goes through it."""


class Shard(NamedTuple):
    """What one worker is told. Never a key: a worker reads it where the recipe says."""

    recipe: str
    """JSON."""
    teacher: str
    place: Path
    """The shard's files without suffix: `.jsonl` has the requests, `.db` is its journal, `.said` how far it is."""
    account: Digest
    money: int | None
    """Picodollars that it may spend."""
    concurrency: int
    rates: tuple[int | None, int | None]
    """Requests and tokens a minute."""
    known_good: bool


def ask_with_ray(
    teacher: Endpoint,
    stretches: Iterator[Sequence[Request]],
    workers: RayWorkers,
    recipe: Recipe,
    purpose: Purpose,
    journal: Journal,
    line: Line,
) -> Asked:
    """Have the workers ask all that is lacking, each with an equal share of money, concurrency and rates, and merge
    their journals, however it ends. Where a share of the money is used up, others may have some left:
    `Asked.stopped` is a `RefusedError` then, and who called may go on with the rest.

    Raises what the journal raises, and `InputError` where the key cannot be read here.
    """
    rates = teacher.settings.requests_per_minute, teacher.settings.tokens_per_minute
    # No more than can each have a share of at least one.
    count = min(workers.workers, recipe.collect.concurrency, *(rate for rate in rates if rate is not None))
    places = _write(stretches, journal, count)
    if not places:
        return Asked(0, 0, None)
    read_key(teacher.settings)
    left = purpose.budget.left
    each = Shard(
        recipe.model_dump_json(),
        teacher.identity.name,
        Path(),
        purpose.account,
        None if left is None else max(0, left) // count,
        recipe.collect.concurrency // count,
        (rates[0] and rates[0] // count, rates[1] and rates[1] // count),
        purpose.known_good,
    )
    try:
        return _together(_run([each._replace(place=place) for place in places], line))
    finally:
        merge_shards(journal)


def _write(stretches: Iterator[Sequence[Request]], journal: Journal, count: int) -> list[Path]:
    """Write what is lacking to a file for each worker, a request a line; the same request always to the same one."""
    first = next(stretches, None)
    if first is None:
        return []
    folder, base = shards_of(journal.path).resolve(), journal.next_number - 1
    folder.mkdir()
    places = [folder / str(base + number * SPAN) for number in range(count)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(place.with_suffix(".jsonl"), "wb")) for place in places]
        for stretch in chain([first], stretches):
            for request in stretch:
                files[int(request.key[-8:], 16) % count].write(request.body + b"\n")
    return [place for place in places if place.with_suffix(".jsonl").stat().st_size]


def _run(shards: Sequence[Shard], line: Line) -> list[Asked]:
    """What came of each. Ctrl-C has the workers await what is under way; a second one ends them."""
    with _ray(len(shards)) as ray:
        # Not as a decorator: that would need Ray started when this module is imported.
        remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(ask_shard)
        open_, told = [remote.remote(shard) for shard in shards], _Shown(line, shards)
        asked = list(open_)
        try:
            while open_:
                _, open_ = ray.wait(open_, num_returns=len(open_), timeout=_LOOK)
                told.look()
        except BaseException:
            for each in open_:
                ray.cancel(each, force=False)
            ray.wait(open_, num_returns=len(open_))
            raise
        return [_result(ray, each, shard) for each, shard in zip(asked, shards, strict=True)]


@contextmanager
def _ray(workers: int) -> Iterator[ModuleType]:
    """Ray: as the process has it, or the cluster at RAY_ADDRESS, or one started here for the time being."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"num_cpus": workers, "object_store_memory": _STORE, "include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield ray
    finally:
        ray.shutdown()


def _result(ray: ModuleType, task: ObjectRef, shard: Shard) -> Asked:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:  # an error in ours, not a worker that is gone
        raise
    except ray.exceptions.RayError as error:
        found = f"the worker of shard {shard.place.name} is gone: {str(error).splitlines()[0]}"
        remedy = "run the same command again: what was answered is not asked again"
        problem = Problem(f"teacher {shard.teacher}", found, "a worker that ends by itself", remedy)
        return Asked(0, 0, EndpointError("a Ray worker was lost", [problem]))


def _together(parts: Sequence[Asked]) -> Asked:
    """The sums, and the gravest reason to stop: a cap comes last, since others may have money left."""
    stops = [part for part in parts if part.stopped is not None]
    stops.sort(key=lambda part: (not part.fatal, isinstance(part.stopped, RefusedError)))
    stopped, fatal = (stops[0].stopped, stops[0].fatal) if stops else (None, False)
    return Asked(sum(part.answers for part in parts), sum(part.tokens for part in parts), stopped, fatal)


def ask_shard(shard: Shard) -> Asked:
    """What one worker does."""
    recipe = Recipe.model_validate_json(shard.recipe)
    settings = next(one for one in recipe.teachers if one.name == shard.teacher)
    assert isinstance(settings, EndpointTeacher)
    requests, tokens = shard.rates
    shared = settings.model_copy(update={"requests_per_minute": requests, "tokens_per_minute": tokens})
    teacher, path = Endpoint(shared, recipe.collect, recipe.seed), shard.place.with_suffix(".db")
    try:
        stretches = _read(shard.place.with_suffix(".jsonl"))
        with held(path):
            budget = Budget(shard.money)
            purpose = Purpose(path, shard.account, 1, budget, shard.concurrency, shard.known_good)
            return ask(teacher, stretches, purpose, _Saying(shard.place.with_suffix(".said")))
    except (LimbeckError, OSError, sqlite3.Error) as error:
        return Asked(0, 0, error, fatal=True)


def _read(path: Path) -> Iterator[list[Request]]:
    """Opens the file at once. Raises `InputError` where this machine does not see it."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by who reads it
    except FileNotFoundError:
        remedy = "place RUN, or collect.journal, in a directory that all of them see under the same path"
        expected = "the files of the machine that started the run"
        raise InputError(
            "a Ray worker does not see the run", [Problem(str(path), f"not on {os.uname().nodename}", expected, remedy)]
        ) from None

    def stretches() -> Iterator[list[Request]]:
        with file:
            while lines := list(islice(file, _STRETCH)):
                yield [Request(digest_bytes(body), body) for body in (line[:-1] for line in lines)]

    return stretches()


class _Saying:
    """The `Line` of a worker: a file in which stands how many answers it has, and its note."""

    def __init__(self, path: Path):
        self._path, self._done = path, 0.0

    def advance(self, units: float = 1) -> None:
        self._done += units

    def note(self, text: str) -> None:
        self._path.write_text(f"{self._done:.0f} {text}", encoding="utf-8")


class _Shown:
    """Shows on one line what the workers say."""

    def __init__(self, line: Line, shards: Sequence[Shard]):
        self._line, self._paths = line, [shard.place.with_suffix(".said") for shard in shards]
        self._done = 0

    def look(self) -> None:
        """Read what they say; what is being written at this moment is read the next time."""
        said = [path.read_text(encoding="utf-8").partition(" ") for path in self._paths if path.exists()]
        counts = [int(count) for count, _, _ in said if count.isdigit()]
        done = max(self._done, sum(counts))
        self._line.advance(done - self._done)
        self._line.note(f"{len(self._paths)} workers: " + " | ".join(text for _, _, text in said))
        self._done = done
