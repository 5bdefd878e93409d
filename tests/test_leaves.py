"""Laws of what the tree is made of: salts by RFC 5869, fields by docs/ledger-format.md, storage by the naive tree."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from contextlib import closing

import pyarrow.parquet as pq
import pytest
import rfc8785
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.errors import StaleError
from limbeck.ledger import leaf_columns
from limbeck.ledger.layout import TREE
from limbeck.ledger.merkle.fields import (
    FIELDS,
    Leaf,
    Share,
    Version,
    commit,
    encode,
    field_digest,
    fields_path,
    fields_root_from_path,
)
from limbeck.ledger.merkle.hashing import EncodedColumns, commit_hashes
from limbeck.ledger.merkle.salts import Salts, expand
from limbeck.ledger.merkle.stored import StoredTree
from limbeck.ledger.merkle.tree import consistent, leaf_hash, root, root_from_path
from limbeck.ledger.sealing import leaves, sampling_of
from limbeck.recipe import EndpointTeacher, Recipe
from limbeck.records import Completion, Parent, Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records

# Salts


def test_rfc_5869_test_case_1():
    prk = Salts.of(bytes([0x0B] * 22), bytes(range(13))).key
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    okm = expand(prk, bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def test_rfc_5869_test_case_3():
    prk = Salts.of(bytes([0x0B] * 22), b"").key
    assert prk.hex() == "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04"
    okm = expand(prk, b"", 42)
    assert okm.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"


@given(rows=st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True), nonces=st.binary(min_size=32))
def test_no_salt_comes_twice_and_another_nonce_gives_others(rows, nonces):
    one, other = Salts.of(b"secret", nonces), Salts.of(b"secret", nonces + b"x")
    salts = [salt for of in (one, other) for row in rows for salt in of.row(row, 17)] + [one.order(), other.order()]
    assert len(set(salts)) == len(salts)
    assert {len(salt) for salt in salts} == {16}
    assert one.id != other.id


# Fields

LEAF = Leaf(
    tuple(
        {"sampling": {"temperature": 0.7, "seed": 0}, "parents": ["a"], "writers": [["answer", "x"]]}.get(name, name)
        for name in FIELDS
    ),
    Share(teacher="x", split="train", tokens=5),
)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


VERSIONS: dict[Version, bytes] = {1: b"\x01", 2: b"\x03"}
"""What a leaf's data begins with, by the page."""


def by_the_page(leaf: Leaf, salts: list[bytes], version: Version) -> bytes:
    """docs/ledger-format.md, word for word, with json for RFC 8785 (these values have one form in both)."""

    def digest(name: str, salt: bytes, value: object) -> bytes:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return sha(b"\x02" + salt + bytes([len(name)]) + name.encode() + text.encode())

    level = [digest(name, salt, value) for name, salt, value in zip(FIELDS, salts, leaf.fields, strict=False)]
    while len(level) > 1:
        level = [sha(b"\x03" + level[i] + level[i + 1]) for i in range(0, len(level), 2)]
    share = {"class": leaf.share.teacher, "split": leaf.share.split, "tokens": leaf.share.tokens}
    return sha(b"\x00" + VERSIONS[version] + level[0] + digest("share", salts[16], share))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_leaf_is_what_the_page_says(version):
    salts = Salts.of(b"secret", b"nonce")
    okm, block = b"", b""
    for i in range(1, 10):  # HKDF-Expand by RFC 5869 section 2.3
        block = hmac.digest(salts.key, block + b"limbeck/salts/1" + (7).to_bytes(8, "big") + bytes([i]), "sha256")
        okm += block
    due = by_the_page(LEAF, [okm[i : i + 16] for i in range(0, 272, 16)], version)
    assert commit(salts, 7, encode(LEAF), version).hash == due
    assert commit(salts, 8, encode(LEAF), version).hash != due
    assert {commit(salts, 7, encode(LEAF), other).hash == due for other in VERSIONS if other != version} == {False}


def test_every_field_and_the_share_change_the_leaf():
    salts = Salts.of(b"secret", b"nonce")
    leaves = [LEAF, LEAF._replace(share=Share(teacher="x", split="train", tokens=6))]
    leaves += [LEAF._replace(share=Share(teacher="x", split="held_out", tokens=5))]
    leaves += [LEAF._replace(share=Share(teacher="y", split="train", tokens=5))]
    leaves += [LEAF._replace(fields=(*LEAF.fields[:i], None, *LEAF.fields[i + 1 :])) for i in range(len(FIELDS))]
    assert len({commit(salts, 0, encode(leaf), 2).hash for leaf in leaves}) == len(leaves)


def test_a_field_leads_to_the_root_of_its_fields_and_no_other_does():
    made = commit(Salts.of(b"secret", b"nonce"), 0, encode(LEAF), 2)
    for place, digest in enumerate(made.digests):
        path = fields_path(made.digests, place)
        assert len(path) == 4
        assert fields_root_from_path(digest, place, path) == made.private
        assert fields_root_from_path(digest, place ^ 1, path) != made.private
    with pytest.raises(ValueError, match="path"):
        fields_root_from_path(made.digests[0], 0, fields_path(made.digests, 0)[:3])


