"""What a completions server answers for a prompt of token ids, as a top-k signal.

Two forms, told apart by what was asked for:

    prompt_logprobs   vLLM: a list, one item a token of the prompt; an object from id, as text, to
                      {"logprob", "rank", "decoded_token"}
    echo              `logprobs` of an echoed prompt: `tokens` and `top_logprobs`, with ids as `token_id:17`

In both the first token has none, and the prompt's own token is listed even when it is not among the k likeliest, in
what order is not said. Nothing is filled in: whatever is missing, doubled or out of range is an error that names the
position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import orjson
import torch
from pydantic import JsonValue

from limbeck.errors import EndpointError, ModelError, Problem
from limbeck.records import Example
from limbeck.signal.types import TopKSignal

_PREFIX = "token_id:"
_SUM = 1e-3
"""How far above 1 rounding may put a sum of probabilities, and a log-probability above 0."""
_OTHER_WORDS = 0.05
"""Share of a prompt's different tokens that may read otherwise at the server: a tokenizer shows some tokens by
themselves other than within a text. Of two vocabularies nearly all differ."""
_TOLD = 3
"""Positions named of one answer."""

Words = Callable[[int], str]
"""A token's text, by our tokenizer."""


class Entry(NamedTuple):
    """A listed token."""

    id: int
    log_prob: float
    rank: int | None
    text: str | None


class Answered(NamedTuple):
    """An answer, read."""

    signal: TopKSignal
    model: str


class Wrong(Exception):  # noqa: N818 - always turned into a `Problem`
    """What is wrong at one place of an answer: found, expected."""


def read_answer(raw: bytes, example: Example, *, ask: str, k: int, vocab_size: int, words: Words) -> Answered:
    """The signal over the supervised positions of an example.

    Raises `EndpointError` with the example and the positions for an answer that is not whole, or belongs to other
    tokens, and `ModelError` for one that comes from another vocabulary.
    """
    where = f"the server's answer for example {example.id}"
    sent = [int(token) for token in example.tokens_T]
    try:
        whole = orjson.loads(raw)
        model, choice = str(whole["model"]), whole["choices"][0]
        rows = _vllm_rows(choice, sent) if ask == "prompt_logprobs" else _echoed_rows(choice, sent)
    except Wrong as wrong:
        raise _bad(where, [_problem(where, wrong)]) from None
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        found = f"{raw[:80]!r}: {type(error).__name__}: {error}"
        raise _bad(where, [Problem(where, found, "a completion with log-probabilities of the prompt")]) from None
    _refuse_other_words(where, sent, rows, words)
    picked: list[list[Entry]] = []
    problems: list[Problem] = []
    for place in range(len(sent)):
        if not example.mask_T[place]:
            continue
        try:
            picked.append(likeliest(rows[place], sent[place], k, vocab_size))
        except Wrong as wrong:
            problems.append(_problem(f"{where}, position {place} of {len(sent)}", wrong))
    if problems:
        raise _bad(where, problems)
    return Answered(top_k_signal(picked, k, vocab_size), model)


def _vllm_rows(choice: dict[str, JsonValue], sent: Sequence[int]) -> list[list[Entry]]:
    """The listed tokens of each position; none at the first, or where the server lists none."""
    echoed = choice.get("prompt_token_ids")
    if isinstance(echoed, list):
        _refuse_other_ids([int(cast("int", token)) for token in echoed], sent)
    listed = choice.get("prompt_logprobs")
    if not isinstance(listed, list):
        raise Wrong(f"prompt_logprobs: {listed!r}", "a list, as vLLM gives it; for other servers see signal.server.ask")
    if len(listed) != len(sent):
        raise Wrong(f"prompt_logprobs of {len(listed)} tokens", f"{len(sent)}, as many as were sent")
    rows = [
        [Entry(int(name), float(e["logprob"]), e.get("rank"), e.get("decoded_token")) for name, e in item.items()]
        for item in cast("list[dict]", [item or {} for item in listed])
    ]
    for place, (row, token) in enumerate(zip(rows, sent, strict=True)):
        if row and all(entry.id != token for entry in row):
            raise Wrong(f"position {place} without token {token}", "the token that was sent, among those listed")
    return rows


def _echoed_rows(choice: dict[str, JsonValue], sent: Sequence[int]) -> list[list[Entry]]:
    columns = cast("dict[str, list]", choice["logprobs"])
    tokens, listed = columns["tokens"], columns["top_logprobs"]
    if other := [token for token in tokens if not str(token).startswith(_PREFIX)]:
        raise Wrong(f"a token as {other[0]!r}", "token_id:NUMBER, which return_tokens_as_token_ids asks for")
    # What was generated comes after the prompt.
    _refuse_other_ids([_id(token) for token in tokens[: len(sent)]], sent)
    if len(listed) < len(sent):
        raise Wrong(f"top_logprobs of {len(listed)} tokens", f"at least {len(sent)}, as many as were sent")
    return [
        [Entry(_id(name), float(value), None, None) for name, value in (item or {}).items()]
        for item in listed[: len(sent)]
    ]


