"""What is said of two recipes, or two keys of a cache, that are not the same."""

from __future__ import annotations

import copy
from functools import reduce
from operator import getitem
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.rundir import differences

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    | st.sampled_from(["nothing", "no such key", "null", "5", "true", "a: b", "http://127.0.0.1:8000/v1"])
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.text("ab", min_size=1), LEAVES, max_size=2), max_size=2)
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | ROWS
PARTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), VALUES, max_size=4)


def said(text: str) -> Any:
    """What a shown value stands for, by YAML."""
    return None if text == "nothing" else yaml.safe_load(text)


def put(whole: Any, key: str, shown: str) -> None:
    """Make the value at this place what is shown of it."""
    *steps, last = [int(step) if step.isdigit() else step for step in key.split(".")]
    inner = reduce(getitem, steps, whole)
    if shown == "no such key":
        del inner[last]
    else:
        inner[last] = said(shown)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(PARTS, PARTS)
def test_what_is_told_makes_one_of_the_other(there: dict[str, Any], here: dict[str, Any]):
    """Whatever differs is told, each place once, with both values as YAML has them in a line."""
    one, other = {"part": copy.deepcopy(there)}, {"part": here}
    rows = differences(one, other)
    assert len({key for key, _, _ in rows}) == len(rows)
    for key, was, now in rows:
        assert was != now
        assert "\n" not in was + now
        put(one, key, now)
    assert one == other
    for key, was, _ in rows:
        put(one, key, was)
    assert one == {"part": there}


def test_nothing_is_called_nothing():
    assert differences({"system": None, "commercial": True}, {"system": "Ask.", "commercial": False}) == [
        ("commercial", "true", "false"),
        ("system", "nothing", "Ask."),
    ]
    assert differences({}, {"system": None}) == [("system", "no such key", "nothing")]
