"""Several processes learn what one does: started by torchrun, with gloo, on the CPU, with ragged lengths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import limbeck
from limbeck.ledger import verify
from limbeck.records import Rollout
from limbeck.rundir import RunDir
from limbeck.tables import read_records

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck"]


def recipe_file(tiny_run: Path, place: Path, **changes: object) -> Path:
    told = RunDir(tiny_run).recipe().model_dump(mode="json")
    told["signal"] = changes.pop("signal", told["signal"])
    told["train"] |= changes
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(told), encoding="utf-8")
    return path


FSDP = Path(__file__).resolve().parents[1] / "recipes" / "accelerate" / "fsdp.yaml"


def launched(recipe: Path, out: Path, command: list[str] = LAUNCH) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, "run", str(recipe), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alone(recipe: Path, out: Path) -> None:
    """The same by one process; on the CPU as well, since a GPU rounds otherwise."""
    if torch.cuda.is_available():
        finish(launched(recipe, out, [sys.executable, "-m", "limbeck"]))
    else:
        limbeck.run(str(recipe), out)


def kill_at_a_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """kill -9 to the launcher and all it started, once a checkpoint is complete."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list((run / "checkpoints").glob("checkpoint-*/complete")):
            launcher = psutil.Process(process.pid)
            for one in [*launcher.children(recursive=True), launcher]:  # each worker has a session of its own
                one.kill()
            break
        time.sleep(0.003)
    process.communicate()
    assert not (run / "report.html").exists()


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def curve(run: Path) -> list[float]:
    return [step["loss"] for step in json.loads((run / "training.json").read_text())["steps"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def same(one: Path, two: Path) -> None:
    assert curve(one) == pytest.approx(curve(two), rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_learn_what_one_does(tiny_run, tmp_path, accumulate):
    recipe = recipe_file(tiny_run, tmp_path, accumulate=accumulate, epochs=1)
    told = finish(launched(recipe, tmp_path / "two"))
    assert told.count("report.html") == 1  # the second process says nothing
    alone(recipe, tmp_path / "one")
    same(tmp_path / "one", tmp_path / "two")
    facts = json.loads((tmp_path / "two" / "training.json").read_text())
    assert facts["processes"] == 2
    assert verify(tmp_path / "two").ok
    finish(launched(recipe, tmp_path / "two"))  # nothing to do: the others are dismissed


def test_weights_divided_among_processes_learn_what_one_learns(tiny_run, tmp_path):
    """FSDP through accelerate, with the configuration that ships; killed and gone on with, too."""
    recipe = recipe_file(tiny_run, tmp_path, epochs=2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP), "-m", "limbeck"]
    finish(launched(recipe, tmp_path / "two", command))
    alone(recipe, tmp_path / "one")
    same(tmp_path / "one", tmp_path / "two")
    process = launched(recipe, tmp_path / "killed", command)
    kill_at_a_checkpoint(process, tmp_path / "killed")
    finish(launched(recipe, tmp_path / "killed", command))
    same(tmp_path / "two", tmp_path / "killed")


def test_two_processes_write_rollouts_together(tiny_run, tmp_path):
    """Each writes a share; what is written does not depend on who wrote it."""
    on_policy = {"share": 0.5, "max_tokens": 5, "every": 2}
    recipe = recipe_file(tiny_run, tmp_path, signal={"kind": "hidden"}, on_policy=on_policy, epochs=1)
    finish(launched(recipe, tmp_path / "two"))
    alone(recipe, tmp_path / "one")
    first = [
        {(row.step, row.slot): row.tokens for row in read_records(run / "rollouts.parquet", Rollout) if row.step < 2}
        for run in (tmp_path / "one", tmp_path / "two")
    ]
    assert first[0]
    assert {key: len(tokens) > 0 for key, tokens in first[0].items()} == dict.fromkeys(first[1], True)
    assert curve(tmp_path / "two")[0] > 0


def test_a_process_killed_ends_all_and_the_same_command_goes_on_to_the_same_bits(tiny_run, tmp_path):
    recipe = recipe_file(tiny_run, tmp_path, epochs=4)
    finish(launched(recipe, tmp_path / "whole"))
    kill_at_a_checkpoint(launched(recipe, tmp_path / "killed"), tmp_path / "killed")
    finish(launched(recipe, tmp_path / "killed"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")
    assert all(torch.equal(t, weights(tmp_path / "killed")[n]) for n, t in weights(tmp_path / "whole").items())


def test_one_process_needs_no_group():
    from limbeck import ranks

    assert (ranks.rank(), ranks.count(), ranks.share("x"), ranks.collect("x")) == (0, 1, "x", ["x"])
    assert not torch.distributed.is_initialized()