def _id(name: str) -> int:
    return int(name.removeprefix(_PREFIX))


def _refuse_other_ids(echoed: list[int], sent: Sequence[int]) -> None:
    if echoed == list(sent):
        return
    place = next((i for i, (a, b) in enumerate(zip(echoed, sent, strict=False)) if a != b), min(len(echoed), len(sent)))
    raise Wrong(
        f"{len(echoed)} token ids, at position {place} {echoed[place : place + 3]}",
        f"the {len(sent)} that were sent, there {list(sent[place : place + 3])}",
    )


def likeliest(row: list[Entry], own: int, k: int, vocab_size: int) -> list[Entry]:
    """The k likeliest, falling. The prompt's own token goes first among equals that have to go. Raises `Wrong`."""
    if not row:
        raise Wrong("no log-probabilities", f"{k} tokens")
    if len({entry.id for entry in row}) < len(row):
        raise Wrong("a token listed twice", "different tokens")
    if outside := [entry.id for entry in row if not 0 <= entry.id < vocab_size]:
        raise Wrong(f"token {outside[0]}", f"tokens below {vocab_size}, our vocabulary: the model there has another")
    if wrong := [entry for entry in row if not math.isfinite(entry.log_prob) or entry.log_prob > _SUM]:
        raise Wrong(f"{wrong[0].log_prob} for token {wrong[0].id}", "a log-probability, finite and at most 0")
    ranks = [entry.rank for entry in row if entry.rank is not None]
    if len(ranks) == len(row) and (gone := sorted(set(range(1, k + 1)) - set(ranks))):
        raise Wrong(f"no token of rank {gone[0]}", f"all ranks from 1 to {k}")
    if len(row) < k:
        raise Wrong(f"{len(row)} tokens", f"{k} tokens, which is signal.k")
    best = sorted(row, key=lambda entry: (-entry.log_prob, entry.id == own, entry.id))[:k]
    if (mass := math.fsum(math.exp(entry.log_prob) for entry in best)) > 1 + _SUM:
        raise Wrong(
            f"probabilities that sum to {mass:.4f}", "at most 1: log-probabilities, not processed or raw logits"
        )
    return best


def top_k_signal(picked: list[list[Entry]], k: int, vocab_size: int) -> TopKSignal:
    """The signal of rows of k entries; what they leave is the tail's."""
    log_probs = torch.tensor([[e.log_prob for e in row] for row in picked], dtype=torch.float64).reshape(-1, k)
    ids = torch.tensor([[e.id for e in row] for row in picked], dtype=torch.int64).reshape(-1, k)
    tail_N = (1 - log_probs.exp().sum(dim=1)).clamp_min(0)
    if k == vocab_size:
        tail_N.zero_()  # nothing is left out; what is left over is rounding
    return TopKSignal(ids, log_probs.float(), tail_N.float(), vocab_size)


def _refuse_other_words(where: str, sent: Sequence[int], rows: list[list[Entry]], words: Words) -> None:
    """Whether the tokens that were sent read at the server as they do here, as far as it shows them."""
    compared, other = 0, []
    shown = {e.id: e.text for row, token in zip(rows, sent, strict=True) for e in row if e.id == token and e.text}
    for token, theirs in shown.items():
        ours = words(token)
        # A piece of a character reads differently alone, and white space at the edges is a matter of taste.
        if "\ufffd" in theirs + ours or theirs.startswith("bytes:") or not theirs.strip() or not ours.strip():
            continue
        compared += 1
        if theirs.strip() != ours.strip():
            other.append(Problem(f"{where}, token {token}", repr(theirs), f"{ours!r}, as our tokenizer has it"))
    if len(other) > _OTHER_WORDS * compared:
        raise ModelError("the server's model has another vocabulary", other[:_TOLD])


def _problem(where: str, wrong: Wrong) -> Problem:
    found, expected = wrong.args
    return Problem(where, found, expected)


def _bad(where: str, problems: list[Problem]) -> EndpointError:
    more = f", {_TOLD} of {len(problems)} positions shown" if len(problems) > _TOLD else ""
    remedy = "see to the server, then run again: what it answered well is kept, and only this is asked anew"
    return EndpointError(f"an answer cannot be used{more}", [p._replace(remedy=remedy) for p in problems[:_TOLD]])
