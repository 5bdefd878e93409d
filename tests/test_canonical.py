"""Canonical JSON: the fast way and the library give the same bytes for everything, and refuse the same."""

from __future__ import annotations

from enum import StrEnum

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.ledger.canonical import canonical

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
KEYS = TEXT | st.text(st.characters(max_codepoint=127))
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_the_same_bytes_as_the_library(value):
    assert canonical(value) == rfc8785.dumps(value)


def test_every_character_is_written_alike():
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000, 7))))
    assert canonical(everything) == rfc8785.dumps(everything)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 1e21, 1e-7, 5e-324, 1e20, 333333333.3333333, True, 1, [1, True, 1.0]]
)
def test_numbers_of_one_value_and_several_types(value):
    """A cache must not take True, 1 and 1.0 for each other in the wrong place."""
    assert canonical(value) == rfc8785.dumps(value)


class Word(StrEnum):
    TRAIN = "train"


def test_kinds_of_text():
    assert canonical(Word.TRAIN) == b'"train"'
    assert canonical({Word.TRAIN: 1}) == b'{"train":1}'


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, -(2**53), "\ud800", {"\ud800": 1}, {1: 2}, object()]
)
def test_what_json_cannot_say_is_refused(value):
    for nested in (value, [value], {"a": value}):
        with pytest.raises((rfc8785.CanonicalizationError, ValueError)):
            canonical(nested)
