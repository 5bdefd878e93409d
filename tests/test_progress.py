"""Progress where nobody watches: a plain line after half a minute, then one a minute."""

from __future__ import annotations

import time
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.progress import PlainLine, Progress, TokenCount


def test_a_plain_line_is_written_after_half_a_minute_and_then_once_a_minute():
    now, written = [0.0], list[str]()
    line = PlainLine("collect", 1000, "answers", write=written.append, clock=lambda: now[0])
    for second in range(1, 181):
        now[0] = float(second)
        line.advance(2)
        line.note("$0.1000 of $5.00, 8 at once, http 429 ×3")
    assert len(written) == 3
    assert written[0].startswith("collect: 60/1,000 answers, 2 a second, 8 minutes left")
    assert written[1].startswith("collect: 180/1,000 answers, 2 a second, 7 minutes left")
    assert written[2].startswith("collect: 300/1,000 answers, 2 a second, 6 minutes left, $0.1000 of $5.00, 8 at once")


def test_nothing_is_written_where_all_is_over_soon(capsys):
    with Progress.terminal().line("collect", None, "answers") as line:
        line.advance()
        line.note("a note")
    assert capsys.readouterr().err == ""


def test_a_total_that_is_not_known_gives_no_time_left():
    now, written = [0.0], list[str]()
    line = PlainLine("curate", None, "answers", write=written.append, clock=lambda: now[0])
    now[0] = 61.0
    line.advance(61)
    assert written == ["curate: 61 answers, 1 a second"]


def test_what_is_not_done_yet_has_no_rate_and_says_how_long_it_takes_already():
    now, written = [0.0], list[str]()
    line = PlainLine("prompts", 640, "prompts", write=written.append, clock=lambda: now[0])
    now[0] = 31.0
    line.note("3,812 tokens, 123 a second")
    assert written == ["prompts: 0/640 prompts, 31 s so far, 3,812 tokens, 123 a second"]


def test_lines_are_written_while_the_work_says_nothing_and_not_after_it():
    written, line = list[str](), PlainLine("train", 9, "steps", write=lambda text: written.append(text), every=0.1)
    with line.ticking():
        deadline = time.monotonic() + 20
        while len(written) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(written) >= 3
    assert all(text.startswith("train: 0/9 steps, ") for text in written)
    there = len(written)
    time.sleep(0.25)
    assert len(written) == there


def test_a_log_that_cannot_be_written_is_the_works_error_and_not_the_clocks():
    def broken(text: str) -> None:
        raise BrokenPipeError(text)

    line = PlainLine("train", 9, "steps", write=broken, every=0.02)
    with line.ticking():
        time.sleep(0.2)
        with pytest.raises(BrokenPipeError, match="1/9 steps"):
            line.advance()


class _Noted:
    def __init__(self):
        self.notes = list[str]()

    def advance(self, units: float = 1) -> None:
        raise AssertionError("tokens are no answers")

    def note(self, text: str) -> None:
        self.notes.append(text)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.25, 90.0)), min_size=1, max_size=20))
def test_tokens_are_counted_and_their_rate_is_over_all_the_time(steps: list[tuple[int, float]]):
    now, noted = [0.0], _Noted()
    count = TokenCount(noted, clock=lambda: now[0])
    for tokens, seconds in steps:
        now[0] += seconds
        count(tokens)
    sums = zip(accumulate(n for n, _ in steps), accumulate(s for _, s in steps), strict=True)
    for text, (tokens, seconds) in zip(noted.notes, sums, strict=True):
        shown, rate = (int(part.split()[0].replace(",", "")) for part in text.split(", "))
        assert shown == tokens
        assert abs(rate - tokens / seconds) <= 0.5


def test_tokens_that_come_faster_than_one_reads_are_noted_together():
    now, noted = [0.0], _Noted()
    count = TokenCount(noted, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.01
        count(3)
    assert 40 <= len(noted.notes) <= 51
    assert noted.notes[-1].endswith(" tokens, 300 a second")
