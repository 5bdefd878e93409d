"""What docs/testing.md shows works, and it names every key there is."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml
from test_testing_faults import body, post
from typer.testing import CliRunner

from limbeck.testing import Bill, Charge, Faults, Limit, Model, Settings
from limbeck.testing.__main__ import main as serve
from limbeck.testing.faults import Fault

PAGE = Path(__file__).resolve().parents[1] / "docs" / "testing.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def test_the_settings_shown_are_the_defaults_and_the_schedule_loads():
    shown = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
    settings, schedule = shown
    assert set(settings) == set(Settings.model_fields)
    told = Settings.model_validate({**settings, "delay": 0.0})
    assert told == Settings()
    assert len(Faults.model_validate(schedule).faults) == len(schedule["faults"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_shown_serve(command, tmp_path):
    for name, text in (("settings.yaml", BLOCKS[-2][1]), ("faults.yaml", "limits: [{requests_per_minute: 60}]")):
        (tmp_path / name).write_text(text)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "limbeck.testing"]
    words[words.index("--port") + 1] = "0"
    root = PAGE.parents[1]
    start = f"import sys, runpy; sys.path.insert(0, {str(root)!r}); sys.argv = ['x'] + sys.argv[1:]; "
    start += "runpy.run_module('limbeck.testing', run_name='__main__')"
    run = [sys.executable, "-c", start, *words[3:]]
    with subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+ \(bill: http://127\.0\.0\.1:\d+/bill\)\n", line)
            server = type("At", (), {"url": line.split()[2]})
            assert post(server, body())[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)


@pytest.mark.parametrize("option", [["--words", "0"], ["--delay", "-1"], ["--port", "70000"], ["--port", "-1"]])
def test_an_option_out_of_its_range_is_named(option):
    app = typer.Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, option)
    assert result.exit_code == 2
    assert option[0] in result.output


def test_the_example_runs(capsys):
    (example,) = [text for language, text in BLOCKS if language == "python"]
    exec(compile(example, str(PAGE), "exec"), {})
    assert "US dollars" in capsys.readouterr().out


def test_every_key_and_kind_is_named():
    text = PAGE.read_text(encoding="utf-8")
    forms = get_args(get_args(Fault)[0])
    kinds = {kind for form in forms for kind in get_args(form.model_fields["kind"].annotation)}
    keys = {name for form in (*forms, Limit, Model, Settings, Faults) for name in form.model_fields}
    keys |= set(Charge._fields) | set(Bill().as_json())
    missing = {word for word in kinds | keys if not re.search(rf"\b{word}\b", text)}
    assert not missing