@given(salt=st.binary(min_size=16, max_size=16), other=st.binary(min_size=16, max_size=16))
def test_another_salt_opens_to_nothing(salt, other):
    """Salts have a fixed length, so bytes cannot move between salt, name and value."""
    assert (field_digest("terms", salt, b'"x"') == field_digest("terms", other, b'"x"')) == (salt == other)


# Storage


def opened() -> tuple[sqlite3.Connection, StoredTree]:
    db = sqlite3.connect(":memory:", isolation_level=None)
    for statement in TREE.values():
        db.execute(statement)
    return db, StoredTree(db)


def hashes(n: int) -> list[bytes]:
    return [leaf_hash(i.to_bytes(4, "big")) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.integers(0, 700), min_size=1, max_size=6), data=st.data())
def test_stored_in_any_parts_the_tree_is_that_of_its_leaves(parts, data):
    db, tree = opened()
    with closing(db):
        d, done = hashes(sum(parts)), 0
        for part in parts:
            tree.append(d[done : done + part])
            done += part
        assert tree.size == len(d)
        assert tree.root() == root(d)
        assert tree.problems() == []
        if d:
            place, size = data.draw(st.integers(0, len(d) - 1)), data.draw(st.integers(1, len(d)))
            assert tree.root(size) == root(d[:size])
            assert tree.leaves(place, size) == d[place:size]
            assert root_from_path(d[place], place, len(d), tree.path(place, len(d))) == root(d)
            assert consistent(size, len(d), root(d[:size]), root(d), tree.consistency(size, len(d)))


def test_a_second_level_of_subtrees_is_stored_and_used():
    db, tree = opened()
    with closing(db):
        d = hashes(256 * 256 + 300)
        tree.append(d)
        assert db.execute("SELECT COUNT(*) FROM subtrees WHERE level = 2").fetchone() == (1,)
        assert tree.root() == root(d)
        assert tree.problems() == []
        assert root_from_path(d[70], 70, len(d), tree.path(70, len(d))) == root(d)


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE subtrees SET hash = zeroblob(32) WHERE place = 1", "subtree 1 of level 1"),
        ("DELETE FROM subtrees WHERE place = 0", "subtree 0 of level 1"),
        ("INSERT INTO subtrees VALUES (2, 0, zeroblob(32))", "subtree 0 of level 2"),
        ("INSERT INTO subtrees VALUES ('x', 0, 5)", "ledger.db: subtrees"),
        ("UPDATE hashes SET data = substr(data, 2) WHERE first = 256", "leaf 256 on"),
        ("UPDATE hashes SET data = zeroblob(100000000) WHERE first = 256", "leaf 256 on"),
        ("UPDATE hashes SET data = 'text' WHERE first = 256", "leaf 256 on"),
        ("DELETE FROM hashes WHERE first = 256", "leaf 512 on"),
        ("UPDATE hashes SET first = 999 WHERE first = 512", "leaf 999 on"),
    ],
)
def test_damage_to_the_stored_tree_is_found(statement, where):
    db, tree = opened()
    with closing(db):
        tree.append(hashes(600))
        for name in ("hashes_unchanged", "hashes_kept", "subtrees_unchanged", "subtrees_kept"):
            db.execute(f"DROP TRIGGER {name}")
        db.execute(statement)
        assert [where in p.where for p in tree.problems()][:1] == [True]


@given(teacher=st.text(st.characters(exclude_categories=("Cs",))), tokens=st.integers(0, 2**53 - 1))
def test_a_leafs_bytes_are_canonical_json(teacher, tokens):
    leaf = LEAF._replace(share=Share.model_validate({"class": teacher, "split": "train", "tokens": tokens}))
    told = encode(leaf)
    assert told.fields == tuple(map(rfc8785.dumps, leaf.fields))
    assert told.share == rfc8785.dumps(leaf.share.value())
    assert told.text().encode() == rfc8785.dumps(leaf.values)


SALTS = Salts.of(b"secret", b"nonce")
VALUES = st.one_of(st.text(st.characters(exclude_categories=("Cs",))), st.none(), st.integers(0, 9))


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(*[VALUES] * 16, st.integers(0, 99)), max_size=9),
    first=st.integers(0, 2**40),
    version=st.sampled_from(sorted(VERSIONS)),
)
def test_hashes_of_many_rows_are_those_of_each(rows, first, version):
    leaves = [
        Leaf(tuple(values), Share.model_validate({"class": "t", "split": "train", "tokens": tokens}))
        for *values, tokens in rows
    ]
    told = [encode(leaf) for leaf in leaves]
    columns = tuple([one.fields[place] for one in told] for place in range(16))
    together = EncodedColumns(columns, [one.share for one in told])
    assert [text.decode() for text in together.texts()] == [one.text() for one in told]
    due = [commit(SALTS, first + row, one, version).hash for row, one in enumerate(told)]
    assert commit_hashes(SALTS, first, together, version) == due


