"""Parts of tools/verify_ledger.py against other oracles: rfc8785, PyYAML, and RFC 9162 as it is written."""

from __future__ import annotations

import json
import re

import rfc8785
import yaml
from faults import forger
from hypothesis import given, settings
from hypothesis import strategies as st
from verifier import second

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_canonical_json_is_that_of_rfc8785(value):
    assert second.canonical(value, "") == rfc8785.dumps(value)


@given(FLOATS)
def test_numbers_are_those_of_rfc8785(value):
    assert second.number(value, "").encode() == rfc8785.dumps(value)


RECIPES = st.dictionaries(st.text("abc_", min_size=1, max_size=8), JSON, max_size=5)


def keys_are_words(value: object) -> bool:
    """Keys as recipes have them; other keys are refused, which is no misreading."""
    if isinstance(value, dict):
        return all(re.fullmatch("[A-Za-z_]+", key) and keys_are_words(one) for key, one in value.items())
    return not isinstance(value, list) or all(keys_are_words(one) for one in value)


@settings(max_examples=300, deadline=None)
@given(RECIPES)
def test_yaml_is_never_misread(value):
    """Whatever PyYAML writes is read as PyYAML reads it, or refused."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    try:
        read = second.Yaml(text.encode()).read()
    except second.WrongError:
        assert not keys_are_words(value) or "\x85" in text
        return
    assert json.dumps(read) == json.dumps(yaml.safe_load(text))


@given(st.integers(1, 70), st.data())
def test_roots_and_paths_are_those_of_rfc_9162(size, data):
    """Against the recursive definition of section 2.1, written down as it stands there."""
    leaves = [forger.sha(bytes([at])) for at in range(size)]
    tree = second.Tree()
    for leaf in leaves:
        tree.push(leaf)
    assert tree.root() == forger.root(leaves)
    index = data.draw(st.integers(0, size - 1))
    path = audit_path(index, leaves)
    assert second.root_of_path(leaves[index], index, size, path, "") == tree.root()
    old = data.draw(st.integers(1, size))
    findings = second.Findings()
    proof = subproof(old, leaves, True)
    second.check_consistent((old, forger.root(leaves[:old])), (size, tree.root()), proof, findings)
    assert not findings.differences


def audit_path(index: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 9162, section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*audit_path(index, leaves[:split]), forger.root(leaves[split:])]
    return [*audit_path(index - split, leaves[split:]), forger.root(leaves[:split])]


def subproof(old: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162, section 2.1.4.1."""
    if old == len(leaves):
        return [] if whole else [forger.root(leaves)]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if old <= split:
        return [*subproof(old, leaves[:split], whole), forger.root(leaves[split:])]
    return [*subproof(old - split, leaves[split:], False), forger.root(leaves[:split])]
