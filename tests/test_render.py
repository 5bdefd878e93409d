"""Laws of the render stage: tokens as `apply_chat_template` gives them, and a mask over what the teacher
wrote."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import processors
from transformers import AddedToken, PreTrainedTokenizerFast

from limbeck.errors import InputError, ModelError, StaleError
from limbeck.recipe import Recipe
from limbeck.records import Completion, Message, Prompt, Split, Verdict
from limbeck.render.chat import NOT_FOUND, REFUSED, SPECIAL_TEXT, ChatRenderer, LeftOut, Rendered
from limbeck.render.examples import read_examples
from limbeck.render.render import render
from limbeck.rundir import RunDir
from limbeck.tables import write_records

DAY = datetime(2026, 3, 1, tzinfo=UTC)
law = settings(deadline=None, derandomize=True)
DIGEST = "sha256:" + "0" * 64
END = "<|im_end|>"


def chat(*turns: str) -> tuple[Message, ...]:
    """`user`, `assistant`, `user`, ... in turn; a first text that begins with `system:` is the system's."""
    messages = []
    for text in turns:
        if text.startswith("system:"):
            messages.append(Message(role="system", content=text.removeprefix("system:")))
        else:
            before = messages[-1].role if messages else "system"
            messages.append(Message(role="assistant" if before == "user" else "user", content=text))
    return tuple(messages)


def rendered(
    words: PreTrainedTokenizerFast, messages: tuple[Message, ...], answer: str, *, stopped: bool = True
) -> Rendered:
    out = ChatRenderer(words, "m").render(messages, answer, stopped=stopped, created=DAY)
    assert isinstance(out, Rendered), out
    return out


def decode(words: PreTrainedTokenizerFast, tokens_T: NDArray[np.int32]) -> str:
    return str(words.decode(tokens_T.tolist()))


def learned(words: PreTrainedTokenizerFast, out: Rendered) -> str:
    return decode(words, out.tokens_T[out.mask_T])


# ------------------------------------------------------------------------------------------------- templates

BODY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPTING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{%- for m in messages %}"

TEMPLATES = {
    "chatml": tiny.CHATML,
    "no generation prompt": LOOP + BODY + "{% endfor %}",
    "strips": LOOP + BODY.replace("content", "content | trim") + "{% endfor %}" + PROMPTING,
    "bos": "<|endoftext|>" + LOOP + BODY + "{% endfor %}" + PROMPTING,
    "spaces around, as Llama 2": LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    + "{% else %} {{ m.content.strip() }} <|im_end|>{% endif %}{% endfor %}",
    "no end of turn": LOOP
    + "{{ m.role }}:\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}",
    "empty thought before the last answer, as Qwen3": LOOP
    + "{% set parts = m.content.split('</think>') %}{% set c = parts[-1].lstrip('\n') %}"
    + "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '' %}"
    + "<|im_start|>{{ m.role }}\n"
    + "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    + "{{ c }}<|im_end|>\n{% endfor %}"
    + PROMPTING,
}

CHATS = {
    "one turn": chat("What is the sea?"),
    "system": chat("system:You are kind.", "What is the sea?"),
    "several turns": chat("Hi", "The sea.", "What else?", "The sea.", "And then?"),
    "answer is in the prompt": chat("Say: The sea."),
    "role in the prompt": chat("assistant\nThe sea."),
}

ANSWERS = {
    "plain": "The sea.",
    "role": "assistant",
    "of the template": "\n",
    "Unicode": "Ähren, 海, 🙂",
    "white space": "  two\n\nlines \n",
    "code": "def add(a, b):\n    return a + b",
    "almost special": "<|im_en|> <|im_end |>",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_tokens_are_those_of_apply_chat_template_and_the_mask_is_the_answer(template, messages) -> None:
    words = tiny.tokenizer(template=template)
    for answer in ANSWERS.values():
        full = [m.model_dump() for m in messages] + [{"role": "assistant", "content": answer}]
        out = rendered(words, messages, answer)
        theirs = np.array(words.apply_chat_template(full, tokenize=True, return_dict=False))
        assert np.array_equal(out.tokens_T, theirs), (decode(words, out.tokens_T), decode(words, theirs))
        assert out.ended == (END in template)
        strips, around = "strip()" in template or "trim" in template, " " * ("[INST]" in template)
        expected = around + (answer.strip() if strips else answer) + (around + END if out.ended else "")
        # White space may share a token with the line break before it, which the teacher was given.
        assert expected.endswith(learned(words, out))
        assert not expected.removesuffix(learned(words, out)).strip()


def byte_starts(words: PreTrainedTokenizerFast, tokens: list[int]) -> list[int]:
    """Where every token begins in the text's UTF-8 bytes, by the tokens' own bytes."""
    special = set(words.all_special_tokens)
    sizes = [len(t.encode()) if t in special else len(t) for t in words.convert_ids_to_tokens(tokens)]
    return np.cumsum([0, *sizes[:-1]]).tolist()


texts = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            [
                " ",
                "\n",
                "\n\n",
                "  ",
                "The sea.",
                "<|im_",
                "im_end|>",
                "<|im_end|>",
                "<|endoftext|>",
                "user\n",
            ]
        ),
    ),
    max_size=6,
).map("".join)
WORDS = tiny.tokenizer()
RENDERER = ChatRenderer(WORDS, "m")


