"""Answers that are not what was asked for are data, alone and in batches: off their schema, or withheld."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from asking import ask, file_of, made
from test_beyond_text import KINDS, SCHEMA, plain, rows

from limbeck.curate.curate import curate
from limbeck.curate.filters import make_filters
from limbeck.errors import InputError
from limbeck.rundir import RunDir
from limbeck.testing import Faults, OffSchema, Server, Settings, Withheld

SHORT = Settings(words=8, batch_seconds=0.1)
ROWS = {"rows": 10, "poll": 0.05}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_json_that_is_not_what_was_asked_for_is_kept_as_data_with_how_it_differs(
    tmp_path: Path, kind: str, batch: bool
):
    """Both that which is no JSON and that which is other JSON; neither is asked again."""
    source = rows(tmp_path / "p.jsonl", *plain(9))
    (first, second, *_) = [row["prompt"] for row in plain(9)]
    faults = OffSchema(contains=first), OffSchema(prose=True, contains=second)
    with Server(SHORT, Faults(faults=faults)) as server:
        more = {"batch": ROWS} if batch else {}
        recipe = made(server.url, source, kind=kind, json_schema=SCHEMA, **more)
        facts, found = ask(recipe, tmp_path / "run")
        ask(recipe, tmp_path / "run")
        assert server.bill.requests == 9
    off, prose, *good = found
    with pytest.raises(jsonschema.ValidationError) as error:
        jsonschema.validate(json.loads(off.text), SCHEMA)
    assert off.mismatch is not None
    assert error.value.message in off.mismatch
    assert prose.mismatch is not None
    assert "not JSON" in prose.mismatch
    assert {c.finish_reason for c in found} == {"stop"}
    for completion in good:
        assert completion.mismatch is None
        jsonschema.validate(json.loads(completion.text), SCHEMA)
    assert facts["money"]["waste"]["not what their schema asks for"]["count"] == 2
    keep = make_filters(recipe.curate, lambda _: None)[0]
    assert [keep.judge(c) is None for c in found] == [False, False] + [True] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_held_against_their_schema(tmp_path: Path, kind: str):
    """The server keeps to a schema that it is sent; told nothing of it, its words are none."""
    source = rows(tmp_path / "p.jsonl", *plain(6))
    unsent = {"omit": ["response_format" if kind == "openai" else "text" if kind == "responses" else "output_config"]}
    with Server(Settings(words=8)) as server:
        _, good = ask(made(server.url, source, kind=kind, json_schema=SCHEMA), tmp_path / "a")
        recipe = made(server.url, source, kind=kind, json_schema=SCHEMA, teacher=unsent)
        facts, bad = ask(recipe, tmp_path / "b")
        received = server.bill.received
        ask(recipe, tmp_path / "b")
        assert server.bill.received == received == 12  # data, and not asked again
    for completion in good:
        assert completion.mismatch is None
        jsonschema.validate(json.loads(completion.text), SCHEMA)
    assert all(c.mismatch and "not JSON" in c.mismatch for c in bad)
    assert facts["money"]["wasted"]["schema"]["answers"] == 6
    assert {kind: one["count"] for kind, one in facts["money"]["waste"].items()} == {
        "not what their schema asks for": 6
    }
    run = RunDir(tmp_path / "b")
    with pytest.raises(InputError) as caught:
        curate(recipe, run)
    told = caught.value.problems[0]
    assert f"the first: schema: {bad[0].mismatch}"[:120] in told.found
    assert "max_tokens" not in told.remedy
    assert "collect.json_schema" in told.remedy
    cannot = make_filters(recipe.curate, lambda _: None)
    assert {cannot[0].judge(c) is None for c in good} == {True}
    assert {f.name for f in cannot if f.judge(bad[0])} == {"schema"}


def test_withheld_answers_are_data(tmp_path: Path):
    with Server(SHORT, Faults(faults=(Withheld(kind="refusal", probability=0.5),))) as server:
        facts, rows = ask(made(server.url, file_of(tmp_path, 25), batch=ROWS), tmp_path / "run")
        assert len(rows) == server.bill.requests == 25
        withheld = [row for row in rows if row.finish_reason == "refusal"]
        assert 0 < len(withheld) == server.bill.faults["refusal"] < 25
        assert facts["money"]["waste"]["refusals"]["count"] == len(withheld)
