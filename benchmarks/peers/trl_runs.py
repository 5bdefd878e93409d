"""TRL's side of `training.py` and `quality.py`: one case, in a process of its own, with the peers' interpreter.

    gkd          GKDTrainer, lmbda 0, beta 0: forward KL on the given answers, against the live teacher
    on-policy    DistillationTrainer: the student writes up to 128 tokens, reverse KL against the live teacher (default)

Both take TRL's own collators, tokenization and order. With `--order FILE` gkd takes the chats of every step from the
file, and leaves the line break after the end of the turn out of what is learned, as limbeck does.

As on limbeck's side, the student's weights are float32 (TRL's default, too), products run in bf16, and the teacher is
bf16. `--checkpointing` turns gradient checkpointing on, which is TRL's default and costs time to save memory.
`--weights bfloat16` makes the student's weights, and so AdamW's moments, bf16: less memory, fewer casts, and coarser
updates than limbeck's.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from bench import Result, write_result
from datasets import Dataset
from steps import BATCH, Counts, StepClock, arguments, figures, read_order, settings, weights_digest
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML

NEW_TOKENS = 128


class CountedGKD(GKDTrainer):
    """Notes what each batch holds."""

    counts: Counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's, after counting."""
        self.counts.tokens.append(int(inputs["attention_mask"].sum()))
        self.counts.supervised.append(int((inputs["labels"][:, 1:] != -100).sum()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class InOrder(CountedGKD):
    """Takes the data set as it stands."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class UpToTheEnd(DataCollatorForChatML):
    """TRL's collator without the label of what the template puts after the end of the turn."""

    def __call__(self, examples):
        """TRL's batch; in each row the last label, a line break, is masked."""
        batch = super().__call__(examples)
        (line_break,) = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        # Padding stands to the left, so the last column has every row's last token.
        last = batch["labels"][:, -1]
        if not bool((last == line_break).all()):
            raise ValueError(f"{last.tolist()} are the last labels, expected the line break, {line_break}, in all")
        last.fill_(self.ignore_index)
        return batch


class CountedDistillation(DistillationTrainer):
    """Notes what each batch holds, once the student has written it."""

    counts: Counts

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        written = int(inputs["completion_mask"].sum())
        self.counts.tokens.append(int(inputs["prompt_mask"].sum()) + written)
        self.counts.supervised.append(written)
        return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)


def run(options: argparse.Namespace) -> Result:
    rows = [json.loads(line) for line in (options.material / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    order = read_order(options.order)[: options.steps or None] if options.order else None
    steps = len(order) if order else options.steps or math.ceil(options.epochs * math.ceil(len(rows) / BATCH))
    words = AutoTokenizer.from_pretrained(options.material / "student")
    student = AutoModelForCausalLM.from_pretrained(options.material / "student", dtype=getattr(torch, options.weights))
    teacher = AutoModelForCausalLM.from_pretrained(options.material / "teacher", dtype=torch.bfloat16)
    same = arguments(str(options.material / "trl"), steps=steps, learning_rate=options.learning_rate, seed=options.seed)
    same |= {"per_device_train_batch_size": BATCH, "gradient_checkpointing": options.checkpointing}
    clock = StepClock()
    if options.case == "gkd":
        kind, config = CountedGKD, GKDConfig(**same, lmbda=0.0, beta=0.0, temperature=1.0, max_length=1024)
        if order:
            kind, rows = InOrder, [rows[i] for step in order for i in step]
        data = Dataset.from_list(rows)
    else:
        kind, config = CountedDistillation, DistillationConfig(**same, max_completion_length=NEW_TOKENS)
        words.padding_side = "left"
        data = Dataset.from_list([{"prompt": row["messages"][:-1]} for row in rows])
    trainer = kind(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=data,
        processing_class=words,
        callbacks=[clock],
        **({"data_collator": UpToTheEnd(tokenizer=words, max_length=1024)} if order else {}),
    )
    trainer.counts = Counts()
    trainer.remove_callback(PrinterCallback)
    beginning = weights_digest(student) if order else ""
    trainer.train()
    if options.save:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(options.save)
        words.save_pretrained(options.save)
    found = figures(clock, trainer.counts, trainer.state.log_history, options.skip)
    return found | ({"settings": settings(trainer, beginning)} if order else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("gkd", "on-policy"), required=True)
    parser.add_argument("--material", type=Path, required=True, help="what benchmarks/material.py made")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0 is never")
    parser.add_argument("--skip", type=int, default=1, help="first steps left out of rates")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", type=Path, help="the chats of every step, instead of TRL's own order (gkd)")
    parser.add_argument("--save", type=Path, help="where the student goes")
    parser.add_argument("--result", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    write_result(options.result, run(options))


if __name__ == "__main__":
    main()