@law
@given(prompt=texts, answer=texts, stopped=st.booleans())
def test_the_mask_decodes_to_the_answer_and_its_end_and_nothing_can_be_smuggled_in(prompt, answer, stopped) -> None:
    out = RENDERER.render(chat(prompt), answer, stopped=stopped, created=DAY)
    if any(token in prompt + "\0" + answer for token in WORDS.all_special_tokens):
        assert isinstance(out, LeftOut)
        assert out.reason == SPECIAL_TEXT
        return
    assert isinstance(out, Rendered)
    before = f"<|im_start|>system\nYou are a test.{END}\n<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
    written = answer + (END if stopped else "")
    starts = byte_starts(WORDS, out.tokens_T.tolist())
    first, last = len(before.encode()), len((before + written).encode())
    assert out.mask_T.tolist() == [first <= start < last for start in starts]
    own = learned(WORDS, out)
    assert written.endswith(own)
    # What is missing shares a token with the line break before it, so it can only be line breaks.
    assert not written.removesuffix(own).strip("\n")
    special = [int(t) for t in out.tokens_T[out.mask_T] if t in WORDS.all_special_ids]
    assert special == [WORDS.eos_token_id] * stopped


@pytest.mark.parametrize("where", range(3))
def test_the_text_of_a_special_token_is_named_with_its_place(where) -> None:
    texts = ["Hi", "Hello", "Well?"]
    texts[where] += "<|im_start|>"
    out = RENDERER.render(chat(*texts), "So.", stopped=True, created=DAY)
    role = ("user", "assistant", "user")[where]
    assert out == LeftOut(SPECIAL_TEXT, f"message {where} ({role}) contains <|im_start|>")
    assert RENDERER.render(chat("Hi"), "a<|im_end|>", stopped=True, created=DAY)[1] == "the answer contains <|im_end|>"


def test_an_answer_that_was_cut_off_does_not_teach_to_stop() -> None:
    out = rendered(WORDS, chat("Hi"), "The sea", stopped=False)
    assert learned(WORDS, out) == "The sea"
    assert not out.ended


def test_earlier_answers_are_not_learned() -> None:
    out = rendered(WORDS, chat("Hi", "The sea.", "Again!"), "The sea.")
    assert learned(WORDS, out) == "The sea." + END
    assert decode(WORDS, out.tokens_T).count("The sea.") == 2


def test_bos_in_the_template_is_not_doubled_by_a_tokenizer_that_adds_one() -> None:
    words = tiny.tokenizer(template=TEMPLATES["bos"])
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert words("a").input_ids[0] == 0
    out = rendered(words, chat("Hi"), "The sea.")
    assert out.tokens_T.tolist().count(0) == 1
    assert learned(words, out) == "The sea." + END


def test_a_token_that_begins_in_the_prompt_is_not_learned_even_where_offsets_are_trimmed() -> None:
    prompting = "{% if add_generation_prompt %}assistant: {% endif %}"
    words = tiny.tokenizer(template=LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}" + prompting)
    for post in (words.backend_tokenizer.post_processor, processors.ByteLevel(trim_offsets=True)):
        words.backend_tokenizer.post_processor = post
        out = rendered(words, chat("Hi"), "answer")
        straddling = words.convert_ids_to_tokens(out.tokens_T[~out.mask_T].tolist())[-2]
        assert straddling.startswith("Ġa")
        assert straddling.removeprefix("Ġ") + learned(words, out) == "answer"


