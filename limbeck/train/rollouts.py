"""On-policy: the answers that the student writes while it learns.

It is a source of examples, not another trainer: the student answers the prompts that the schedule has for a stretch of
steps, in one batch and as it is at the first of them. Every answer is journaled before it is learned from, and a
resumed run takes from the journal what is there. What the teacher would have said is for the signal source to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import models, ranks
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.errors import Problem, RecipeError
from limbeck.generate import Generated, Sampling, sample_batch
from limbeck.ledger.canonical import canonical
from limbeck.recipe import OnPolicy
from limbeck.records import Digest, Example, Rollout, Split
from limbeck.render.examples import make_example
from limbeck.seeds import derive_seed
from limbeck.train.adapter import merged_copy
from limbeck.train.schedule import Schedule


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["rollout/1"] = "rollout/1"


class RolloutRequest(_Form):
    """All that a student's answer depends on, but for the weights, which follow from `made_from` and `written_at`."""

    made_from: Digest
    """Of the recipe, the order of training, the student's beginning, the examples and the signals."""
    written_at: int
    step: int
    slot: int
    prompt_id: Digest
    tokens: tuple[int, ...]
    """The prompt."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


class RolloutAnswer(_Form):
    """What the student wrote."""

    tokens: tuple[int, ...]
    """With the token that ended it."""
    text: str
    finish_reason: Literal["stop", "length"]


class _Slot(NamedTuple):
    """One answer that is due."""

    request: Request
    body: RolloutRequest
    parent: Example


class Rollouts:
    """The student's answers for each step of a schedule. `answers` is a `feed.OwnAnswers`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        examples: Sequence[Example],
        schedule: Schedule,
        settings: OnPolicy,
        journal: Journal | None,
        made_from: Digest,
        seed: int,
        dtype: torch.dtype,
    ):
        """`model` is the student as it learns; a copy of it writes, in `dtype`. Of several processes only the first
        has the journal.

        Raises:
            RecipeError: prompts that leave no room for an answer (all of them).
        """
        self._model, self._tokenizer, self._dtype = model, tokenizer, dtype
        self._examples, self._schedule, self._settings = examples, schedule, settings
        self._journal, self._made_from, self._seed = journal, made_from, seed
        self._held: dict[int, list[Example]] = {}
        self._refuse_long()

    def answers(self, step: int) -> list[Example]:
        """The examples that the student wrote for a step; written now, if the step begins a stretch."""
        if step not in self._held:
            first = step - step % self._settings.every
            slots = [slot for s in self._stretch(first) for slot in self._slots(s)]
            raws = self._raws(slots)
            self._held = {s: [] for s in self._stretch(first)}
            for slot in slots:
                self._held[slot.body.step].append(_example(slot, raws[slot.request.key]))
        return self._held[step]

    def records(self) -> list[Rollout]:
        """Every answer of the schedule as the journal has it."""
        return [self._record(slot) for step in range(len(self._schedule.prompts)) for slot in self._slots(step)]

    def _stretch(self, first: int) -> range:
        return range(first, min(first + self._settings.every, len(self._schedule.prompts)))

    def _slots(self, step: int) -> list[_Slot]:
        made, settings = [], self._settings
        for slot, index in zip(count(), self._schedule.prompts[step], strict=False):
            parent = self._examples[index]
            body = RolloutRequest(
                made_from=self._made_from,
                written_at=step - step % settings.every,
                step=step,
                slot=slot,
                prompt_id=parent.prompt_id,
                tokens=tuple(parent.tokens_T[: prompt_length(parent)].tolist()),
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=self._seed,
            )
            made.append(_Slot(Request.of(body.model_dump(mode="json")), body, parent))
        return made

    def _raws(self, slots: Sequence[_Slot]) -> dict[Digest, bytes]:
        """The raw answers, in every process. What the journal lacks is written, each process a share of it, and is on
        the disk when this returns.
        """
        there, missing = {}, set[Digest]()
        if self._journal is not None:
            missing = set(self._journal.missing([slot.request.key for slot in slots]))
            there = {s.request.key: self._journal.get(s.request.key).raw for s in slots if s.request.key not in missing}
        missing = ranks.share(missing)
        # The longest prompts first, so that what does not fit into memory shows at once.
        todo = sorted(
            (s for s in slots if s.request.key in missing), key=lambda s: (-len(s.body.tokens), s.request.key)
        )
        written = [
            answer for share in ranks.collect(self._write(todo[ranks.rank() :: ranks.count()])) for answer in share
        ]
        if self._journal is not None and written:
            self._journal.put_group(written)
        return ranks.share(there) | {answer.request.key: answer.raw for answer in written}

    def _write(self, todo: Sequence[_Slot]) -> list[Answer]:
        """Has the student answer."""
        if not todo:
            return []
        writer = merged_copy(self._model).to(dtype=self._dtype)  # pyright: ignore[reportCallIssue]
        writer.requires_grad_(requires_grad=False)
        settings = self._settings
        written = sample_batch(
            writer,
            [slot.body.tokens for slot in todo],
            Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p),
            stop_ids=models.stop_ids(writer, self._tokenizer),  # pyright: ignore[reportArgumentType]
            seeds=[derive_seed(self._seed, "rollout", slot.request.key) for slot in todo],
        )
        return [Answer(s.request, self._raw(w)) for s, w in zip(todo, written, strict=True)]

    def _raw(self, generated: Generated) -> bytes:
        tokens = [*generated.tokens, *([] if generated.stop_token is None else [generated.stop_token])]
        text = self._tokenizer.decode(
            list(generated.tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        answer = RolloutAnswer(tokens=tuple(tokens), text=str(text), finish_reason=generated.finish_reason)
        return canonical(answer.model_dump(mode="json"))

    def _record(self, slot: _Slot) -> Rollout:
        assert self._journal is not None
        found = self._journal.get(slot.request.key)
        answer = RolloutAnswer.model_validate_json(found.raw)
        return Rollout(
            step=slot.body.step,
            slot=slot.body.slot,
            written_at=slot.body.written_at,
            prompt_id=slot.body.prompt_id,
            tokens=answer.tokens,
            text=answer.text,
            finish_reason=answer.finish_reason,
            created=found.created,
            request_id=slot.request.key,
            response=found.response,
        )

    def _refuse_long(self) -> None:
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        asked = sorted({index for step in self._schedule.prompts for index in step})
        longest = max((prompt_length(self._examples[index]) for index in asked), default=0)
        if room is not None and longest + self._settings.max_tokens > room:
            expected = (
                f"at most {room - longest}: the student has {room} positions, the longest prompt {longest} tokens"
            )
            remedy = "lower it, or lower train.max_length to leave long prompts out"
            problem = Problem("train.on_policy.max_tokens", str(self._settings.max_tokens), expected, remedy)
            raise RecipeError("the student has no room to answer", [problem])


def _example(slot: _Slot, raw: bytes) -> Example:
    answer = RolloutAnswer.model_validate_json(raw)
    tokens_T = np.array([*slot.body.tokens, *answer.tokens], dtype=np.int32)
    return make_example(
        tokens_T,
        np.arange(len(tokens_T)) >= len(slot.body.tokens),
        prompt_id=slot.parent.prompt_id,
        completion=slot.request.key,
        teacher=slot.parent.teacher,
        split=Split.TRAIN,
    )


def prompt_length(example: Example) -> int:
    """Tokens before the last answer of the chat: where its last supervised stretch begins."""
    starts_S = np.flatnonzero(np.diff(example.mask_T.astype(np.int8), prepend=0) == 1)
    return int(starts_S[-1])
