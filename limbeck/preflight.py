"""Everything that can be checked before anything is spent. Nothing is written but the model cache.

Cheap checks come first: no model is fetched for a recipe whose prompt file is wrong. Of the checks that are
made, all problems come in one error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.curate.tools import refuse_tools
from limbeck.errors import InputError, ModelError, Problem, RecipeError
from limbeck.ledger.canonical import digest_file
from limbeck.recipe import (
    DatasetPrompts,
    EndpointTeacher,
    FilePrompts,
    FileTeacher,
    LocalTeacher,
    PretrainedStudent,
    PrunedStudent,
    Recipe,
)
from limbeck.recipe.prompts import WrittenPrompts, rows_of
from limbeck.records import Digest
from limbeck.terms.stage import refuse_before

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from limbeck.models import Precision

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "gguf",
    "huggingface_hub",
    "matplotlib",
)
"""What a run needs of the extra `train`: found missing now, not at the last stage."""


_FOR_ENDPOINTS = ("aiohttp", "genai_prices", "orjson")
"""What teachers behind endpoints need: the extra `collect`."""


def preflight(recipe: Recipe, *, answered: bool = False, unasked: bool = False) -> dict[str, Digest]:
    """Check prompts, terms and models; gives the digests of what lies outside RUN, by `prompts:PATH`, `answers:PATH`,
    `waiver:PATH`, `teacher:NAME` and `student:REF`. Where all answers are there already, the gate rules on them by the
    days they were generated, and nothing is said of today. Where nothing was asked yet (`unasked`), the endpoints' keys
    are read too.

    Raises `PromptError` or `ModelError`, or `InputError` where both kinds of thing are wrong; `RefusedError` where the
    terms of the teachers' outputs do not let the recipe's use through.
    """
    errors: list[InputError] = []
    _check_keys(errors)
    digests = _check_prompts(recipe, errors)
    _check_terms(recipe, errors)
    _check_references(recipe, errors)
    _check_endpoints(recipe, errors, unasked)
    digests |= {f"waiver:{path}": digest_file(path) for path in recipe.waivers if Path(path).is_file()}
    _raise(errors)
    if not answered:
        refuse_before(recipe)
    _check_learning(recipe, errors)
    _check_server(recipe, errors)
    _check_told(recipe, errors)
    digests |= _check_models(recipe, errors, answered)
    if not answered and not errors:
        refuse_tools(recipe)
    _raise(errors)
    return digests


def _check_keys(errors: list[InputError]) -> None:
    """What signs the ledger and salts its leaves is made now, if there is none, and not after hours of collecting."""
    from limbeck.ledger.signing import keys

    for make in (keys.signing_key, keys.secret):
        try:
            make()
        except InputError as error:
            errors.append(error)


def _raise(errors: Sequence[InputError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kinds = {type(error) for error in errors}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        summary = "; ".join(dict.fromkeys(error.summary for error in errors))
        raise kind(summary, [problem for error in errors for problem in error.problems])


@contextmanager
def _noting(errors: list[InputError], key: str = "") -> Iterator[None]:
    """Notes an error, with the recipe's key in each place it names, instead of letting it end the checks. No key is for
    places that are keys already.
    """
    try:
        yield
    except InputError as error:
        told = [problem._replace(where=f"{key}{key and ': '}{problem.where}") for problem in error.problems]
        errors.append(type(error)(error.summary, told))


def _check_prompts(recipe: Recipe, errors: list[InputError]) -> dict[str, Digest]:
    """Read every row of every prompt file, and count whether some can be held out and some trained on."""
    from limbeck.collect.answers import read_answers
    from limbeck.collect.digests import DigestSet
    from limbeck.collect.files import iter_file_prompts
    from limbeck.collect.split import reserve

    digests, ids, before = {}, DigestSet(), len(errors)
    if any(isinstance(source, WrittenPrompts) for source in recipe.prompts) and find_spec("rapidfuzz") is None:
        problem = Problem("this Python", "without rapidfuzz", "what compares prompts", "pip install 'limbeck[collect]'")
        errors.append(InputError("a package is missing", [problem]))
    for index, source in enumerate(recipe.prompts):
        for key, rows in rows_of(source):
            with _noting(errors, f"prompts.{index}{key and '.'}{key}"):
                for row in iter_file_prompts(rows):
                    if not key:
                        ids.add(row.id)
                if isinstance(rows, FilePrompts):
                    digests[f"prompts:{rows.path}"] = digest_file(rows.path)
    for teacher in recipe.teachers:
        if isinstance(teacher, FileTeacher):
            with _noting(errors, "teacher"):
                read_answers(teacher)
                digests[f"answers:{teacher.path}"] = digest_file(teacher.path)
    if len(errors) == before:
        own = sum(source.count for source in recipe.prompts if not isinstance(source, FilePrompts | DatasetPrompts))
        with _noting(errors, "evaluate.held_out"):
            reserve(len(ids) + own, recipe.evaluate.held_out)
    return digests


def _check_terms(recipe: Recipe, errors: list[InputError]) -> None:
    """A misspelt id is found now, not when someone asks for the terms of what was generated."""
    from limbeck.terms.terms import OWN_MODEL, UNKNOWN, find
    from limbeck.terms.waivers import read_waivers

    with _noting(errors):
        read_waivers(recipe)
    for index, source in enumerate(recipe.prompts):
        if isinstance(source, FilePrompts) and source.terms not in (None, OWN_MODEL, UNKNOWN):
            with _noting(errors, f"prompts.{index}.terms"):
                find(source.terms)
    for index, teacher in enumerate(recipe.teachers):
        if teacher.terms not in (OWN_MODEL, UNKNOWN):
            key = f"teacher.{index}.terms" if isinstance(recipe.teacher, tuple) else "teacher.terms"
            with _noting(errors, key):
                find(teacher.terms)
    server = recipe.signal.server if recipe.signal.kind == "top_k" else None
    if server is not None and server.terms not in (None, OWN_MODEL, UNKNOWN):
        with _noting(errors, "signal.server.terms"):
            find(server.terms)


def _check_references(recipe: Recipe, errors: list[InputError]) -> None:
    """What can be said of the models before one is fetched."""
    from limbeck.models import check_reference

    if recipe.train.adapter and find_spec("peft") is None:
        remedy = "pip install 'limbeck[adapter]', or remove train.adapter"
        problem = Problem("train.adapter", "this Python is without peft", "what makes adapters", remedy)
        errors.append(ModelError("a package is missing", [problem]))
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        problem = Problem(
            "this Python",
            f"without {', '.join(missing)}",
            "what running a model needs",
            "pip install 'limbeck[train]'",
        )
        errors.append(ModelError("packages are missing", [problem]))
    for key, ref, _ in _models(recipe):
        with _noting(errors, key):
            check_reference(ref)


def _check_endpoints(recipe: Recipe, errors: list[InputError], unasked: bool) -> None:
    """What endpoints need, prices where there is a cap, and keys where nothing was asked yet. Else keys are read when
    they are needed: a run whose answers are all journaled needs none.
    """
    endpoints = [teacher for teacher in recipe.teachers if isinstance(teacher, EndpointTeacher)]
    if not endpoints:
        return
    if missing := [name for name in _FOR_ENDPOINTS if find_spec(name) is None]:
        found, remedy = f"without {', '.join(missing)}", "pip install 'limbeck[collect]'"
        errors.append(InputError("packages are missing", [Problem("this Python", found, "what HTTP needs", remedy)]))
        return
    if recipe.collect.ray is not None and find_spec("ray") is None:
        problem = Problem("collect.ray", "this Python is without ray", "it", "pip install 'limbeck[ray]'")
        errors.append(InputError("a package is missing", [problem]))
    from limbeck.collect.endpoints.keys import read_key
    from limbeck.collect.endpoints.prices import prices_of

    for teacher in endpoints if unasked else ():
        try:
            read_key(teacher)
        except InputError as error:
            errors.append(error)
    unknown = [t for t in endpoints if recipe.collect.budget.money is not None and prices_of(t) is None]
    for teacher in unknown:
        found = f"{teacher.model} at {teacher.base_url}, whose prices nobody says"
        expected = "prices, since collect.budget.money is a cap"
        remedy = "add price: {input: ..., output: ...} in US dollars per million tokens (0 for one's own), or no cap"
        errors.append(InputError("a cap needs prices", [Problem("teacher.price", found, expected, remedy)]))


def _models(recipe: Recipe) -> Iterator[tuple[str, str, Precision]]:
    """Every model that is run here: its key in the recipe, its reference, the precision it runs in."""
    many = isinstance(recipe.teacher, tuple)
    for index, teacher in enumerate(recipe.teachers):
        if isinstance(teacher, LocalTeacher):
            yield f"teacher.{index}.model" if many else "teacher.model", teacher.model, teacher.precision
    if isinstance(recipe.student, PretrainedStudent):
        yield "student.model", recipe.student.model, recipe.train.precision


def _check_models(recipe: Recipe, errors: list[InputError], answered: bool) -> dict[str, Digest]:
    from limbeck.models import load_config, load_tokenizer, refuse_other_tokenizer, resolve, template_digest

    digests: dict[str, Digest] = {}
    first: tuple[str, PreTrainedTokenizerFast] | None = None
    for key, ref, precision in _models(recipe):
        words = config = None
        with _noting(errors, key):
            digests[f"{'student' if key == 'student.model' else 'teacher'}:{ref}"] = resolve(ref).digest
            words = load_tokenizer(ref)
        if words is None:
            continue
        with _noting(errors, key):
            # Answers of a teacher whose weights are not here are rendered with the student's template.
            if key != "student.model" or any(recipe.words_of(t) == ref for t in recipe.teachers):
                template_digest(words)
        with _noting(errors, key):
            if first:
                refuse_other_tokenizer(f"{ref} beside {first[0]}", first[1], words)
        first = first or (ref, words)
        with _noting(errors, key):
            config = load_config(ref, precision)
            width = config.get_text_config().vocab_size
            if len(words) > width:
                raise _narrow(ref, width, len(words))
        if recipe.signal.kind == "top_k" and recipe.signal.k > len(words):
            problem = Problem("signal.k", str(recipe.signal.k), f"at most {len(words)}, the tokens of {ref}")
            errors.append(RecipeError("a signal larger than the vocabulary", [problem]))
        if (
            config is not None
            and isinstance(recipe.student, PrunedStudent)
            and key in ("teacher.model", "teacher.0.model")
        ):
            with _noting(errors):
                _check_pruning(ref, recipe.student, config, answered)
    return digests


def _check_learning(recipe: Recipe, errors: list[InputError]) -> None:
    """Whether the loss can be computed from the signal, and the signal had while training."""
    from limbeck.train.losses import check_pairing
    from limbeck.train.stage import loss_of

    with _noting(errors, "train.loss"):
        local = len(recipe.local_teachers) == len(recipe.teachers)
        one = ("hidden",) if len(recipe.teachers) == 1 else ()
        check_pairing(
            loss_of(recipe.train),
            recipe.signal.kind,
            allow_biased=recipe.train.allow_biased,
            kinds=("text", "sampled", "top_k", *one) if local else ("text", "top_k"),
        )
    problems = []
    if recipe.signal.kind == "hidden" and len(recipe.teachers) > 1:
        remedy = "use signal: {kind: sampled}, which stores what each teacher says, or name one teacher"
        problems.append(Problem("signal.kind", f"hidden with {len(recipe.teachers)} teachers", "one teacher", remedy))
    if recipe.train.on_policy and recipe.signal.kind != "hidden":
        found, expected = (
            f"on_policy with signal.kind: {recipe.signal.kind}",
            "a live teacher, to say what it would have said",
        )
        problems.append(Problem("train.on_policy", found, expected, "set signal: {kind: hidden}"))
    if recipe.signal.kind in ("sampled", "top_k"):
        problems += [
            Problem(
                "train.loss",
                f"{term} beside train.temperature: {recipe.train.temperature:g}",
                "one temperature, which the stored probabilities are taken at",
                "remove the term's, or set train.temperature to it",
            )
            for term in recipe.train.terms
            if term.on == "signal" and term.temperature not in (None, recipe.train.temperature)
        ]
    if recipe.train.on_policy and any(term.on == "text" for term in recipe.train.terms):
        expected = "terms on the signal: the student's own text is nothing to imitate"
        problems.append(
            Problem("train.loss", "a term on text, with on_policy", expected, "remove the term, or on_policy")
        )
    if problems:
        errors.append(RecipeError("what the student is to learn from does not fit together", problems))


def _check_server(recipe: Recipe, errors: list[InputError]) -> None:
    """Whether a server that is to say the log-probabilities can be asked, and says what the loss needs."""
    if recipe.signal.kind != "top_k" or not (server := recipe.signal.server):
        return
    where, problems = "signal.server", []
    if missing := [name for name in ("aiohttp", "orjson") if find_spec(name) is None]:
        found, expected = f"this Python without {', '.join(missing)}", "what asking a server needs"
        problems.append(Problem(where, found, expected, "pip install 'limbeck[collect]'"))
    else:
        from limbeck.signal.endpoint import problem_of_key

        problems += [problem] if (problem := problem_of_key(server)) else []
    if recipe.train.temperature != 1:
        found = f"{recipe.train.temperature:g} with signal.server"
        expected = "1: a server gives probabilities at temperature 1, and without the tail they cannot be softened"
        remedy = "set train.temperature: 1, or leave signal.server out and run the teacher here"
        problems.append(Problem("train.temperature", found, expected, remedy))
    if len(recipe.teachers) > 1:
        found, expected = f"one server with {len(recipe.teachers)} teachers", "the one teacher that it runs"
        problems.append(Problem(where, found, expected, "name one teacher"))
    if problems:
        errors.append(RecipeError("the server cannot say what the student is to learn from", problems))


def _check_told(recipe: Recipe, errors: list[InputError]) -> None:
    """Whether the answers will say what the student is to learn from."""
    signal, problems = recipe.signal, []
    if signal.kind != "top_k" or signal.source != "answers":
        return
    asked = recipe.collect.logprobs
    if asked is None or asked < signal.k:
        remedy = f"set collect.logprobs: {signal.k}, or lower signal.k"
        problems.append(Problem("collect.logprobs", str(asked), f"at least signal.k, {signal.k}", remedy))
    if signal.k < 2:
        problems.append(Problem("signal.k", "1", "at least 2 with source: answers", "raise it"))
    if signal.server is not None:
        remedy = "remove signal.server, or source: answers"
        problems.append(Problem("signal.server", "a server, with source: answers", "one of them", remedy))
    if recipe.train.temperature != 1:
        found, expected = (
            f"{recipe.train.temperature:g} with source: answers",
            "1: without the tail nothing is softened",
        )
        problems.append(Problem("train.temperature", found, expected, "set train.temperature: 1"))
    if problems:
        errors.append(RecipeError("the answers cannot say what the student is to learn from", problems))


def _narrow(ref: str, width: int, tokens: int) -> ModelError:
    problem = Problem(
        ref,
        f"vocab_size {width}",
        f"at least {tokens}, the tokens its tokenizer has",
        "take the tokenizer that belongs to the model",
    )
    return ModelError("a model is narrower than its tokenizer", [problem])


def _check_pruning(ref: str, student: PrunedStudent, config: PreTrainedConfig, answered: bool) -> None:
    """Whether the teacher can be made as small as asked; its weights are not loaded for that. A recipe that removes
    nothing is gone on with where it was answered already.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from limbeck.student.wanted import refuse_whole, wanted
    from limbeck.student.width import check_width

    size = wanted(student, config, ref)
    if not answered:
        refuse_whole(student, config, ref)
    if size.width is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_width(model, size.width)
