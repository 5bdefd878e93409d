"""What is compared by column agrees with what is told row by row, and recipe.yaml is read by both verifiers alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from verifier import second

from limbeck.ledger.columns import Places
from limbeck.ledger.parents import record_differences
from limbeck.ledger.recipe_text import read_recipe_text
from limbeck.records import Completion, Prompt, Verdict
from limbeck.tables import schema

TABLES = ("prompts.parquet", "completions.parquet", "verdicts.parquet")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return runs.make_run(tmp_path_factory.mktemp("good") / "run")


# What is compared by column and what row by row


def all_records(run: Path) -> tuple[list, list]:
    return record_differences(run, frozenset({*TABLES, "examples", "recipe.yaml", "journal.db"}))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_records_that_agree_by_column_agree_row_by_row_and_no_others(seed, good, tmp_path_factory):
    random, run = Random(seed), tmp_path_factory.getbasetemp() / "compared"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good, run)
    record = random.choice((Prompt, Completion, Verdict))
    path = run / {Prompt: "prompts", Completion: "completions", Verdict: "verdicts"}[record]
    path = path.with_suffix(".parquet")
    rows = pq.read_table(path).to_pylist()
    kind = random.randrange(5)
    at, other = random.randrange(len(rows)), random.randrange(len(rows))
    if kind == 0:
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == 1:
        rows.insert(other, rows[at])
    elif kind == 2:
        del rows[at]
    elif kind == 3:
        name = random.choice(list(rows[0]))
        rows[at][name] = rows[other][name]
    else:
        name = random.choice([name for name, value in rows[at].items() if isinstance(value, str)])
        rows[at][name] = random.choice(("", "x", rows[at][name] + " ", rows[at][name].replace('"', "é")))
    pq.write_table(pa.Table.from_pylist(rows, schema(record)), path)
    found = all_records(run)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prompts_agree", "completions_agree", "verdicts_agree", "examples_agree"):
            patch.setattr(f"limbeck.ledger.parents.{name}", lambda *_: None)
        assert all_records(run) == found


def test_no_more_earlier_prompts_are_held_than_fit(tmp_path, monkeypatch):
    run = runs.make_run(tmp_path / "run", change=runs.from_seeds)
    assert all_records(run)[0] == []
    monkeypatch.setattr("limbeck.ledger.agreement._MOST_EARLIER", 1)
    (problem, *_) = all_records(run)[0]
    assert problem.where == "prompts.parquet"
    assert "more than 1 earlier prompts" in problem.found


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 40), max_size=30), asked=st.lists(st.integers(0, 45), max_size=40))
def test_places_are_those_of_a_dictionary(values, asked):
    digests = [b"same head" + bytes(19) + number.to_bytes(4, "big") for number in range(46)]
    places, known = Places(), {}
    for value in dict.fromkeys(values):
        known[value] = len(places)
        places.append(digests[value])
    assert [places.get(digests[value]) for value in asked] == [known.get(value, -1) for value in asked]
    assert list(places) == [digests[value] for value in known]
    assert not places.twice()
    if known:
        places.append(digests[next(iter(known))])
        assert places.twice()


# The recipe


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(0, 1e9) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_a_run_can_write_is_read(value):
    assume(not isinstance(value, str))
    data = yaml.safe_dump({"x": value}, sort_keys=False).encode()
    assert read_recipe_text(data) == {"x": value}


STRANGE = (
    *(
        "a: &x 1\nb: *x\n",
        "a: !!str 1\n",
        "a: !!python/object:os.system x\n",
        "a: |\n  x\n",
        "--- 1\n",
        "a: 1\n---\nb: 2\n",
    ),
    *("a: yes\n", "a: 0x10\n", "a: 1_000\n", "a: 2024-01-01\n", "a: 1:30\n", "a: .inf\n", "a: [1, 2]\n", "a: {b: 1}\n"),
    *(
        "a: 1\na: 2\n",
        "1: a\n",
        "a: 1\t\n",
        "a: x\u2028\n",
        "a: \x00\n",
        "a: 'x\u0085y'\n",
        "? a\n: b\n- c\n",
        "a: 1\r\n",
    ),
)


@pytest.mark.parametrize("text", STRANGE)
def test_yaml_that_no_run_writes_is_refused_by_both(text):
    with pytest.raises((ValueError, yaml.YAMLError)):
        read_recipe_text(text.encode())
    with pytest.raises(second.WrongError):
        second.Yaml(text.encode()).read()
