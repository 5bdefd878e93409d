"""Sources of rows: packed files, data sets, templates, and the set of digests that they are told apart by."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from limbeck.collect.digests import DigestSet
from limbeck.collect.files import iter_file_prompts
from limbeck.collect.prompts import gather
from limbeck.errors import PromptError
from limbeck.recipe import DatasetPrompts, FilePrompts, Recipe
from limbeck.records import Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records

ROWS = [{"q": f"What is {n}?", "lang": "Latin" if n % 2 else "Greek", "n": str(n)} for n in range(40)]
TEMPLATE = {"system": "Answer in {{ lang }}.", "prompt": "{{ q }} ({{ n }})"}


def told(source: FilePrompts | DatasetPrompts) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in row.messages] for row in iter_file_prompts(source)]


def source(path: Path, **more) -> FilePrompts:
    return FilePrompts.model_validate({"path": str(path), **more})


def expected() -> list[list[tuple[str, str]]]:
    return [[("system", f"Answer in {r['lang']}."), ("user", f"{r['q']} ({r['n']})")] for r in ROWS]


def problems(made: FilePrompts | DatasetPrompts) -> list[str]:
    with pytest.raises(PromptError) as error:
        list(iter_file_prompts(made))
    assert all(p.where and p.found and p.expected and p.remedy for p in error.value.problems)
    return [str(problem) for problem in error.value.problems]


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    import io

    text = io.StringIO()
    sheet = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    sheet.writeheader()
    sheet.writerows(ROWS)
    return text.getvalue().encode()


def frames(data: bytes) -> bytes:
    """Two frames, cut in the middle of a line."""
    pack = zstandard.ZstdCompressor().compress
    return pack(data[:1001]) + pack(data[1001:])


FORMS = {
    "p.jsonl.gz": gzip.compress(jsonl()),
    "p.jsonl.zst": zstandard.ZstdCompressor().compress(jsonl()),
    "two.ndjson.zst": frames(jsonl()),
    "p.csv.gz": gzip.compress(table(",")),
    "p.tsv": table("\t"),
    "P.TSV.ZST": frames(table("\t")),
}


@pytest.mark.parametrize("name", FORMS)
def test_packed_files_and_tables_give_the_rows_of_their_template(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FORMS[name])
    assert told(source(tmp_path / name, template=TEMPLATE)) == expected()


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst", "two.ndjson.zst"])
@pytest.mark.parametrize("fault", ["cut", "other"])
def test_a_packed_file_that_is_not_whole_is_refused(tmp_path: Path, name: str, fault: str):
    (tmp_path / name).write_bytes(FORMS[name][:-40] if fault == "cut" else jsonl())
    (problem,) = problems(source(tmp_path / name, template=TEMPLATE))
    assert "cut off or damaged" in problem
    assert name in problem


def test_a_packed_parquet_file_is_not_guessed_at(tmp_path: Path):
    (tmp_path / "p.parquet.gz").write_bytes(b"")
    assert "packed inside" in problems(source(tmp_path / "p.parquet.gz"))[0]


@pytest.mark.parametrize("how", ["files", "saved", "dict", "data_files"])
def test_data_sets_in_a_local_directory(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    made, more = tmp_path / "set", {}
    if how == "files":
        made.mkdir()
        (made / "train.jsonl").write_bytes(jsonl())
    elif how == "data_files":
        made.mkdir()
        (made / "other.jsonl").write_text('{"x": 1}\n')
        (made / "these.jsonl").write_bytes(jsonl())
        more = {"data_files": ["these.jsonl"]}
    else:
        rows = datasets.Dataset.from_list(ROWS)
        (rows if how == "saved" else datasets.DatasetDict({"train": rows, "x": rows})).save_to_disk(made)
    found = DatasetPrompts.model_validate({"path": str(made), "template": TEMPLATE, **more})
    assert told(found) == expected()
    assert [row.where for row in iter_file_prompts(found)][:2] == [f"{made}:train: row {n}" for n in (1, 2)]
    if how == "dict":
        assert "splits train, x" in problems(found.model_copy(update={"split": "none"}))[0]
    wrong = DatasetPrompts.model_validate({"path": str(made), "column": "text", **more})
    assert "columns q, lang, n" in problems(wrong)[0]


def test_without_a_hub_a_data_set_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (problem,) = problems(DatasetPrompts(path="nobody/nothing", revision="abc"))
    assert "nobody/nothing@abc:train" in problem
    assert "cannot be reached" in problem
    assert "local directory" in problem


def test_templates_name_the_row_and_the_column(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": "x", "b": null}\n{"a": "y", "b": "z"}\n{"b": "z"}\n')
    first, third = problems(source(path, template={"prompt": "{{ a }} {{ b }}"}))
    assert f"{path}:1" in first
    assert "'b' is null" in first
    assert f"{path}:3" in third
    assert "'a' is undefined" in third
    kind = {"prompt": "{% if b %}{{ b }}{% else %}none{% endif %} {{ a | default('no a') }}"}
    assert [chat[0][1] for chat in told(source(path, template=kind))] == ["none x", "z y", "z no a"]


def test_templates_of_tables_need_their_columns(tmp_path: Path):
    (tmp_path / "p.tsv").write_bytes(table("\t"))
    (problem,) = problems(source(tmp_path / "p.tsv", template={"prompt": "{{ q }} {{ mood }}"}))
    assert "a column mood" in problem
    assert "columns q, lang, n" in problem


def test_chats_by_template(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": ["x", "y"]}\n')
    roles = ["user", "assistant", "user"]
    parts = [{"role": role, "content": f"{{{{ a[{n % 2}] }}}}"} for n, role in enumerate(roles)]
    assert told(source(path, template={"messages": parts})) == [[("user", "x"), ("assistant", "y"), ("user", "x")]]
    assert "ends with a message of assistant" in problems(source(path, template={"messages": parts[:2]}))[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{{ a.__class__.__mro__ }}", "unsafe"),
        ("{{ a.append(1) }}", "unsafe"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{{ a / 0 }}", "TypeError"),
    ],
)
def test_templates_run_in_a_sandbox(tmp_path: Path, text: str, found: str):
    (tmp_path / "p.jsonl").write_text('{"a": []}\n')
    assert found in problems(source(tmp_path / "p.jsonl", template={"prompt": text}))[0]


def test_a_template_that_is_none_is_found_before_a_row_is_read(tmp_path: Path):
    made = source(tmp_path / "nowhere.jsonl", template={"prompt": "{{ a", "system": "{% if %}"})
    assert len(problems(made)) == 2


class Sets(RuleBasedStateMachine):
    """`DigestSet` beside Python's own set."""

    digests = Bundle("digests")

    def __init__(self):
        super().__init__()
        self.ours, self.theirs = DigestSet(), set[str]()

    @rule(target=digests, text=st.binary(max_size=2))
    def make(self, text: bytes) -> str:
        return f"sha256:{hashlib.sha256(text).hexdigest()}"

    @rule(digest=digests)
    def add(self, digest: str):
        self.ours.add(digest)
        self.theirs.add(digest)

    @rule(start=st.integers(0, 5), count=st.integers(1, 1500))
    def add_many(self, start: int, count: int):
        for n in range(start, start + count):
            self.add(f"sha256:{hashlib.sha256(n.to_bytes(2)).hexdigest()}")

    @rule(digest=digests)
    def remove(self, digest: str):
        self.ours.discard(digest)
        self.theirs.discard(digest)

    @rule(count=st.integers(1, 1500))
    def remove_many(self, count: int):
        for digest in sorted(self.theirs)[:count]:
            self.remove(digest)

    @rule(digest=digests)
    def compare(self, digest: str):
        assert (digest in self.ours) == (digest in self.theirs)
        assert len(self.ours) == len(self.theirs)
        assert sorted(self.ours) == sorted(self.theirs)


