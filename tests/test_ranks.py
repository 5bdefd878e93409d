"""Several processes learn what one does: as torchrun starts them, with gloo, on the CPU, with ragged lengths."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import forked
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
FSDP = Path(__file__).resolve().parents[1] / "recipes" / "accelerate" / "fsdp.yaml"
SHARDED = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP), "-m", "limbeck"]
HIDDEN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def recipe_file(tiny_run: Path, place: Path, **changes: object) -> Path:
    told = RunDir(tiny_run).recipe().model_dump(mode="json")
    told["signal"] = changes.pop("signal", told["signal"])
    told["train"] |= changes
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(told), encoding="utf-8")
    return path


class Launched:
    """Two processes and the launcher that starts them, as a user does; and what it tells them by the environment."""

    def __init__(self, recipe: Path, out: Path, launch: list[str] = LAUNCH):
        self.launcher = subprocess.Popen(
            [*launch, "run", str(recipe), "--out", str(out)],
            env=os.environ | HIDDEN,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self) -> dict[str, str]:
        """What is common to the two."""
        while self.launcher.poll() is None:
            for worker in psutil.Process(self.launcher.pid).children(recursive=True):
                with suppress(psutil.Error):  # it may be gone
                    if "RANK" in (found := worker.environ()):
                        return found
            time.sleep(0.01)
        raise AssertionError(self.launcher.communicate()[1][-3000:])

    def finish(self) -> str:
        out, err = self.launcher.communicate(timeout=240)
        assert self.launcher.returncode == 0, err[-3000:]
        return out


class Forked:
    """Two processes that are told what torchrun tells its own, without a launcher and without their imports."""

    def __init__(self, recipe: Path, out: Path, told: Mapping[str, str] = os.environ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        # The store at which processes meet is the first one's; with a launcher it is the launcher's.
        told = {name: value for name, value in told.items() if not name.startswith("TORCHELASTIC")} | HIDDEN
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        self.workers = [
            forked.start(
                forked.command, told | {"RANK": rank, "LOCAL_RANK": rank}, "run", str(recipe), "--out", str(out)
            )
            for rank in "01"
        ]

    def finish(self) -> None:
        for worker in self.workers:
            worker.join(240)
        assert [worker.exitcode for worker in self.workers] == [0, 0]

    def kill_at_a_checkpoint(self, run: Path, *ranks: int) -> None:
        """kill -9 to these, once a checkpoint is complete; all are gone then."""
        deadline = time.monotonic() + 120
        while all(worker.is_alive() for worker in self.workers) and time.monotonic() < deadline:
            if list((run / "checkpoints").glob("checkpoint-*/complete")):
                break
            time.sleep(0.003)
        for rank in ranks:
            self.workers[rank].kill()
        for worker in self.workers:
            worker.join(120)
        assert [self.workers[rank].exitcode for rank in ranks] == [-signal.SIGKILL] * len(ranks)
        assert 0 not in [worker.exitcode for worker in self.workers]
        assert not (run / "report.html").exists()


def alone(recipe: Path, out: Path) -> None:
    """The same by one process; on the CPU as well, since a GPU rounds otherwise."""
    if torch.cuda.is_available():
        one = forked.start(forked.command, HIDDEN, "run", str(recipe), "--out", str(out))
        one.join()
        assert one.exitcode == 0
    else:
        limbeck.run(str(recipe), out)


def curve(run: Path) -> list[float]:
    return [step["loss"] for step in json.loads((run / "training.json").read_text())["steps"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def same(one: Path, two: Path) -> None:
    assert curve(one) == pytest.approx(curve(two), rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("accumulate", "two"), [(1, Launched), (2, Forked)])
def test_two_processes_learn_what_one_does(tiny_run, tmp_path, accumulate, two):
    recipe = recipe_file(tiny_run, tmp_path, accumulate=accumulate, epochs=1)
    said = two(recipe, tmp_path / "two").finish()
    if two is Launched:
        assert said.count("report.html") == 1  # the second process says nothing
    alone(recipe, tmp_path / "one")
    same(tmp_path / "one", tmp_path / "two")
    facts = json.loads((tmp_path / "two" / "training.json").read_text())
    assert facts["processes"] == 2
    assert verify(tmp_path / "two").ok
    Forked(recipe, tmp_path / "two").finish()  # nothing to do: the others are dismissed


def test_weights_divided_among_processes_learn_what_one_learns(tiny_run, tmp_path):
    """FSDP through accelerate, with the configuration that ships; killed and gone on with, too."""
    recipe = recipe_file(tiny_run, tmp_path, epochs=2)
    launched = Launched(recipe, tmp_path / "two", SHARDED)
    told = launched.told()
    assert told["ACCELERATE_USE_FSDP"] == "true"
    launched.finish()
    alone(recipe, tmp_path / "one")
    same(tmp_path / "one", tmp_path / "two")
    Forked(recipe, tmp_path / "killed", told).kill_at_a_checkpoint(tmp_path / "killed", 0, 1)
    Forked(recipe, tmp_path / "killed", told).finish()
    same(tmp_path / "two", tmp_path / "killed")


def test_two_processes_write_rollouts_together(tiny_run, tmp_path):
    """Each writes a share; what is written does not depend on who wrote it."""
    on_policy = {"share": 0.5, "max_tokens": 5, "every": 2}
    recipe = recipe_file(tiny_run, tmp_path, signal={"kind": "hidden"}, on_policy=on_policy, epochs=1)
    Forked(recipe, tmp_path / "two").finish()
    alone(recipe, tmp_path / "one")
    first = [
        {(row.step, row.slot): row.tokens for row in read_records(run / "rollouts.parquet", Rollout) if row.step < 2}
        for run in (tmp_path / "one", tmp_path / "two")
    ]
    assert first[0]
    assert {key: len(tokens) > 0 for key, tokens in first[0].items()} == dict.fromkeys(first[1], True)
    assert curve(tmp_path / "two")[0] > 0


def test_a_process_killed_ends_all_and_the_same_command_goes_on_to_the_same_bits(tiny_run, tmp_path):
    recipe = recipe_file(tiny_run, tmp_path, epochs=2)
    Forked(recipe, tmp_path / "whole").finish()
    Forked(recipe, tmp_path / "killed").kill_at_a_checkpoint(tmp_path / "killed", 1)
    Forked(recipe, tmp_path / "killed").finish()
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")
    assert all(torch.equal(t, weights(tmp_path / "killed")[n]) for n, t in weights(tmp_path / "whole").items())


def test_one_process_needs_no_group():
    from limbeck import ranks

    assert (ranks.rank(), ranks.count(), ranks.share("x"), ranks.collect("x")) == (0, 1, "x", ["x"])
    assert not torch.distributed.is_initialized()