SEED = "sha256:" + "5" * 64
PARENTS = (
    None,
    (Parent(id=SEED, source="seeds.jsonl", licence="MIT", kind="seed"),),
    (
        Parent(id=SEED, source="an earlier version's", licence="MIT"),
        Parent(id=SEED, source="x", licence="MIT", kind="prompt"),
    ),
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (3, 0, 5, 1, 2, 4)], ids=["in order", "in another order"])
def test_values_by_column_are_those_of_each_row(version, order, tmp_path):
    """Of a run whose prompts a model wrote too, with several answers each, and one without an example."""
    run = runs.make_run(tmp_path / "run")
    recipe = RunDir(run).recipe()
    prompts = list(read_records(run / "prompts.parquet", Prompt))
    prompts = [
        prompt.model_copy(update={"writer": "w" * (n % 2) or None, "parents": PARENTS[n % 3]})
        for n, prompt in enumerate(prompts)
    ]
    write_records(run / "prompts.parquet", [prompts[n] for n in order], Prompt)
    completions = list(read_records(run / "completions.parquet", Completion))
    completions = [
        one.model_copy(update={"answer_id": (None, "", 'a"\u2028é')[n % 3], "fingerprint": (None, "fp")[n % 2]})
        for n, one in enumerate(completions)
    ]
    write_records(run / "completions.parquet", completions, Completion)
    made = list(leaves(recipe, run, version))
    for leaf, one in zip(made, (completions[n] for n in (0, 2, 3, 4, 5)), strict=True):
        response, weights = leaf.values["response"], leaf.values["weights"]
        if version == 1:
            assert (response, weights) == (one.response, one.weights)
        else:
            assert response == {"digest": one.response, "id": one.answer_id}
            assert weights == {"digest": one.weights, "fingerprint": one.fingerprint}
    for leaf, prompt in zip(made, (prompts[n] for n in (0, 2, 3, 4, 5)), strict=True):  # the second is dropped
        found = leaf.values["parents"]
        rows = [[parent.kind or "row", parent.id] for parent in prompt.parents or ()]
        assert found[:1] == ([["completion", found[0][1]]] if version == 2 else [found[0]])
        assert found[1:] == (rows if version == 2 else [])
        assert leaf.values["prompt"] == prompt.id
        assert leaf.values["writers"][1:] == ([["prompt", prompt.writer]] if prompt.writer else [])
    each = [encode(leaf) for leaf in made]
    assert len(each) > 2
    for rows in (2, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leaf_columns, "ROWS", rows)
            groups = list(leaf_columns.leaf_columns(recipe, run, version))
        assert [group.shares for group in groups] == [
            [one.share for one in each[i : i + rows]] for i in range(0, len(each), rows)
        ]
        assert [row for group in groups for row in zip(*group.fields, strict=True)] == [one.fields for one in each]
    path = run / "examples" / "examples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, *range(2, len(table))]), path)
    said = []
    for ways in (leaves, leaf_columns.leaf_columns):
        with pytest.raises(StaleError) as error:
            list(ways(recipe, run, version))
        said.append(error.value.problems)
    assert said[0] == said[1]


ASKED = [
    {"kind": "openai", "model": "a", "extra": {"reasoning_effort": "low"}},
    {"kind": "openai", "model": "b", "omit": ["temperature", "seed"]},
    {"kind": "openai", "api": "responses", "model": "c"},
    {"kind": "anthropic", "model": "d", "omit": ["top_p"]},
]


@pytest.mark.parametrize("teacher", ASKED, ids=lambda one: one["model"])
def test_a_leaf_says_of_the_sampling_what_the_request_says(teacher):
    told = runs.RECIPE.model_dump(mode="json") | {
        "teacher": teacher | {"terms": "own-model"},
        "prompts": [{"kind": "file", "path": "eggs.jsonl"}],
        "collect": {"max_tokens": 77, "temperature": 0.4, "top_p": 0.9},
        "student": {"kind": "pretrained", "model": "nowhere"},
        "signal": {"kind": "text"},
        "train": {"loss": "cross_entropy"},
    }
    recipe = Recipe.model_validate(told)
    (settings,) = recipe.teachers
    assert isinstance(settings, EndpointTeacher)
    body = json.loads(Endpoint(settings, recipe.collect, recipe.seed).request(runs._prompt(0), 0).body)["body"]
    said = sampling_of(recipe, settings.name, 0, 2)
    assert isinstance(said, dict)
    assert {key for key in ("seed", "temperature", "top_p") if said[key] is not None} == {
        key for key in ("seed", "temperature", "top_p") if key in body
    }
    assert said["max_tokens"] == 77
    assert 77 in body.values()
    assert said["extra"] == {key: body[key] for key in teacher.get("extra", {})}
    assert sampling_of(recipe, "somebody else, or a file", 3, 2) == {
        **dict.fromkeys(("max_tokens", "seed", "temperature", "top_p")),
        **{"extra": {}, "sample": 3},
    }