TestSets = Sets.TestCase
TestSets.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@given(st.lists(st.integers(1, 2**32), min_size=6, max_size=40, unique=True), st.data())
def test_what_begins_alike_is_told_apart(numbers: list[int], data: st.DataObject):
    """And a text that is no digest is refused."""
    alike = [f"sha256:{'00' * 8}{n:048x}" for n in numbers]
    gone = data.draw(st.sets(st.sampled_from(alike)))
    made = DigestSet()
    for digest in alike:
        made.add(digest)
    for digest in gone:
        made.discard(digest)
    assert [digest in made for digest in alike] == [digest not in gone for digest in alike]
    with pytest.raises(ValueError, match="not a SHA-256 digest"):
        made.add("sha256:00")


def test_a_data_set_becomes_prompts_beside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets.Dataset.from_list(ROWS[20:]).save_to_disk(tmp_path / "set")
    (tmp_path / "p.tsv").write_bytes(table("\t"))
    made = Recipe.model_validate({
        "name": "t", "teacher": {"model": "/nowhere"}, "student": {"kind": "pruned", "layers": 1},
        "prompts": [
            {"kind": "dataset", "path": str(tmp_path / "set"), "column": "q", "licence": "MIT"},
            {"kind": "file", "path": str(tmp_path / "p.tsv"), "column": "q", "licence": "CC0-1.0", "limit": 30},
        ],
        "evaluate": {"held_out": 2},
    })  # fmt: skip
    gather(made, RunDir(tmp_path))
    rows = list(read_records(tmp_path / "prompts.parquet", Prompt))
    assert [r.messages[0].content for r in rows] == [f"What is {n}?" for n in (*range(20, 40), *range(20))]
    assert [r.licence for r in rows] == ["MIT"] * 20 + ["CC0-1.0"] * 20
    assert rows[0].source == f"{tmp_path / 'set'}:train"
