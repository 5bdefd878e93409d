"""Journals of parts of the work, and how they come into the journal of the whole.

Who asks a part of the requests elsewhere (`limbeck.collect.endpoints.ray_workers`) keeps a journal of its own beside
the run's: JOURNAL-shards/NUMBER.db. Its requests count on from NUMBER in the whole one, and no two shards share
a number, so that merging one again changes nothing: a kill between the merging and the removal does no harm.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from limbeck.collect.journal import Journal, held

SPAN = 10**9
"""Numbers of requests that a shard has for itself: more than it can send, and 2^53 is far away."""


def shards_of(journal: Path) -> Path:
    """Where the shards of a journal lie while there are any."""
    return journal.with_name(f"{journal.name}-shards")


def merge_shards(journal: Journal) -> None:
    """Take over what shards hold: answers, second answers and the requests that were sent, with what they cost; then
    remove them. What was under way when a shard's process was killed counts as killed. Only for who holds the journal.

    Raises `InputError` where a shard is still being asked, or cannot be read; shards before it are merged then.
    """
    place = shards_of(journal.path)
    if not place.is_dir():
        return
    for path in sorted(place.glob("*.db")):
        with held(path):
            with Journal(path) as shard:
                shard.close_open()
            with _Whole(journal.path) as whole:
                whole.absorb(path, int(path.stem))
    shutil.rmtree(place)


class _Whole(Journal):
    """The journal of the whole, which a shard is merged into."""

    def absorb(self, shard: Path, before: int) -> None:
        """Merge a shard whose first request has the number `before` + 1 here; all of it or nothing."""
        with self._telling():
            self._db.execute("ATTACH DATABASE ? AS shard", (str(shard),))
            try:
                with self._transaction():
                    self._db.execute(_SECOND)
                    self._db.execute(_ANSWERS)
                    self._db.execute(_SENT, (before,))
            finally:
                self._db.execute("DETACH DATABASE shard")


_SECOND = """
INSERT INTO main.refused (key, raw, response, created)
SELECT new.key, new.raw, new.response, new.created FROM (
    SELECT key, raw, response, created FROM shard.refused
    UNION ALL
    SELECT a.key, a.raw, a.response, a.created FROM shard.answers AS a JOIN main.answers AS m ON m.key = a.key
    WHERE m.response <> a.response OR m.created <> a.created
) AS new WHERE NOT EXISTS (
    SELECT 1 FROM main.refused AS old
    WHERE old.key = new.key AND old.response = new.response AND old.created = new.created
)
"""
_ANSWERS = """
INSERT INTO main.answers (key, request, raw, response, created)
SELECT key, request, raw, response, created FROM shard.answers WHERE true ON CONFLICT (key) DO NOTHING
"""
_SENT = """
INSERT OR IGNORE INTO main.sent (number, key, account, held, cost, outcome, started, ended)
SELECT number + ?, key, account, held, cost, outcome, started, ended FROM shard.sent
"""
