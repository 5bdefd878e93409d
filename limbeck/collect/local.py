"""A teacher whose weights are here, run by transformers.

A request holds its prompt as tokens, so what was asked does not hang on a template that may change. The
random stream of an answer is seeded by the request's key: what runs beside it changes nothing but the
rounding of its logits, and as the batches of a stretch are always cut alike, not even that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck import models, recipe
from limbeck.collect.rows import shown
from limbeck.collect.teachers import Answer, Parsed, Request
from limbeck.errors import InputError, Problem, PromptError
from limbeck.generate import Generated, Sampling, sample_batch
from limbeck.ledger.canonical import canonical
from limbeck.records import Digest, Message, Prompt, TeacherIdentity
from limbeck.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def bytes(self) -> bytes:
        return canonical(self.model_dump(mode="json"))


class LocalRequest(_Form):
    """The body of a request to a local teacher."""

    form: Literal["local/1"] = "local/1"
    weights: Digest
    precision: str
    messages: tuple[Message, ...] | None
    """None where the tokens are no whole chat."""
    tokens: tuple[int, ...]
    """What the model is given."""
    stop: tuple[int, ...]
    """Tokens that end the answer beside those that end every answer of this model."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stream: str
    sample: int


class LocalAnswer(_Form):
    """The raw answer of a local teacher."""

    form: Literal["local/1"] = "local/1"
    model: str
    tokens: tuple[int, ...]
    """Without the one that ended it."""
    text: str
    finish_reason: Literal["stop", "length", "context_length"]
    stop: int | None
    """The token that ended it."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens written, with the one that ended it."""


class _Job(NamedTuple):
    request: Request
    body: LocalRequest

    @property
    def alike(self) -> tuple[int, float, float, tuple[int, ...]]:
        """What all rows of a batch have in common."""
        body = self.body
        return (body.max_tokens, body.temperature, body.top_p, body.stop)


