"""What a person sees of collecting: at a terminal, in a log, and afterwards."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
import tiny
import yaml
from asking import ask, file_of, made
from command import call
from hypothesis import example, given
from hypothesis import strategies as st

from limbeck.cli.show import as_text, standing
from limbeck.collect.collect import collect
from limbeck.collect.endpoints.account import by_kind
from limbeck.collect.endpoints.prices import cap_words
from limbeck.collect.journal import Journal
from limbeck.collect.prompts import gather
from limbeck.errors import EndpointError
from limbeck.ledger.canonical import digest_path
from limbeck.ledger.store import Ledger
from limbeck.progress import PlainLine, Progress
from limbeck.rundir import RunDir
from limbeck.testing import (
    Cut,
    Faults,
    Malformed,
    RateLimit,
    Refusal4xx,
    Server,
    ServerError,
    Settings,
    Timeout,
    Truncated,
    Withheld,
)

PRICED = {"price": {"input": 0.5, "output": 2.0}}

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from limbeck.collect.collect import collect
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.rundir import RunDir
collect(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), RunDir(sys.argv[2], Progress.terminal()))
"""


def in_a_terminal(*arguments: str) -> str:
    """What the command writes to a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "160", "LINES": "40", "TERM": "xterm-256color"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert child.wait(30) == 0, written.decode(errors="replace")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode(errors="replace"))


def test_a_terminal_shows_rate_spend_cap_concurrency_errors_and_time_left(tmp_path: Path):
    faults = Faults(
        faults=(ServerError(attempts=1, contains="and 2"), RateLimit(attempts=1, contains="and 3", wait=0.05))
    )
    with Server(Settings(words=20, delay=0.1), faults) as server:
        recipe = made(server.url, file_of(tmp_path, 120), teacher=PRICED, budget={"money": 3.0}, concurrency=4)
        root = tmp_path / "run"
        root.mkdir()
        gather(recipe, RunDir(root))
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        shown = in_a_terminal(str(tmp_path / "recipe.json"), str(root), *sys.path)
        assert server.bill.requests == 120
    assert re.search(r"collect .*\d+/120", shown)
    assert re.search(r"\d answers/s", shown)
    assert re.search(r"\d:\d\d", shown)
    assert re.search(r"\$0\.\d{4} of \$3\.00", shown)
    assert re.search(r"[1-4] at once", shown)
    assert "http 500 ×" in shown
    assert "http 429 ×" in shown


def test_a_log_gets_its_lines_also_while_nothing_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("limbeck.collect.endpoints.asking._TICK", 0.05)
    monkeypatch.setattr(PlainLine.__init__, "__kwdefaults__", PlainLine.__init__.__kwdefaults__ | {"every": 0.2})
    lines = list[tuple[float, str]]()
    with Server(Settings(words=8, delay=1.0)) as server:
        recipe = made(server.url, file_of(tmp_path, 8), teacher=PRICED, budget={"money": 3.0})
        root = tmp_path / "run"
        root.mkdir()
        gather(recipe, RunDir(root))
        began = time.monotonic()
        progress = Progress(None, lambda text: lines.append((time.monotonic() - began, text)))
        collect(recipe, RunDir(root, progress))
    silent = [text for at, text in lines if at < 0.9]
    assert 2 <= len(silent) <= 5
    assert all(text.startswith("collect: 0/8 answers") and "8 at once" in text for text in silent[1:])
    assert all("of $3.00" in text for text in silent)
    assert silent[0] == f"collect: 8 answers of toy at {server.url}/v1, for at most the cap of $3.00"


@given(st.decimals(min_value="0.000000000001", max_value=10**4, places=12))
@example(Decimal(3))
@example(Decimal("0.0002"))
def test_a_cap_is_shown_to_its_last_digit(cap: Decimal):
    """By whoever reads it back; at least cents."""
    shown = cap_words(float(cap))
    assert float(shown.removeprefix("$").replace(",", "")) == float(cap)
    assert re.fullmatch(r"\$[0-9,]+\.(\d\d|\d\d\d*[1-9])", shown)


def test_what_was_wasted_is_summed_by_kind_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("limbeck.collect.endpoints.sending._BACKOFF", 0.02)
    faults = (Cut(when="after_billing", attempts=1, contains="What is 3"), Timeout(attempts=1, contains="What is 4"),
              Truncated(contains="What is 5"), Withheld(kind="refusal", contains="What is 6"),
              Malformed(contains="What is 7"))  # fmt: skip
    with Server(Settings(words=20, idempotency=False), Faults(faults=faults)) as server:
        recipe = made(server.url, file_of(tmp_path, 10), teacher=PRICED)
        root = tmp_path / "run"
        root.mkdir()
        facts, rows = ask(recipe, root)
        assert len(rows) == 10
        (root / "recipe.yaml").write_text(recipe.model_dump_json())
        waste, wasted = facts["money"]["waste"], facts["money"]["wasted"]
        told = {kind: one["count"] for kind, one in waste.items()}
        assert told == {"retries": 1, "time-outs": 1, "truncations": 1, "refusals": 1, "unparsable": 1}
        total = sum(one["dollars_at_most"] for one in waste.values())
        assert total == pytest.approx(facts["money"]["wasted_dollars"], abs=1e-12)
        assert waste == by_kind(wasted)
        # Nobody said what the unparsable answer cost: the journal counts the most, and so does the waste.
        with Journal(root / "journal.db") as journal:
            (unread,) = [row for row in rows if row.finish_reason == "malformed"]
            assert journal.costs([unread.request_id]) == {
                unread.request_id: round(waste["unparsable"]["dollars_at_most"] * 1e12)
            }
        assert waste["unparsable"]["dollars_at_most"] > waste["truncations"]["dollars_at_most"] > 0
        assert facts["money"]["kept_cut_off"] == {"answers": 0, "dollars": 0}
        assert "cut off, refused" in facts["money"]["waste_is"]
        keeping = recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"cut_off": "keep"})})
        (tmp_path / "kept").mkdir()
        for name in ("prompts.parquet", "journal.db"):
            shutil.copy(root / name, tmp_path / "kept" / name)
        kept, _ = ask(keeping, tmp_path / "kept", offline=True)
        assert kept["finish_reasons"]["length"] == 1
        # Another recipe: requests that came to nothing are on the first one's account.
        answers = {kind: waste[kind] for kind in ("refusals", "unparsable")}
        assert kept["money"]["waste"] == answers
        total = sum(one["dollars_at_most"] for one in answers.values())
        assert 0 < kept["money"]["wasted_dollars"] == pytest.approx(total, abs=1e-12)
        assert "cut off are kept" in kept["money"]["waste_is"]
        # Told apart from what was lost, at what it cost.
        assert kept["money"]["kept_cut_off"] == {"answers": 1, "dollars": waste["truncations"]["dollars_at_most"]}
    from datetime import UTC, datetime

    with Ledger(root / "ledger.db") as ledger:
        read = {name: digest_path(root / name) for name in ("prompts.parquet",)}
        wrote = {name: digest_path(root / name) for name in ("completions.parquet",)}
        for stage, inputs, outputs, more in (("prompts", {}, read, {}), ("collect", read, wrote, facts)):
            ledger.append(stage=stage, started=datetime.now(UTC), inputs=inputs, outputs=outputs, recipe=recipe.digest,
                          facts=more, leaves=[])  # fmt: skip
    text = as_text(standing(root), facts=False)
    for kind in ("spent", "wasted: retries", "wasted: time-outs", "wasted: truncations", "wasted: unparsable"):
        assert kind in text
    assert f"{facts['money']['spent_dollars']:.6f}" in text
    assert "cut off, and kept" not in text


QUOTA = Refusal4xx(kind="quota", requests=(5, 999))


@pytest.mark.parametrize(
    ("kind", "fault", "outcome", "told"),
    [
        ("openai", QUOTA, "http 429 (no quota)", "used-up quotas"),
        ("anthropic", QUOTA, "http 400 (no quota)", "used-up quotas"),
        ("openai", RateLimit(wait=7200, requests=(5, 999)), "http 429 (no quota)", "used-up quotas"),
        ("openai", Refusal4xx(kind="unauthorized", requests=(5, 999)), "http 401", "refused requests"),
    ],
)
def test_what_would_fare_the_same_is_not_told_as_a_retry(tmp_path: Path, kind: str, fault, outcome: str, told: str):
    root = tmp_path / "run"
    with Server(Settings(words=8), Faults(faults=(fault,))) as server:
        recipe = made(server.url, file_of(tmp_path, 40), kind=kind, concurrency=2)
        with pytest.raises(EndpointError):
            ask(recipe, root)
    (root / "recipe.yaml").write_text(recipe.model_dump_json())
    collecting = standing(root).collecting
    assert collecting is not None
    assert set(collecting.requests) - {"not sent"} == {"answered", outcome}
    assert list(collecting.waste) == [told]
    assert collecting.waste[told] == {"count": collecting.requests[outcome], "dollars_at_most": 0.0}
    assert f"wasted: {told}" in as_text(standing(root), facts=False)


@pytest.mark.parametrize("priced", [True, False])
def test_a_report_tells_waste_by_kind_and_answers_that_are_kept_apart(tmp_path: Path, priced: bool):
    """Without prices too, then without money."""
    student = str(tiny.save(tmp_path / "student", layers=1))
    faults = (Truncated(contains="What is 5"), Withheld(kind="refusal", contains="What is 6"))
    with Server(Settings(words=20), Faults(faults=faults)) as server:
        recipe = made(server.url, file_of(tmp_path, 12), teacher=PRICED if priced else {})
        values = recipe.model_dump(mode="json")
        values["student"]["model"], values["curate"]["cut_off"] = student, "keep"
        values["evaluate"] = {"held_out": 2, "answers": 0}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        ran = call("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
        assert ran.exit_code == 0, ran.stderr
    shown = call("show", tmp_path / "run").stdout
    report = (tmp_path / "run" / "report.html").read_text()
    assert re.search(rf"wasted: refusals +1 +{r'0.0000[1-9]' if priced else 'unknown'}", shown)
    assert re.search(rf"cut off, and kept +1 +{r'0.0000[1-9]' if priced else 'unknown'}", shown)
    assert ("Wasted, by kind, with US dollars at most: refusals 1 (0.0001)." in report) == priced
    assert ("Wasted, by kind: refusals 1." in report) == (not priced)
    assert "Not wasted: 1 answer that was cut off" in report
    assert "truncations" not in report