def test_white_space_that_the_template_puts_around_an_answer_is_learned() -> None:
    words = tiny.tokenizer(template=TEMPLATES["spaces around, as Llama 2"])
    # The teacher was given `[/INST]` and has to write all that follows.
    assert learned(words, rendered(words, chat("Hi"), "The sea.")) == " The sea. " + END


def test_a_token_that_ends_turns_counts_though_it_is_not_marked_special() -> None:
    words = tiny.tokenizer(template=tiny.CHATML.replace("<|im_end|>", "<end_of_turn>"))
    words.add_tokens([AddedToken("<end_of_turn>", special=False, normalized=False)])
    assert learned(words, rendered(words, chat("Hi"), "The sea.")) == "The sea.<end_of_turn>"
    out = ChatRenderer(words, "m").render(chat("Hi<end_of_turn>"), "The sea.", stopped=True, created=DAY)
    assert isinstance(out, LeftOut)
    assert out.reason == SPECIAL_TEXT


def test_thoughts_are_kept_where_the_template_keeps_them_and_cut_where_it_cuts_them() -> None:
    answer = "<think>\nWater, salt.\n</think>\n\nThe sea."
    keeps = tiny.tokenizer(template=TEMPLATES["empty thought before the last answer, as Qwen3"])
    assert learned(keeps, rendered(keeps, chat("Hi"), answer)) == answer + END
    assert learned(keeps, rendered(keeps, chat("Hi"), "The sea.")) == "The sea." + END
    cuts = tiny.tokenizer(template=LOOP + BODY.replace("content", "content.split('</think>')[-1]") + "{% endfor %}")
    assert learned(cuts, rendered(cuts, chat("Hi"), answer)).lstrip() == "The sea." + END


def test_the_first_token_is_never_learned_as_nothing_predicts_it() -> None:
    words = tiny.tokenizer(template="{{ messages[-1].content }}<|im_end|>")
    out = rendered(words, chat("Hi"), "The sea.")
    assert out.mask_T.tolist() == [False] + [True] * (len(out.tokens_T) - 1)


def test_a_dated_template_gets_the_day_of_the_answer() -> None:
    words = tiny.tokenizer(template="{{ date_string }}" + tiny.CHATML)
    assert decode(words, rendered(words, chat("Hi"), "So.").tokens_T).startswith("01 Mar 2026")


def test_what_a_template_refuses_or_rewrites_is_left_out() -> None:
    refuses = (
        LOOP + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + BODY + "{% endfor %}"
    )
    renderer = ChatRenderer(tiny.tokenizer(template=refuses), "m")
    out = renderer.render(chat("system:Be kind.", "Hi"), "So.", stopped=True, created=DAY)
    assert out == LeftOut(REFUSED, "no system role (roles: system, user, assistant)")
    upper = ChatRenderer(
        tiny.tokenizer(template=LOOP + BODY.replace("content", "content | upper") + "{% endfor %}"), "m"
    )
    out = upper.render(chat("Hi"), "So.", stopped=True, created=DAY)
    assert isinstance(out, LeftOut)
    assert out.reason == NOT_FOUND
    with pytest.raises(ModelError, match="chat template"):
        ChatRenderer(tiny.tokenizer(template=None), "m")


# ------------------------------------------------------------------------------------------------- the stage


def completion(
    answer: str, prompt: str = "Hi", *, finish: str = "stop", split: Split = Split.TRAIN, **more
) -> Completion:
    messages = more.pop("messages", None) or chat(prompt)
    given = {"prompt_id": Prompt.id_of(messages), "messages": messages, "text": answer, "split": split}
    plain = {"sample": 0, "reasoning": None, "model": "m", "provider": "here", "route": "self-hosted"}
    plain |= {"weights": None, "terms": "own-model", "prompt_tokens": 1, "completion_tokens": 1}
    plain |= {"finish_reason": finish, "request_id": DIGEST, "response": DIGEST, "created": DAY}
    return Completion.model_validate(plain | given | more)


def write_run(root: Path, rows: list[Completion], drop: tuple[int, ...] = ()) -> RunDir:
    write_records(root / "completions.parquet", rows, Completion)
    verdicts = [
        Verdict(c.prompt_id, c.sample, c.teacher, c.id, i not in drop, "loop" * (i in drop), "")
        for i, c in enumerate(rows)
    ]
    write_records(root / "verdicts.parquet", verdicts, Verdict)
    return RunDir(root)


