"""Training steps on a GPU, for `gpu.py`: a student of about a billion parameters, a teacher of about three.

The shapes are those of Llama 3.2 1B and 3B, the weights random. Student: float32 weights, products in bfloat16, AdamW.
Teacher: bfloat16. Eight sequences of about 512 tokens (`--length`) a step, the same in the same order for every case;
an eighth of each is the prompt. Tokens a second: all tokens of the sequences, padding never counted, over the time from
the end of the warm-up to the end of the last step. Memory: the most that was allocated at a time, weights and moments
included. Share of the peak: operations as `flops.py` counts them. Samples of the teacher are
made by the annotate stage's own function and kept in memory as a store hands them out.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from bench import HERE, ROOT, table
from flops import forward_flops, shape_of
from steps import BATCH, Counts, StepClock, arguments, figures
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from limbeck.models.attention import steady_attention
from limbeck.records import Example, Split
from limbeck.render.batches import Batch
from limbeck.render.examples import make_example
from limbeck.signal.annotate import annotate_batch
from limbeck.signal.sampled import SampledCodec
from limbeck.signal.types import SampledSignal, TextSignal, concat
from limbeck.train.feed import Feed
from limbeck.train.schedule import Schedule, make_schedule
from limbeck.train.sources import LiveTeacher, SignalSource
from limbeck.train.trainer import DistillationTrainer

WARM = 4
"""Steps left out of rates: kernels are compiled and chosen, moments made."""


def config(side: str, *, small: bool) -> LlamaConfig:
    """Of the student or the teacher."""
    if small:
        sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    else:
        sizes = {"vocab_size": 128_256, "intermediate_size": 8192}
        if side == "student":
            sizes |= {"hidden_size": 2048, "num_hidden_layers": 16}
            heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        else:
            sizes |= {"hidden_size": 3072, "num_hidden_layers": 28}
            heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
    return LlamaConfig(
        **cast("dict[str, Any]", sizes | heads), tie_word_embeddings=True, max_position_embeddings=4096, use_cache=False
    )


def model_of(side: str, device: str, *, small: bool) -> PreTrainedModel:
    """With random weights, the same each time."""
    torch.manual_seed(0 if side == "student" else 1)
    dtype = torch.float32 if side == "student" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(side, small=small), dtype=dtype)
    return model if side == "student" else model.requires_grad_(False).eval()


def examples_of(count: int, vocabulary: int, length: int) -> list[Example]:
    """Random tokens, of about `length` each."""
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        size = int(random.integers(length * 7 // 8, length * 9 // 8))
        tokens_T = random.integers(3, vocabulary, size).astype(np.int32)
        mask_T = np.arange(size) >= size // 8
        made.append(
            make_example(
                tokens_T, mask_T, prompt_id=f"p{number}", completion=f"c{number}", teacher="t", split=Split.TRAIN
            )
        )
    return made


class Held:
    """Samples in memory, by the ids of the examples."""

    def __init__(self, signals: dict[str, SampledSignal]):
        self._signals = signals

    def take(self, batch: Batch) -> SampledSignal:
        """As `sources.Stored` does."""
        return concat([self._signals[name] for name in batch.example_ids])


class Text:
    """The tokens themselves."""

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary

    def take(self, batch: Batch) -> TextSignal:
        """Their ids."""
        return TextSignal(batch.targets_N, self._vocabulary)


class Profiled(TrainerCallback):
    """Profiles the last two steps."""

    def __init__(self, steps: int, device: str):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        self._begin, self.profiler = steps - 2, profile(activities=activities)
        self._sort = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"

    def on_step_end(self, args, state, control, **kwargs):
        """Begins."""
        if state.global_step == self._begin:
            self.profiler.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        """Ends, and says where the time went."""
        self.profiler.__exit__(None, None, None)
        shown = self.profiler.key_averages().table(sort_by=self._sort, row_limit=32, max_name_column_width=90)
        print("\n".join(line for line in shown.splitlines() if line.strip()), file=sys.stderr, flush=True)


class Bench:
    """What all cases share."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device, self.small = options, options.device, options.small
        self.steps = options.steps
        self.teacher = model_of("teacher", self.device, small=self.small)
        self.vocabulary = self.teacher.config.vocab_size
        self.examples = examples_of(BATCH * self.steps, self.vocabulary, 24 if self.small else options.length)
        lengths = [len(e.tokens_T) for e in self.examples]
        self.schedule = make_schedule(lengths, batch_size=BATCH, epochs=1, pieces=1, seed=0)
        self.batches = [[self.examples[i] for i in step] for step in self.schedule.steps]
        self.signals: dict[str, SampledSignal] = {}
        self.annotating = 0.0

    def annotate(self) -> None:
        """Samples of every example; notes tokens a second."""
        codec = SampledCodec(0.02, 1.0, self.vocabulary)
        done = list(self.batches)
        annotate_batch(self.teacher, done[0], codec, 0)
        started = time.perf_counter()
        for batch in done:
            arrays = annotate_batch(self.teacher, batch, codec, 0)
            self.signals |= {e.id: codec.decode([a]) for e, a in zip(batch, arrays, strict=True)}
        self.annotating = sum(len(e.tokens_T) for e in self.examples) / (time.perf_counter() - started)

    def same(self, directory: str) -> dict[str, Any]:
        """The arguments of every trainer."""
        told = arguments(directory, steps=self.steps, learning_rate=1e-5, seed=0)
        return told | {"use_cpu": self.device == "cpu", "per_device_train_batch_size": 1, "num_train_epochs": 1}

    def ours(
        self, source: SignalSource, loss: str, *, packed: bool = False, attention: str = "sdpa"
    ) -> dict[str, object]:
        """Limbeck's trainer."""
        model = model_of("student", self.device, small=self.small)
        model.set_attn_implementation(attention)
        clock, callbacks = StepClock(), cast("list[TrainerCallback]", [])
        if self.options.profile:
            callbacks = [Profiled(self.steps, self.device)]
        feed = Feed(self.examples, cast("Schedule", self.schedule), packed=packed)
        with tempfile.TemporaryDirectory() as directory:
            trainer = DistillationTrainer(
                model,
                feed=feed,
                source=source,
                loss=loss,
                temperature=1.0,
                args=TrainingArguments(**self.same(directory)),
                callbacks=[*callbacks, clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return figures(clock, self.counts(), trainer.state.log_history, WARM) | {"model": shape_of(model)}

    def trl(self, *, liger: bool, cudnn: bool = True) -> dict[str, object]:
        """TRL's GKDTrainer on the same batches in the same order; torch left as it comes, or without cuDNN's attention,
        which limbeck turns off while it trains.
        """
        if not cudnn:
            with steady_attention():
                return self.trl(liger=liger)
        sys.path.insert(0, str(HERE / "peers"))
        from datasets import Dataset
        from torch.utils.data import SequentialSampler

        theirs = import_module("trl.experimental.gkd")

        class InOrder(theirs.GKDTrainer):
            def _get_train_sampler(self, dataset=None):
                return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        ordered = [e for batch in self.batches for e in batch]
        rows = [{"number": n, "messages": [{"role": "user", "content": "?"}]} for n in range(len(ordered))]
        model = model_of("student", self.device, small=self.small)
        clock = StepClock()
        with tempfile.TemporaryDirectory() as directory:
            told = self.same(directory) | {"per_device_train_batch_size": BATCH, "gradient_checkpointing": False}
            trainer = InOrder(
                model=model,
                teacher_model=self.teacher,
                args=theirs.GKDConfig(
                    **told, lmbda=0.0, beta=0.0, temperature=1.0, max_length=4096, use_liger_kernel=liger
                ),
                train_dataset=Dataset.from_list(rows),
                data_collator=lambda rows: collated([ordered[row["number"]] for row in rows]),
                processing_class=words(),
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return figures(clock, self.counts(), trainer.state.log_history, WARM) | {"model": shape_of(model)}

    def counts(self) -> Counts:
        """Of every step."""
        return Counts(
            [sum(len(e.tokens_T) for e in b) for b in self.batches],
            [sum(e.supervised for e in b) for b in self.batches],
        )

    def flops(self, found: dict[str, object], *, live: bool) -> float:
        """Operations of the timed steps."""
        timed = self.batches[self.steps - cast("int", found["steps_timed"]) :]
        lengths = [len(e.tokens_T) for batch in timed for e in batch]
        supervised = sum(e.supervised for batch in timed for e in batch)
        total = 3 * forward_flops(cast("Any", found["model"]), lengths, supervised)
        return total + (forward_flops(shape_of(self.teacher), lengths, supervised) if live else 0.0)


def collated(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator gives it."""
    width = max(len(e.tokens_T) for e in examples)
    ids, attention, labels = (np.zeros((len(examples), width), dtype=np.int64) for _ in range(3))
    labels -= 100
    for b, example in enumerate(examples):
        size = len(example.tokens_T)
        ids[b, :size], attention[b, :size] = example.tokens_T, 1
        labels[b, :size] = np.where(example.mask_T, example.tokens_T, -100)
    prompts = ids[:, :1]
    named = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    named |= {"prompts": prompts, "prompt_attention_mask": np.ones_like(prompts)}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def words() -> Any:
    """A tokenizer, which TRL asks for; nothing is tokenized."""
    sys.path.insert(0, str(ROOT / "tests"))
    return import_module("tiny").tokenizer(pad="<|endoftext|>")


def cases(bench: Bench) -> list[tuple[str, bool, Callable[[], dict[str, object]]]]:
    """Name, whether a teacher runs in the step, and the run."""

    def stored() -> dict[str, object]:
        if not bench.signals:
            bench.annotate()
        return bench.ours(Held(bench.signals), "forward_kl")

    def live(**how: Any) -> dict[str, object]:
        return bench.ours(LiveTeacher(bench.teacher, bench.vocabulary), "forward_kl", **how)

    return [
        ("limbeck, live teacher", True, live),
        ("limbeck, live teacher, packed, sdpa", True, lambda: live(packed=True)),
        ("limbeck, stored samples", False, stored),
        ("limbeck, cross-entropy", False, lambda: bench.ours(Text(bench.vocabulary), "cross_entropy")),
        ("TRL GKDTrainer, lmbda 0, beta 0", True, lambda: bench.trl(liger=False)),
        ("TRL GKDTrainer, use_liger_kernel", True, lambda: bench.trl(liger=True)),
        ("TRL GKDTrainer, cuDNN's attention off", True, lambda: bench.trl(liger=False, cudnn=False)),
        ("TRL GKDTrainer, both", True, lambda: bench.trl(liger=True, cudnn=False)),
        ("limbeck, live teacher, packed, flex_attention", True, lambda: live(packed=True, attention="flex_attention")),
    ]


def steps(options: argparse.Namespace, peak: float) -> str:
    """The table of part `step`."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    bench, rows = Bench(options), []
    for name, live, run in cases(bench):
        if options.only not in name:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = run()
        except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:600]}", file=sys.stderr, flush=True)
            rows.append([name, f"failed: {type(error).__name__}", "", "", "", "", ""])
            continue
        memory = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else float("nan")
        share = bench.flops(found, live=live) / cast("float", found["seconds"]) / peak
        step = cast("float", found["seconds"]) / cast("int", found["steps_timed"])
        loss = cast("list[float]", found["losses"])[0]
        rate = f"{found['tokens_per_second']:,.0f}"
        seconds = cast("list[float]", found["step_seconds"])
        middle = statistics.median(seconds[-cast("int", found["steps_timed"]) :])
        rows.append(
            [name, rate, f"{step * 1e3:,.0f}", f"{middle * 1e3:,.0f}", f"{memory:.1f}", f"{share:.2f}", f"{loss:.4f}"]
        )
        print(*rows[-1], [round(x, 3) for x in seconds], sep=" | ", file=sys.stderr)
    said = table(
        ["training step", "tokens/s", "ms a step", "median", "peak GiB", "share of the peak", "first loss"], rows
    )
    if bench.annotating:
        said += f"\n\nAnnotating by the teacher: {bench.annotating:,.0f} tokens/s."
    return said
