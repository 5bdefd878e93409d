"""What the student learns from, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from limbeck.errors import Problem
from limbeck.recipe.parts import NUMBER, NonNegativeFloat, Part, PositiveFloat, PositiveInt, Probability, Share


class SampledSignalSettings(Part):
    """Threshold-sampled teacher distributions, stored once and read by every epoch."""

    kind: Literal["sampled"] = "sampled"
    """Distributions, sampled."""
    tau: Probability = 0.02
    """Tokens with at least this probability are stored exactly; rarer ones by chance, weighing tau."""


class SignalServer(Part):
    """A completions server, such as vLLM, that gives the log-probabilities of a prompt."""

    base_url: Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/[^@\s]*)?$")]
    """Its address with `/v1`. A key is no part of it."""
    model: str
    """The model's name there. Its tokenizer has to be the one that the examples are made of."""
    terms: str | None = None
    """Id of the terms that what it says is used under, or `own-model` for a model of one's own; null is the teacher's,
    whose model it serves."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the key; null sends none."""
    concurrency: PositiveInt = 16
    """Requests that wait for an answer at the same time."""
    ask: Literal["prompt_logprobs", "echo"] = "prompt_logprobs"
    """`prompt_logprobs` is vLLM's own key. `echo` is `echo: true` with `logprobs`, for other servers that know
    `return_tokens_as_token_ids`.
    """


class TopKSignalSettings(Part):
    """The teacher's most likely tokens, with the mass of all others as one bucket. Biased: `train.allow_biased`."""

    kind: Literal["top_k"] = "top_k"
    """The most likely tokens."""
    k: PositiveInt = 50
    """How many tokens a position. A vLLM server gives at most its `--max-logprobs`, 20 unless told otherwise."""
    source: Literal["teacher", "answers"] = "teacher"
    """`teacher` asks for every token anew; `answers` takes what was said while collecting (`collect.logprobs`)."""
    server: SignalServer | None = None
    """The server that is asked; null runs the teacher here."""
    unmatched: Literal["refuse", "text"] = "refuse"
    """With `source: answers`, what to do with an answer whose tokens are not those of the student's tokenizer: stop and
    list them, or learn that answer from its words alone."""


class TextSignalSettings(Part):
    """The teacher's text only."""

    kind: Literal["text"] = "text"
    """Text only."""


class HiddenSignalSettings(Part):
    """The teacher's last hidden states and its head, computed beside the student at every step."""

    kind: Literal["hidden"] = "hidden"
    """Exact and whole distributions of a live teacher; nothing is stored."""


Signal = Annotated[
    SampledSignalSettings | TopKSignalSettings | TextSignalSettings | HiddenSignalSettings,
    Field(discriminator="kind"),
]

LossName = Literal[
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "cross_entropy",
]


class LossTerm(Part):
    """One term of a weighted sum of losses."""

    name: LossName
    """The loss."""
    beta: Share | None = None
    """The teacher's share in the mixture of `generalized_jsd`: 0 is forward KL, 1 reverse KL; null takes 0.5."""
    alpha: Share | None = None
    """How far `skew_kl` and `skew_reverse_kl` are skewed: 0 is the plain KL; null takes 0.1."""
    weight: PositiveFloat = 1.0
    """What the term is multiplied by."""
    temperature: PositiveFloat | None = None
    """Of this term; null takes `train.temperature`. No factor temperature squared is applied: put it into `weight`."""
    on: Literal["signal", "text"] = "signal"
    """`text` compares the student with the tokens of the answer instead of the signal."""

    @model_validator(mode="after")
    def _has_its_parameter(self) -> LossTerm:
        owners = {"beta": ("generalized_jsd",), "alpha": ("skew_kl", "skew_reverse_kl")}
        for key, names in owners.items():
            if getattr(self, key) is not None and self.name not in names:
                problem = Problem(key, f"{getattr(self, key)} with {self.name}", f"{key} with {' or '.join(names)}")
                raise PydanticCustomError("parts_disagree", "{text}", {"text": str(problem), "problems": [problem]})
        return self

    def __str__(self) -> str:
        """As a reader wants to see it: `0.5 x generalized_jsd(beta=0.5) on text`."""
        times = "" if self.weight == 1 else f"{self.weight:g} x "
        keys = ("beta", "alpha", "temperature")
        given = ", ".join(f"{key}={getattr(self, key):g}" for key in keys if getattr(self, key) is not None)
        return f"{times}{self.name}{f'({given})' if given else ''}{' on text' if self.on == 'text' else ''}"