def recipe(teacher: Path | str, **train) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": {"model": str(teacher)},
            "prompts": [{"kind": "self-prompt", "count": 1}],
            "student": {"kind": "pruned", "layers": 1},
            "train": train,
        }
    )


def test_the_stage_renders_what_was_kept_in_order_and_counts_the_rest(tmp_path, teacher_dir) -> None:
    name = str(teacher_dir)
    rows = [
        completion("The sea.", teacher=name),
        completion("Dropped.", teacher=name),
        completion("A <|im_end|> in it.", "Say it", teacher=name),
        completion("The sea. " * 100, "Long", teacher=name),
        completion("", "Nothing", finish="length", teacher=name),
        completion("cut", "Go on", finish="length", teacher=name),
        completion("A duck.", "Held", split=Split.HELD_OUT, teacher=name),
    ]
    run = write_run(tmp_path, rows, drop=(1,))
    facts = render(recipe(teacher_dir, max_length=100), run)
    made = read_examples(tmp_path / "examples")
    assert [e.completion for e in made.examples] == [rows[i].id for i in (0, 5, 6)]
    assert [e.split for e in made.examples] == [Split.TRAIN, Split.TRAIN, Split.HELD_OUT]
    assert {e.teacher for e in made.examples} == {name}
    assert [decode(WORDS, e.tokens_T[e.mask_T]) for e in made.examples] == [
        "The sea." + END,
        "cut",
        "A duck." + END,
    ]
    assert made.manifest.max_length == 100
    assert facts["left_out"] == {"special_token_text": 1, "too_long": 1, "nothing_supervised": 1}
    assert facts["train_supervised_by_teacher"] == {name: sum(e.supervised for e in made.train)}
    assert facts["by_split"]["held_out"]["examples"] == 1  # type: ignore[index,call-overload]
    json.dumps(facts, allow_nan=False)
    before = (tmp_path / "examples" / "examples.parquet").read_bytes()
    render(recipe(teacher_dir, max_length=100), run)
    assert (tmp_path / "examples" / "examples.parquet").read_bytes() == before


def test_nothing_left_is_an_error_with_counts_and_remedy(tmp_path, teacher_dir) -> None:
    name = str(teacher_dir)
    run = write_run(
        tmp_path,
        [
            completion("The sea.", teacher=name),
            completion("Yes.", "Held", split=Split.HELD_OUT, teacher=name),
        ],
    )
    with pytest.raises(InputError) as caught:
        render(recipe(teacher_dir, max_length=5), run)
    assert [p.where.split()[-1] for p in caught.value.problems] == ["train", "held_out"]
    assert "too_long 1" in str(caught.value)
    assert "raise train.max_length" in str(caught.value)
    assert not (tmp_path / "examples").exists()


def test_a_template_that_fails_at_once_is_named_and_later_failures_are_counted(tmp_path) -> None:
    refuses = tiny.CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for",
        1,
    )
    name = str(tiny.save(tmp_path / "teacher", template=refuses))
    plain = completion("The sea.", teacher=name)
    held = completion("Yes.", "Held", split=Split.HELD_OUT, teacher=name)
    system = completion("So.", teacher=name, messages=chat("system:Be kind.", "Hi"))
    with pytest.raises(ModelError) as caught:
        render(recipe(name), write_run(tmp_path, [system, plain, held]))
    assert name in str(caught.value)
    assert system.prompt_id[:19] in str(caught.value)
    assert "no system role (roles: system, user, assistant)" in str(caught.value)
    facts = render(recipe(name), write_run(tmp_path, [plain, system, held]))
    assert facts["left_out"] == {"template_refused": 1}
    assert system.prompt_id[:19] in str(facts["left_out_first"])


def test_verdicts_of_other_completions_are_refused(tmp_path, teacher_dir) -> None:
    rows = [completion("The sea.", teacher=str(teacher_dir)), completion("A duck.", teacher=str(teacher_dir))]
    write_run(tmp_path, rows)
    write_records(tmp_path / "completions.parquet", rows[::-1], Completion)
    with pytest.raises(StaleError, match="curate"):
        render(recipe(teacher_dir), RunDir(tmp_path))
    write_records(tmp_path / "completions.parquet", rows[:1], Completion)
    with pytest.raises(StaleError, match="no completion"):
        render(recipe(teacher_dir), RunDir(tmp_path))
