"""Progress where nobody watches: a plain line a minute."""

from __future__ import annotations

from limbeck.progress import PlainLine, Progress


def test_a_plain_line_is_written_once_a_minute():
    now, written = [0.0], list[str]()
    line = PlainLine("collect", 1000, "answers", write=written.append, clock=lambda: now[0])
    for second in range(1, 181):
        now[0] = float(second)
        line.advance(2)
        line.note("$0.1000 of $5.00, 8 at once, http 429 ×3")
    assert len(written) == 3
    assert written[0].startswith("collect: 120/1,000 answers, 2 a second, 7 minutes left")
    assert written[2].startswith("collect: 360/1,000 answers, 2 a second, 5 minutes left, $0.1000 of $5.00, 8 at once")


def test_nothing_is_written_where_all_is_over_in_a_minute(capsys):
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