class OnPolicy(Part):
    """The student writes answers itself while it learns, and the teacher says what it would have said."""

    share: Share = 1.0
    """Share of a step's sequences that the student wrote, at the end of training."""
    share_at_start: Share | None = None
    """The same at the start; from there it changes evenly. null is `share` all along."""
    max_tokens: PositiveInt = 128
    """Longest answer of the student, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the student."""
    top_p: Probability = 1.0
    """Each token is drawn from the likeliest ones that together have this probability; 1 is all of them."""
    every: PositiveInt = 4
    """Steps whose answers are written together, by the student as it then is: more is faster, 1 is strictly
    on-policy.
    """


class Adapter(Part):
    """A low-rank adapter learns, and the student's own weights stay; it is added into them at the end."""

    rank: PositiveInt = 16
    """Rank of the matrices that are added."""
    alpha: PositiveInt = 32
    """They are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    """Dropout before the adapter."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """The layers that get one: every linear layer but the head, or those whose names end so."""


class Train(Part):
    """How the student learns."""

    loss: LossName | LossTerm | Annotated[tuple[LossTerm, ...], Field(min_length=1)] = "forward_kl"
    """A loss by name, with its parameters, or a list whose weighted sum it is. `cross_entropy` can learn from text; the
    others need a signal that holds distributions, and all but `forward_kl` whole ones.
    """
    allow_biased: bool = False
    """Allow a loss on a signal whose expectation is not the loss itself; the report then says so."""
    on_policy: OnPolicy | None = None
    """Whether the student learns from its own answers too; null learns from the teacher's only."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions before they are compared; 1 leaves them as they are."""
    adapter: Adapter | None = None
    """Learn a low-rank adapter (LoRA) instead of all weights: less memory; null learns all of them."""
    epochs: PositiveFloat = 2
    """Passes over the training examples; a fraction is allowed."""
    learning_rate: PositiveFloat = 3e-4
    """The highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: along a cosine or a line, to 0 one step after the last, or not at
    all.
    """
    warmup: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.05
    """Share of the steps over which the learning rate rises evenly. The first step's is above 0: it learns, too."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    beta2: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.95
    """AdamW's memory of squared gradients; short runs want less of it than the usual 0.999."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    batch_size: PositiveInt = 8
    """Sequences a step, over all devices."""
    accumulate: PositiveInt = 1
    """Pieces a step is computed in; the gradient stays the same."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """How sequences share a forward pass: side by side, those of like length together, or end to end in one row.
    The loss and its gradient are the same. `auto` packs where flash attention is installed on a GPU.
    """
    activation_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they computed: less memory, a third more time.
    """
    max_length: PositiveInt = 2048
    """Longest sequence in tokens; longer ones are left out and counted."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """`auto` takes bf16 where the processor multiplies it in hardware."""
    checkpoint_every: PositiveInt = 25
    """Optimiser steps between checkpoints that a killed run resumes from."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The weighted sum that the loss is."""
        if isinstance(self.loss, str):
            return (LossTerm(name=self.loss),)
        return (self.loss,) if isinstance(self.loss, LossTerm) else self.loss

    @property
    def loss_in_words(self) -> str:
        """The loss on one line."""
        return " + ".join(map(str, self.terms))
