"""Laws of the curate stage: every completion gets one verdict, in order, by the first filter that drops
it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.curate import filters
from limbeck.curate.curate import curate, judge
from limbeck.curate.filters import FILTERS, STOPPED, CutOff, Duplicate, Empty, make_filters
from limbeck.curate.loops import find_loop
from limbeck.errors import InputError
from limbeck.recipe import Curate, Recipe
from limbeck.records import Completion, Message, Prompt, Split, Verdict
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records

law = settings(deadline=None, derandomize=True)
DIGEST = "sha256:" + "0" * 64


def answer(
    text: str,
    *,
    prompt: str = "Why?",
    sample: int = 0,
    finish: str = "stop",
    split: Split = Split.TRAIN,
    teacher: str = "t",
) -> Completion:
    messages = (Message(role="user", content=prompt),)
    return Completion(
        prompt_id=Prompt.id_of(messages),
        sample=sample,
        messages=messages,
        text=text,
        reasoning=None,
        finish_reason=finish,
        model=teacher,
        teacher=teacher,
        provider="self-hosted",
        route="self-hosted",
        weights=None,
        terms="own-model",
        prompt_tokens=1,
        completion_tokens=len(text.split()),
        created=datetime(2026, 1, 1, tzinfo=UTC),
        request_id=DIGEST,
        response=DIGEST,
        split=split,
    )


def recipe(**settings: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": {"model": "t"},
            "prompts": [{"kind": "self-prompt", "count": 1}],
            "student": {"kind": "pruned", "layers": 1},
            "curate": settings,
        }
    )


# ----------------------------------------------------------------------------------------------------- loops

LOOPS = {
    "sentence": "To bake bread you need flour. " + "Mix the flour with the water and the yeast. " * 5,
    "cut in the middle of a turn": "Sure! " + "The dog is a very good dog. " * 7 + "The dog is a ve",
    "one phrase": "The list" + " of the list" * 42 + " of the",
    "two lines in turn": "The original paragraph:\n\n"
    + "The revised paragraph is:\n\nThe original paragraph is:\n\n" * 6,
    "short sentence": "The cat sat. " * 9,
    "paragraph": "I'm so glad.\n\n" + "We will meet at noon, and then we will go to the lake.\n\n" * 5,
    "three long turns": "Here is the plan. "
    + "First we go to the market and buy some apples, then we walk home along the river. " * 3,
    "numbered list of one sentence": "\n".join(
        f"{i}. The student should be able to read and write." for i in range(1, 14)
    ),
    "bullets of one sentence": "Here are some tips:\n" + "- Try to eat more vegetables and fruit.\n" * 9,
    "left again": "A story about a dog. "
    + "The dog ran to the park and saw a cat sitting there. " * 6
    + "In the end they were happy.",
    "Chinese, no spaces": "中国的首都是北京。" + "北京是中国的首都。" * 6,
    "Japanese, no spaces": "私はリンゴが好きです。" * 6,
    "Korean": "저는 사과를 좋아합니다. " * 6,
    "Thai, no spaces": "ฉันชอบกินข้าว" * 8,
    "Hindi": "मुझे सेब पसंद है। " * 7,
    "Russian": "Собака бежит по улице. " * 6,
    "one token for ever": "The answer is" + " the" * 100,
    "exclamation marks for ever": "Great" + "!" * 500,
    "code": "def f(x):\n" + "    x = x + 1\n    return x\n" * 12,
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_dropped(text: str) -> None:
    assert find_loop(text)


DAYS = ("a partridge in a pear tree", "two turtle doves", "three French hens", "four calling birds")
DAYS += ("five gold rings", "six geese a-laying", "seven swans a-swimming", "eight maids a-milking")
CHORUS = (
    "We all live by the silver sea,\nwhere the wind is wild and the gulls are free,\n"
    "and the boats come home when the day is done,\nto the harbour lights and the setting sun.\n"
)

KEPT = {
    "empty": "",
    "one word": "Yes.",
    "multiplication table": "\n".join(f"7 x {i} = {7 * i}" for i in range(1, 21)),
    "numbered multiplication table": "\n".join(f"{i}. 7 times {i} is {7 * i}." for i in range(1, 21)),
    "markdown truth table": "| a | b | a and b |\n|---|---|---|\n"
    + "\n".join(f"| {a} | {b} | {a & b} |" for a in (0, 1) for b in (0, 1)),
    "labels of a list, all the same": "\n".join(f"{i}. True" for i in range(1, 31)),
    "numbers that are all prime": "\n".join(f"{i}: prime" for i in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)),
    "verses with a chorus": CHORUS.join(
        (
            "In the morning the nets are cast from the bow\nand the captain looks at the clouds somehow.\n",
            "My father sailed when the fish were near,\nmy mother waited upon the pier.\n",
            "Now I am old and my hands are slow,\nbut still I dream of the undertow.\n",
            "",
        )
    ),
    "a song that grows": "\n\n".join(
        f"On day {i} of Christmas my true love sent to me\n" + ",\n".join(reversed(DAYS[:i])) for i in range(1, 9)
    ),
    "counting down": "\n".join(
        f"{n} bottles of beer on the wall, {n} bottles of beer.\n"
        f"Take one down and pass it around, {n - 1} bottles of beer on the wall."
        for n in range(99, 80, -1)
    ),
    "a board of zeros": "board = [\n" + "    [0, 0, 0, 0, 0, 0, 0, 0, 0],\n" * 9 + "]\n",
    "an HTML list": "<ul>\n" + "".join(f'  <li><a href="/item/{i}">Item {i}</a></li>\n' for i in range(12)) + "</ul>",
    "JSON with empty fields": "[\n"
    + ",\n".join(f'  {{"id": {i}, "name": "", "email": null, "active": true}}' for i in range(8))
    + "\n]",
    "a ruled line": "Title\n" + "=" * 80,
    "laughter": "Ha" * 50,
    "a googol": "1" + "0" * 100,
    "lines that begin alike": "\n".join(
        f"{i}. I would like to visit {place} because of its {what}."
        for i, (place, what) in enumerate(
            [
                ("Rome", "ruins"),
                ("Paris", "museums"),
                ("Oslo", "fjords"),
                ("Cairo", "river"),
                ("Lima", "food"),
            ],
            1,
        )
    ),
    "getters": "\n\n".join(
        f"    @property\n    def {name}(self) -> int:\n        return self._{name}"
        for name in ("width", "height", "depth", "weight", "price", "stock")
    ),
    "Chinese list": "我喜欢吃苹果。我喜欢看电影。我喜欢听音乐。"
    + "我喜欢去公园散步。我喜欢和朋友聊天。我喜欢学习新的语言。",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_what_repeats_for_a_reason_is_kept(text: str) -> None:
    assert find_loop(text) is None


def test_this_file_and_its_subject_are_no_loops() -> None:
    for path in (__file__, filters.__file__):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        assert all(find_loop(text[i : i + 1200]) is None for i in range(0, len(text), 1200))


@law
@given(
    unit=st.text(st.characters(categories=("Ll", "Lu"), max_codepoint=0x24F), min_size=12, max_size=80),
    times=st.integers(6, 12),
    before=st.text(st.characters(categories=("Ll", "Zs"), max_codepoint=0x7F), max_size=60),
    cut=st.integers(0, 11),
)
def test_any_sentence_six_times_at_the_end_is_a_loop(unit: str, times: int, before: str, cut: int) -> None:
    text = before + (unit + ". ") * times
    assert find_loop(text[: len(text) - cut])


@law
@given(st.text(max_size=300))
def test_short_text_without_a_long_repeat_is_kept(text: str) -> None:
    # An independent look: without any piece of 15 characters that comes twice, there can be no loop of 60.
    plain = " ".join(text.split())
    pieces = [plain[i : i + 5] for i in range(len(plain) - 4)]
    if len(set(pieces)) == len(pieces):
        assert find_loop(text) is None


# --------------------------------------------------------------------------------------------- other filters


def test_empty_counts_characters_without_white_space_at_the_ends() -> None:
    assert Empty(1).judge(answer(" \n\t\u3000")) is not None
    assert Empty(1).judge(answer(" 4 ")) is None
    reason = Empty(5).judge(answer("four"))
    assert reason is not None
    assert "4" in reason
    assert "5" in reason


def test_what_the_teacher_did_not_end_itself_is_cut_off() -> None:
    assert all(CutOff().judge(answer("x", finish=reason)) is None for reason in STOPPED)
    for other in ("length", "max_tokens", "content_filter", "tool_calls", ""):
        reason = CutOff().judge(answer("x", finish=other))
        assert reason is not None
        assert repr(other) in reason


LONG = "An answer that is long enough to be boilerplate when two different prompts get it."


def test_equal_texts_to_one_prompt_are_duplicates_whatever_their_length() -> None:
    each = Duplicate()
    assert each.judge(answer("Yes.")) is None
    assert each.judge(answer("Yes.", sample=1)) is not None
    assert each.judge(answer(" Yes.\n", sample=2, teacher="other")) is not None


def test_short_equal_texts_to_different_prompts_are_no_duplicates_and_long_ones_are() -> None:
    each = Duplicate()
    assert each.judge(answer("Yes.", prompt="Is water wet?")) is None
    assert each.judge(answer("Yes.", prompt="Is fire hot?")) is None
    assert len(LONG) >= Duplicate.LENGTH
    assert each.judge(answer(LONG, prompt="Is water wet?")) is None
    assert each.judge(answer(LONG, prompt="Is fire hot?", split=Split.HELD_OUT)) is not None
    assert each.judge(answer(LONG[: Duplicate.LENGTH - 1], prompt="Is ice cold?")) is None
    assert each.judge(answer(LONG[: Duplicate.LENGTH - 1], prompt="Is snow white?")) is None


@law
@given(st.text(min_size=1))
def test_equality_is_after_unicode_and_white_space_normalisation(text: str) -> None:
    each = Duplicate()
    assert each.judge(answer(text)) is None
    assert each.judge(answer("  " + unicodedata.normalize("NFD", text).replace(" ", "\n\t"), sample=1)) is not None


# -------------------------------------------------------------------------------------------------- the fold


def test_the_first_filter_that_drops_names_itself() -> None:
    made = make_filters(Curate())
    loop = answer("The cat sat on the mat. " * 9, finish="length")
    assert judge(loop, made).filter == "loop"
    assert judge(answer("", finish="length"), made).filter == "empty"
    assert judge(answer("Well, it", finish="length"), made).filter == "cut_off"
    assert judge(answer("Well, it"), made) == Verdict(*key(answer("Well, it")), True, "", "")
    assert judge(answer("Well, it", sample=1), made).filter == "duplicate"


def key(completion: Completion) -> tuple[str, int, str, str]:
    return completion.prompt_id, completion.sample, completion.teacher, completion.id


def test_every_filter_can_be_switched_off() -> None:
    assert make_filters(Curate(min_characters=0, loops=False, cut_off="keep", duplicates=False)) == ()
    assert [f.name for f in make_filters(Curate())] == ["empty", "loop", "cut_off", "duplicate"]


texts = st.sampled_from(["", "Yes.", "Yes.  ", LONG, LONG + "\n", "The cat sat on the mat. " * 9, "Ähm", "Äh\u0308m"])


@law
@given(st.lists(st.tuples(texts, st.sampled_from(["a", "b", "c"]), st.sampled_from(["stop", "length"])), max_size=25))
def test_laws_of_the_fold(rows: list[tuple[str, str, str]]) -> None:
    answers = [answer(t, prompt=p, finish=f, sample=i) for i, (t, p, f) in enumerate(rows)]
    made = make_filters(Curate())
    verdicts = [judge(each, made) for each in answers]
    assert [v[:4] for v in verdicts] == [key(each) for each in answers]
    assert all(v.keep == (v.filter == "") == (v.reason == "") for v in verdicts)
    kept = [each for each, v in zip(answers, verdicts, strict=True) if v.keep]
    # Judging what was kept once more drops nothing.
    again = make_filters(Curate())
    assert all(judge(each, again).keep for each in kept)
    # A duplicate always has its twin among the kept.
    twins = {" ".join(unicodedata.normalize("NFC", each.text).split()) for each in kept}
    for each, verdict in zip(answers, verdicts, strict=True):
        if verdict.filter == "duplicate":
            assert " ".join(unicodedata.normalize("NFC", each.text).split()) in twins


# ------------------------------------------------------------------------------------------------- the stage


def test_the_stage_writes_one_verdict_for_each_completion_in_order(tmp_path) -> None:
    answers = [
        answer("Because."),
        answer("Because.", sample=1),
        answer("", prompt="Who?"),
        answer("It was", prompt="Who else?", finish="length"),
        answer("Me.", prompt="Who then?", split=Split.HELD_OUT, teacher="u"),
    ]
    write_records(tmp_path / "completions.parquet", answers, Completion)
    facts = curate(recipe(), RunDir(tmp_path))
    verdicts = list(read_records(tmp_path / "verdicts.parquet", Verdict))
    assert [v[:4] for v in verdicts] == [key(each) for each in answers]
    assert [v.filter for v in verdicts] == ["", "duplicate", "empty", "cut_off", ""]
    assert facts == {
        "completions": 5,
        "kept": 2,
        "kept_by_split": {"train": 1, "held_out": 1},
        "kept_by_teacher": {"t": 1, "u": 1},
        "dropped": {"empty": 1, "loop": 0, "cut_off": 1, "duplicate": 1},
    }
    before = (tmp_path / "verdicts.parquet").read_bytes()
    assert curate(recipe(), RunDir(tmp_path)) == facts
    assert (tmp_path / "verdicts.parquet").read_bytes() == before


def test_nothing_kept_is_an_error_that_says_what_to_loosen_and_leaves_nothing(tmp_path) -> None:
    answers = [answer("It was", sample=i, finish="length") for i in range(3)] + [answer("", sample=3)]
    write_records(tmp_path / "completions.parquet", answers, Completion)
    with pytest.raises(InputError) as caught:
        curate(recipe(duplicates=False), RunDir(tmp_path))
    text = str(caught.value)
    assert "split train" in text
    assert "0 of 4" in text
    assert "cut_off 3, empty 1" in text
    assert "raise collect.max_tokens, or set curate.cut_off to keep; or lower curate.min_characters" in text
    assert "split held_out" in text
    assert "no answers to prompts of this split" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["completions.parquet"]


def test_one_line_in_the_tuple_adds_a_filter(tmp_path, monkeypatch) -> None:
    @dataclass(frozen=True)
    class NoShouting:
        name: ClassVar[str] = "shouting"
        loosen: ClassVar[str] = "ask more quietly"

        def judge(self, completion: Completion) -> str | None:
            return "all capitals" if completion.text.isupper() else None

    monkeypatch.setattr(filters, "FILTERS", (lambda settings: NoShouting(), *FILTERS))
    rows = [answer("WHY NOT"), answer("Why not", sample=1), answer("So", prompt="b", split=Split.HELD_OUT)]
    write_records(tmp_path / "completions.parquet", rows, Completion)
    facts = curate(recipe(), RunDir(tmp_path))
    assert facts["dropped"] == {"shouting": 1, "empty": 0, "loop": 0, "cut_off": 0, "duplicate": 0}
    assert [v.filter for v in read_records(tmp_path / "verdicts.parquet", Verdict)] == ["shouting", "", ""]
    write_records(tmp_path / "completions.parquet", rows[:1] + rows[2:], Completion)
    with pytest.raises(InputError, match="ask more quietly"):
        curate(recipe(), RunDir(tmp_path))
