"""Laws of the tree: the reference vectors of Certificate Transparency, and a naive version by the RFC's own words."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.ledger.merkle.tree import (
    EMPTY_ROOT,
    consistency_proof,
    consistent,
    inclusion_path,
    leaf_hash,
    root,
    root_from_path,
    subtree_of,
)

INPUTS = [
    bytes.fromhex(x)
    for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
"""Roots over the first 1 to 8 of the inputs: the reference tests of Certificate Transparency (RFC 6962, RFC 9162)."""
PATHS = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
PROOFS = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
LEAVES = [leaf_hash(data) for data in INPUTS]


def naive_root(d: list[bytes]) -> bytes:
    """Section 2.1.1, word for word."""
    if not d:
        return sha256(b"").digest()
    if len(d) == 1:
        return d[0]
    k = max(2**i for i in range(20) if 2**i < len(d))
    return sha256(b"\x01" + naive_root(d[:k]) + naive_root(d[k:])).digest()


def naive_path(m: int, d: list[bytes]) -> list[bytes]:
    """Section 2.1.3.1."""
    if len(d) == 1:
        return []
    k = max(2**i for i in range(20) if 2**i < len(d))
    if m < k:
        return [*naive_path(m, d[:k]), naive_root(d[k:])]
    return [*naive_path(m - k, d[k:]), naive_root(d[:k])]


def naive_proof(m: int, d: list[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF of section 2.1.4.1."""
    if m == len(d):
        return [] if whole else [naive_root(d)]
    k = max(2**i for i in range(20) if 2**i < len(d))
    if m <= k:
        return [*naive_proof(m, d[:k], whole), naive_root(d[k:])]
    return [*naive_proof(m - k, d[k:], False), naive_root(d[:k])]


def test_reference_roots():
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert [root(LEAVES[:n]).hex() for n in range(1, 9)] == ROOTS


@pytest.mark.parametrize(("place", "size"), PATHS)
def test_reference_inclusion_paths(place, size):
    path = inclusion_path(subtree_of(LEAVES), place, size)
    assert [h.hex() for h in path] == PATHS[place, size]
    assert root_from_path(LEAVES[place], place, size, path).hex() == ROOTS[size - 1]


@pytest.mark.parametrize(("old", "new"), PROOFS)
def test_reference_consistency_proofs(old, new):
    proof = consistency_proof(subtree_of(LEAVES), old, new)
    assert [h.hex() for h in proof] == PROOFS[old, new]
    assert consistent(old, new, bytes.fromhex(ROOTS[old - 1]), bytes.fromhex(ROOTS[new - 1]), proof)


def leaves(n: int) -> list[bytes]:
    return [leaf_hash(bytes([i % 256, i // 256])) for i in range(n)]


SIZE = st.integers(1, 300)


@settings(max_examples=100, deadline=None)
@given(size=SIZE, data=st.data())
def test_proofs_are_those_of_the_naive_version_and_hold(size, data):
    d = leaves(size)
    place, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    path, proof = inclusion_path(subtree_of(d), place, size), consistency_proof(subtree_of(d), old, size)
    assert root(d) == naive_root(d)
    assert path == naive_path(place, d)
    assert proof == naive_proof(old, d)
    assert root_from_path(d[place], place, size, path) == root(d)
    assert consistent(old, size, root(d[:old]), root(d), proof)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(2, 200), data=st.data())
def test_a_changed_proof_or_place_or_size_does_not_hold(size, data):
    d = leaves(size)
    place, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    path, proof = inclusion_path(subtree_of(d), place, size), consistency_proof(subtree_of(d), old, size)

    def spoilt(hashes: list[bytes]) -> list[bytes]:
        kind = data.draw(st.sampled_from(["flip", "drop", "more", "swap"]))
        at = data.draw(st.integers(0, max(0, len(hashes) - 1)))
        if kind == "flip" and hashes:
            return [*hashes[:at], bytes([hashes[at][0] ^ 1]) + hashes[at][1:], *hashes[at + 1 :]]
        if kind == "drop" and hashes:
            return hashes[:at] + hashes[at + 1 :]
        if kind == "swap" and len(hashes) > 1:
            return hashes[1:] + hashes[:1]
        return [*hashes, leaf_hash(b"more")]

    def holds(hashes: list[bytes], place: int, leaf: bytes) -> bool:
        try:
            return root_from_path(leaf, place, size, hashes) == root(d)
        except ValueError:
            return False

    assert not holds(spoilt(path), place, d[place])
    assert not any(holds(path, other, d[place]) for other in range(size) if other != place)
    assert not consistent(old, size, root(d[:old]), root(d), spoilt(proof))
    assert not consistent(old, size, root(d[: old - 1]), root(d), proof)
    assert not consistent(old, size, root(d[:old]), leaf_hash(b"another"), proof)


def test_a_node_cannot_be_taken_for_a_leaf():
    """The attack that the prefixes are there against: a leaf whose data are two hashes."""
    d = leaves(4)
    forged = leaf_hash(d[0] + d[1])
    assert root([forged, root(d[2:])]) != root(d)


@pytest.mark.parametrize(("old", "new"), [(0, 3), (4, 3), (-1, 3)])
def test_there_is_no_proof_from_nothing_or_backwards(old, new):
    with pytest.raises(ValueError, match="no consistency proof"):
        consistency_proof(subtree_of(leaves(3)), old, new)
    assert not consistent(old, new, EMPTY_ROOT, root(leaves(3)), [])
