"""How far students stray from their teacher right after pruning, before any training.

    python benchmarks/pruning.py RUN [--student "layers=18" "layers=24 intermediate_size=1024" ...] [--seeds 0 1]

Takes teacher and examples of a finished run (`make quickstart` leaves one in runs/quickstart). Each student is what
`student: {kind: pruned, ...}` with these keys begins as; the seed draws the answers that it is chosen by. KL and
agreement, with 95 % intervals over prompts, are against the live teacher on held-out answers that nothing was chosen
by.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from students import measure
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck import models
from limbeck.recipe import PrunedStudent
from limbeck.records import Example
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.student.prune import pruned
from limbeck.student.saving import quiet

STUDENTS = [
    "layers=18",
    "layers=24 intermediate_size=1024",
    "layers=16",
    "layers=24 intermediate_size=853",
    "intermediate_size=1024",
    "attention_heads=6",
    "attention_heads=6 key_value_heads=2",
]
"""Of SmolLM2-135M: 30 layers of 9 attention heads, 3 key-value heads and 1,536 neurons."""


class Begun(NamedTuple):
    """A student before it learns, and how long it took to choose what stays."""

    model: PreTrainedModel
    seconds: float


def student_of(keys: str) -> PrunedStudent:
    """The part of a recipe that `layers=24 intermediate_size=1024` stands for."""
    pairs = (pair.partition("=") for pair in keys.split())
    return PrunedStudent.model_validate({key: yaml.safe_load(value) for key, _, value in pairs})


def begun(keys: str, seed: int, model: PreTrainedModel, answers: list[Example], teacher: str) -> Begun:
    """A student as it begins. By way of the disk, for a student that only loses layers is the teacher's own object
    for as long as it is pruned.
    """
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        pruned(model, answers, student_of(keys), teacher, seed=seed) as student,
    ):
        seconds = time.monotonic() - started
        with quiet():
            student.model.save_pretrained(scratch)
            loaded = AutoModelForCausalLM.from_pretrained(scratch, dtype=model.dtype, local_files_only=True)
    return Begun(loaded.eval(), seconds)


def main() -> None:
    """Print a table of students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--student", nargs="+", default=STUDENTS, help="keys of student, with spaces between")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    run = RunDir(options.run)
    teacher, examples = run.recipe().local_teachers[0], read_examples(run / "examples")
    model = models.load_model(teacher.model, teacher.precision)
    answers = [e for e in examples.train if e.teacher == teacher.name]
    print("| student | seed | parameters | KL, nats a token | agreement | choosing, s |\n|---|---|---|---|---|---|")
    for keys in options.student:
        for seed in options.seeds:
            student, seconds = begun(keys, seed, model, answers, teacher.name)
            kl, agreement, _ = measure(run, examples, student)
            cells = f"{student.num_parameters():,} | {shown(kl)} | {shown(agreement)} | {seconds:.1f}"
            print(f"| `{keys}` | {seed} | {cells} |", flush=True)


def shown(value: tuple[float | None, float | None, float | None]) -> str:
    """A value with its interval."""
    middle, low, high = value
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if None not in value else "not scored"


if __name__ == "__main__":
    main()
