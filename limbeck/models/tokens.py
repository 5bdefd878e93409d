"""What decides how text becomes tokens: its digest, and the refusal to mix two that differ.

A student learns distributions over the teacher's vocabulary, entry by entry. So the two tokenizers must be
the same in everything that decides token ids. Equal width is not enough, and unequal width of the embeddings
does no harm: some are padded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from limbeck.errors import ModelError, Problem
from limbeck.ledger.canonical import digest_bytes, digest_json
from limbeck.models.references import refusal
from limbeck.records import Digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 4
"""Differences of one kind that an error shows; it counts the rest."""

_ROLES = ("bos_token", "eos_token", "unk_token")
"""Tokens whose role must agree. Padding is masked out everywhere, so the pad token may differ."""


def tokenizer_digest(words: PreTrainedTokenizerBase) -> Digest:
    """Digest of what decides tokenisation: the `tokenizers` JSON without padding and truncation, which are
    settings of a call, and the roles of special tokens.
    """
    roles = {name: str(token) for name, token in words.special_tokens_map.items()}
    return _digest(_backend_text(words), json.dumps(roles, sort_keys=True))


@lru_cache(maxsize=8)
def _digest(backend: str, roles: str) -> Digest:
    data = json.loads(backend)
    kept = {key: value for key, value in data.items() if key not in ("padding", "truncation")}
    return digest_json({"backend": kept, "roles": json.loads(roles)})


def chat_template(words: PreTrainedTokenizerBase) -> str:
    """The text of the chat template. Raises `ModelError` where there is none."""
    try:
        return words.get_chat_template()
    except ValueError:
        pass
    where = str(words.name_or_path) or type(words).__name__
    remedy = "take an instruction-tuned model, or put its chat_template.jinja beside the tokenizer"
    raise refusal(where, "a tokenizer without a chat template", "a chat template (Jinja)", remedy)


def template_digest(words: PreTrainedTokenizerBase) -> Digest:
    """Digest of the chat template's UTF-8 text. Raises `ModelError` where there is none."""
    return digest_bytes(chat_template(words).encode())


def stop_ids(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: what the tokenizer and the generation configuration call end of
    sequence, and the special token that the chat template puts after an assistant's words. Models disagree
    with themselves on it.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    configured = configured if isinstance(configured, list) else [configured]
    found = (words.eos_token_id, _end_of_turn(words), *configured)
    return frozenset(token for token in found if isinstance(token, int))


def _end_of_turn(words: PreTrainedTokenizerBase) -> int | None:
    answer = "limbeck-answer"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = words.apply_chat_template(chat, chat_template=chat_template(words), tokenize=False)
    except TemplateError:
        # The template wants other messages than these; what the configurations say has to do.
        return None
    after = str(text).rpartition(answer)[2]
    special = {id for id, token in words.added_tokens_decoder.items() if token.special}
    return next((id for id in words.encode(after, add_special_tokens=False) if id in special), None)


def refuse_other_tokenizer(where: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` with every difference if the student's tokenizer gives other token ids than the
    teacher's.

    Compared are the vocabulary, the model of the `tokenizers` JSON with its merges, normaliser and
    pre-tokenizer, added tokens, and the roles of special tokens. Not compared: decoder, post-processor and
    padding, which change no id of a rendered chat.
    """
    problems = list(_differences(where, teacher, student))
    if problems:
        raise ModelError("two models do not have the same tokenizer (found: student, expected: teacher)", problems)


def _differences(where: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Iterator[Problem]:
    remedy = "take a student of the teacher's family, or kind: pruned"
    theirs = {id: token for token, id in teacher.get_vocab().items()}
    own = {id: token for token, id in student.get_vocab().items()}
    if other := sorted(id for id in theirs.keys() | own.keys() if theirs.get(id) != own.get(id)):
        yield Problem(f"{where}: vocabulary", _listed(other, own), _listed(other, theirs), remedy)
    taught, learnt = json.loads(_backend_text(teacher)), json.loads(_backend_text(student))
    merges, others = taught["model"].pop("merges", []), learnt["model"].pop("merges", [])
    if merges != others:
        n = next(
            (n for n, (a, b) in enumerate(zip(merges, others, strict=False)) if a != b),
            min(len(merges), len(others)),
        )
        found, expected = (f"{len(m)} merges, number {n}: {m[n : n + 1] or 'none'}" for m in (others, merges))
        yield Problem(f"{where}: merges", found, expected, remedy)
    for part in ("model", "normalizer", "pre_tokenizer"):
        a, b = _essence(taught[part], taught), _essence(learnt[part], learnt)
        if a != b:
            yield Problem(f"{where}: {part}", _short(b), _short(a), remedy)
    a, b = ({token["content"]: token for token in data["added_tokens"]} for data in (taught, learnt))
    if names := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        found, expected = (_short({name: s.get(name) for name in names[:_SHOWN]}) for s in (b, a))
        yield Problem(f"{where}: {len(names)} added tokens", found, expected, remedy)
    for role in _ROLES:
        if getattr(teacher, role) != getattr(student, role):
            fix = "set it in the student's tokenizer_config.json, if the model was trained so; " + remedy
            yield Problem(f"{where}: {role}", str(getattr(student, role)), str(getattr(teacher, role)), fix)


def _backend_text(words: PreTrainedTokenizerBase) -> str:
    return words.backend_tokenizer.to_str()  # type: ignore[attr-defined]


def _listed(ids: list[int], tokens: dict[int, str]) -> str:
    some = ", ".join(f"{id}: {tokens[id]!r}" if id in tokens else f"{id}: none" for id in ids[:_SHOWN])
    return f"{len(tokens)} tokens, {len(ids)} differ ({some}{', ...' if len(ids) > _SHOWN else ''})"


def _essence(part: Any, whole: dict[str, Any]) -> Any:
    """A part of the `tokenizers` JSON without what changes no token id: the vocabulary (compared apart), how
    offsets are trimmed, empty settings, and the unknown token of a vocabulary that has every byte.
    """
    if isinstance(part, list):
        return [_essence(inner, whole) for inner in part]
    if not isinstance(part, dict):
        return part
    dropped = {"vocab", "trim_offsets"}
    if "ByteLevel" in json.dumps(whole["pre_tokenizer"]):
        dropped |= {"unk_token", "fuse_unk"}
    kept = {key: _essence(value, whole) for key, value in part.items() if key not in dropped and value}
    steps = kept.get("pretokenizers") or kept.get("normalizers")
    return steps[0] if steps and len(steps) == 1 else kept


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value else "none"
    return text if len(text) <= 240 else text[:237] + "..."
