"""What the documents show works: every command is run, every recipe loads, every generated page is current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import prompt_file, recipe_dict
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.recipe import Recipe
from limbeck.recipe_file import schema_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")] if p.name != "cli.md"]
_COMMAND = re.compile(r"(?:^|`|\.venv/bin/)limbeck ([a-z][^`#\n]*)", re.MULTILINE)
_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def shown_commands() -> list[str]:
    """Every command line of the documents: in code blocks, and between backticks in the text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(body for language, body in _BLOCK.findall(text) if language in ("", "sh", "bash", "text"))
        inline = "\n".join(f"`{span}`" for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _BLOCK.sub("", text)))
        found += [match.strip() for match in _COMMAND.findall(blocks + "\n" + inline)]
    return sorted({c for c in found if c.split()[0] in {n.name for n in app.registered_commands} | GROUPS | BUILT_IN})


GROUPS = {"ledger", "terms"}
BUILT_IN = {"run", "collect", "curate", "annotate", "train", "evaluate", "report", "show", "init", "doctor", "estimate"}
BUILT_IN |= {"export"}


@pytest.fixture(scope="module")
def finished(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny recipe and a finished run of it."""
    base = tmp_path_factory.mktemp("docs")
    recipe = recipe_dict(teacher_dir, prompt_file(base / "prompts.jsonl", 30))
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = CliRunner().invoke(app, ["run", str(base / "recipe.yaml"), "--out", str(base / "run")])
    assert result.exit_code == 0, result.output
    made = CliRunner().invoke(app, ["ledger", "checkpoint", str(base / "run"), "--out", str(base / "kept")])
    assert made.exit_code == 0, made.output
    for words in (
        ["disclose", "RUN", "--row", "0", "--field", "terms", "--out", "proof"],
        ["salts", "RUN", "--out", "key"],
    ):
        words = [
            str({"RUN": base / "run", "proof": base / "proof", "key": base / "key"}.get(word, word)) for word in words
        ]
        assert CliRunner().invoke(app, ["ledger", *words]).exit_code == 0
    return base


def test_the_documents_show_commands():
    assert len(shown_commands()) > 10


@pytest.mark.parametrize("command", shown_commands())
def test_a_command_of_the_documents_works(command, finished, tmp_path):
    from limbeck.ledger.signing.checkpoints import checkpoints
    from limbeck.ledger.store import Ledger

    with Ledger(finished / "run" / "ledger.db", read_only=True) as ledger:
        head = ledger.head()
        key = next(checkpoints(ledger.entries())).envelope.keyid
    words: list[str] = []
    for word in shlex.split(command):
        if word == "FILE":
            word = str({"--out": tmp_path / "new", "--salts": finished / "key"}.get(words[-1], finished / "proof"))
        elif word == "KEPT":
            word = str(finished / "kept")
        elif word == "KEY":
            word = key
        elif word in ("RECIPE", "recipe.yaml", "RECIPE_OR_RUN") and not command.startswith("init"):
            word = str(finished / "recipe.yaml")
        elif word in ("RUN", "runs/mine", "runs/quickstart"):
            word = str(finished / "run")
        elif word == "recipe.yaml":
            word = str(tmp_path / word)
        elif word == "sha256:...":
            word = str(head)
        elif word == "ID":
            word = "meta/llama-3.1/2024-07-23"
        words.append(word)
    if words[:2] == ["ledger", "verify"] and len(words) == 2:
        words.append(str(finished / "run"))
    if words == ["terms", "check"]:
        words.append(str(finished / "recipe.yaml"))
    if words == ["terms", "waive"]:
        words += [str(finished / "recipe.yaml"), "--terms", "meta/llama-3/2024-04-18", "--by", "A", "--reason", "b"]
        words += ["--expires", "2999-12-31", "--out", str(tmp_path / "waiver.json")]
    if words == ["init"]:
        words += ["--out", str(tmp_path / "recipe.yaml")]
    if words[0] in BUILT_IN - {"show", "init", "doctor", "estimate"} and len(words) == 1:
        words += [str(finished / "recipe.yaml"), "--out", str(finished / "run")]
    if words == ["estimate"]:
        words.append(str(finished / "recipe.yaml"))
    if words == ["show"]:
        words.append(str(finished / "run"))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"limbeck {' '.join(words)}\n{result.output}"


def test_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {
        t for page in PAGES for t in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert shown
    assert shown <= targets


def test_recipes_of_the_documents_load():
    loaded = 0
    for page in PAGES:
        for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "yaml" and "name:" in body and "student:" in body:
                Recipe.model_validate(yaml.safe_load(body))
                loaded += 1
    assert loaded


def test_generated_pages_are_current():
    page = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "recipe_docs.py")], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page, "run `make docs`"
    assert (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8") == schema_text(), "run `make docs`"