class LocalTeacher:
    """A `Teacher`. Weights are loaded when it first has to answer, and are not kept here."""

    def __init__(self, settings: recipe.LocalTeacher, collect: recipe.Collect, seed: int):
        self._settings, self._collect, self._seed = settings, collect, seed
        self._source = models.resolve(settings.model)
        self._device = models.processor().device
        self._precision = str(models.precision_dtype(settings.precision, self._device)).removeprefix("torch.")
        self.identity = TeacherIdentity(
            name=settings.name,
            kind="local",
            provider="self-hosted",
            route="self-hosted",
            model=settings.model,
            weights=self._source.digest,
            terms=settings.terms,
        )

    @property
    def licence(self) -> str:
        """The licence its weights are under, as they say themselves, or `unknown`."""
        return self._source.licence or "unknown"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's own tokenizer."""
        return models.load_tokenizer(self._settings.model)

    def request(self, prompt: Prompt, sample: int) -> Request:
        """What is asked for this sample of this prompt. Raises `PromptError` where the chat template
        refuses it.
        """
        chat = [message.model_dump() for message in prompt.messages]
        if beyond := _beyond(prompt):
            raise self._refused(prompt, beyond)
        try:
            text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise self._not_taken(prompt, error) from error
        tokens = self.tokenizer.encode(str(text), add_special_tokens=False)
        return self._asked(tokens, self._collect, "collect", sample, messages=prompt.messages)

    def continuation(
        self, tokens: Sequence[int], stop: int, settings: recipe.SelfPrompt, stream: str, number: int
    ) -> Request:
        """The request to go on from these tokens, up to `stop` or to what ends an answer."""
        return self._asked(tokens, settings, stream, number, stop=(stop,))

    def _asked(
        self,
        tokens: Sequence[int],
        settings: recipe.Collect | recipe.SelfPrompt,
        stream: str,
        sample: int,
        *,
        messages: tuple[Message, ...] | None = None,
        stop: tuple[int, ...] = (),
    ) -> Request:
        body = LocalRequest(
            weights=self._source.digest,
            precision=self._precision,
            messages=messages,
            tokens=tuple(tokens),
            stop=stop,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self._seed,
            stream=stream,
            sample=sample,
        )
        return Request.of(body.model_dump(mode="json"))

    def _refused(self, prompt: Prompt, beyond: str) -> PromptError:
        where = f"{prompt.source}: {shown(prompt.messages[-1].content)}"
        remedy = "take them out of the prompts, or ask through a server: kind: openai with its base_url"
        expected = f"text alone for {self.identity.name}, which runs here"
        return PromptError("prompts ask for more than text", [Problem(where, beyond, expected, remedy)])

    def _not_taken(self, prompt: Prompt, error: TemplateError) -> PromptError:
        roles = " ".join(message.role for message in prompt.messages)
        problem = Problem(
            f"{prompt.source}: {shown(prompt.messages[-1].content)}",
            f"roles {roles}: {shown(str(error), 200)}",
            f"messages that the chat template of {self.identity.name} takes",
            "change the order or the roles of its messages, or take a teacher that knows them",
        )
        return PromptError("the teacher's chat template refuses prompts", [problem])

    def answer(
        self, stretches: Iterable[Sequence[Request]], wrote: Callable[[int], None] | None = None
    ) -> Iterator[list[Answer]]:
        """The answers of a stretch, in batches of up to `collect.concurrency`, the longest prompts first,
        so that what does not fit into memory shows at once. Prompts that leave no room for an answer are
        answered with `context_length`. Raises `InputError` where no prompt could.
        """
        for stretch in stretches:
            jobs = [_Job(request, LocalRequest.model_validate_json(request.body)) for request in stretch]
            jobs.sort(key=lambda job: (job.alike, -len(job.body.tokens), job.request.key))
            for _, alike in groupby(jobs, key=lambda job: job.alike):
                group = list(alike)
                for start in range(0, len(group), self._collect.concurrency):
                    yield self._batch(group[start : start + self._collect.concurrency], wrote)

    def parse(self, request: Request, raw: bytes) -> Parsed:
        """Text and counts of a raw answer. Raises `InputError` where a local teacher did not write it."""
        found = self.read(raw)
        counts = (found.prompt_tokens, found.completion_tokens)
        return Parsed(found.text, None, found.finish_reason, found.model, *counts)

    def read(self, raw: bytes) -> LocalAnswer:
        """A raw answer with its tokens. Raises `InputError` where a local teacher did not write it."""
        try:
            return LocalAnswer.model_validate_json(raw)
        except ValidationError as error:
            where, found = f"an answer of {self.identity.name}", shown(raw[:200].decode(errors="replace"))
            remedy = "use the limbeck that wrote the journal, or a newer one"
            problem = Problem(where, found, "an answer of form local/1", remedy)
            raise InputError("a journaled answer cannot be read", [problem]) from error

    def _batch(self, jobs: Sequence[_Job], wrote: Callable[[int], None] | None) -> list[Answer]:
        """The answers to requests that are alike, in their order."""
        room = self._room(jobs[0].body)
        fitting = [job for job in jobs if room is None or len(job.body.tokens) <= room]
        written = self._generate(fitting, wrote) if fitting else []
        by_key = {job.request.key: generated for job, generated in zip(fitting, written, strict=True)}
        return [Answer(job.request, self._raw(job.body, by_key.get(job.request.key))) for job in jobs]

    def _generate(self, jobs: Sequence[_Job], wrote: Callable[[int], None] | None) -> list[Generated]:
        body = jobs[0].body
        model = models.load_model(self._settings.model, self._settings.precision, self._device)
        return sample_batch(
            model,
            [job.body.tokens for job in jobs],
            Sampling(max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p),
            stop_ids=models.stop_ids(model, self.tokenizer) | {*body.stop},
            seeds=[derive_seed(job.body.seed, "answer", job.request.key) for job in jobs],
            on_tokens=wrote,
        )

    def _room(self, body: LocalRequest) -> int | None:
        """Longest prompt in tokens that leaves room for an answer; None where the model knows no bound."""
        positions = getattr(self._config, "max_position_embeddings", None)
        if positions is None:
            return None
        if positions <= body.max_tokens:
            key = "max_tokens of self-prompt" if body.messages is None else "collect.max_tokens"
            expected = f"fewer than the {positions} positions of {self.identity.name}"
            problem = Problem(key, str(body.max_tokens), expected, f"lower it to {positions // 2} or less")
            raise InputError("the teacher cannot write so many tokens", [problem])
        return positions - body.max_tokens

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return models.load_config(self._settings.model, self._settings.precision)

    def _raw(self, body: LocalRequest, generated: Generated | None) -> bytes:
        tokens = list(generated.tokens) if generated else []
        stop = generated.stop_token if generated else None
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return LocalAnswer(
            model=self._settings.model,
            tokens=tuple(tokens),
            text=str(text),
            finish_reason=generated.finish_reason if generated else "context_length",
            stop=stop,
            prompt_tokens=len(body.tokens),
            completion_tokens=len(tokens) + (stop is not None),
        ).bytes()


def _beyond(prompt: Prompt) -> str:
    """What a prompt asks for that a model run here is not asked; empty where there is nothing."""
    asked = {
        "tools": bool(prompt.tools) or any(message.tool_calls for message in prompt.messages),
        "a JSON schema": prompt.json_schema is not None,
        "images": any(message.images for message in prompt.messages),
    }
    return ", ".join(name for name, there in asked.items() if there)
