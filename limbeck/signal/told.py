"""Signals out of what endpoints said while they answered: the log-probabilities that came with each token.

The teacher's tokens have to be those of the example, one by one, by their ids or their bytes; and so must be the
likeliest at each place. Nothing is guessed: one token that is not the student's, and the whole answer has no signal.
What the endpoint leaves out although it wrote it, the token that ends the turn, is learned from itself: all mass on
the token that stands there, which is a draw from what the teacher would have said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from limbeck.collect.endpoints.logprobs import Piece, Told, read_logprobs
from limbeck.collect.journal import Journal
from limbeck.errors import ModelError, Problem
from limbeck.ledger.canonical import digest_json
from limbeck.recipe import TopKSignalSettings
from limbeck.records import Completion, Digest, Example
from limbeck.rundir import RunDir
from limbeck.signal.answers import Entry, Wrong, likeliest, top_k_signal
from limbeck.signal.manifest import SignalKey
from limbeck.signal.store import Planned, SignalWriter
from limbeck.signal.stored import codec_of
from limbeck.signal.top_k import TopKArrays
from limbeck.signal.types import TopKSignal
from limbeck.tables import read_records

_LISTED = 20
"""Answers that an error lists."""


class Vocabulary:
    """Our tokenizer's tokens by the bytes they stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.size = len(tokenizer)
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._bytes = _token_bytes(tokenizer)
        self._ids: dict[bytes, list[int]] = defaultdict(list)
        for number, data in self._bytes.items():
            self._ids[data].append(number)

    def is_(self, piece: Piece, number: int) -> bool:
        """Whether a token of the teacher is this one of ours: by all that is known of it."""
        ours = self._bytes.get(number)
        if piece.id is not None:
            # Servers show the text of special tokens as nothing, or not at all.
            return piece.id == number and (not piece.data or number in self.special or piece.data == ours)
        return piece.data is not None and piece.data == ours

    def id_of(self, piece: Piece) -> int:
        """Our id of a teacher's token. Raises `Wrong` for one that is not ours, or might be several of ours."""
        if piece.id is not None:
            if piece.id >= self.size or not self.is_(piece, piece.id):
                raise Wrong(f"token {piece.id} {piece.text!r}", f"{self._bytes.get(piece.id)!r}, as we have it")
            return piece.id
        found = self._ids.get(piece.data, []) if piece.data is not None else []
        if len(found) != 1:
            raise Wrong(f"{piece.text!r}", "one token of our tokenizer" + (f", not {len(found)}" if found else ""))
        return found[0]


def _token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes of every token of a byte-level or a SentencePiece vocabulary; of others nothing, so nothing matches."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = tokenizer.backend_tokenizer
    shape = f"{backend.decoder!r} {backend.pre_tokenizer!r}"
    added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}
    rest = {number: token for token, number in tokenizer.get_vocab().items() if number not in added}
    if "ByteLevel" in shape:
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return added | {n: bytes(letters[c] for c in t) for n, t in rest.items() if all(c in letters for c in t)}
    if "ByteFallback" in shape or "Metaspace" in shape or "▁" in shape:
        return added | {n: _piece_bytes(t) for n, t in rest.items()}
    return added


def _piece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def signal_of(told: Sequence[Told], example: Example, k: int, ours: Vocabulary, vocab_size: int) -> TopKSignal:
    """The signal over an example's supervised positions. Raises `Wrong` where a token is not ours."""
    own_N = [int(token) for token in example.tokens_T[example.mask_T]]
    unsaid_end = len(told) == len(own_N) - 1 and own_N[-1] in ours.special
    if len(told) != len(own_N) and not unsaid_end:
        raise Wrong(f"{len(told)} tokens with log-probabilities", f"{len(own_N)}, the supervised tokens")
    rows = []
    for place, (one, number) in enumerate(zip(told, own_N, strict=False)):
        if not ours.is_(one.own, number):
            raise Wrong(f"token {place} of the answer: {one.own.text!r}", f"token {number}, as our tokenizer reads it")
        listed = [Entry(ours.id_of(piece), piece.logprob, None, None) for piece in _best(one.top, k)]
        rows.append(likeliest(listed, number, k, vocab_size))
    said = top_k_signal(rows, k, vocab_size)
    return _with(said, text_signal(own_N[len(told) :], k, vocab_size)) if unsaid_end else said


def _best(top: Sequence[Piece], k: int) -> list[Piece]:
    """The k likeliest: a token beyond them need not be ours, it is part of the tail."""
    return sorted(top, key=lambda piece: -piece.logprob)[:k]


def text_signal(own_N: Sequence[int], k: int, vocab_size: int) -> TopKSignal:
    """All mass on the tokens that stand there; the other ids that a row needs have none."""
    ids = [[number, *(i for i in range(k + 1) if i != number)][:k] for number in own_N]
    log_probs_NK = torch.full((len(own_N), k), -torch.inf)
    log_probs_NK[:, 0] = 0
    ids_NK = torch.tensor(ids, dtype=torch.int64).reshape(-1, k)
    return TopKSignal(ids_NK, log_probs_NK, torch.zeros(len(own_N)), vocab_size)


def _with(first: TopKSignal, second: TopKSignal) -> TopKSignal:
    from limbeck.signal.types import concat

    return concat([first, second])


def write_told(
    settings: TopKSignalSettings,
    run: RunDir,
    key: SignalKey,
    plan: Sequence[Sequence[Example]],
    tokenizer: PreTrainedTokenizerFast,
) -> int:
    """Write the shards that are not written yet; returns how many.

    Raises `ModelError` with the answers whose tokens are not the student's, unless the recipe lets those be learned
    from their words.
    """
    asked = {c.id: (c.request_id, c.response) for c in read_records(run / "completions.parquet", Completion)}
    key = key.model_copy(update={"answers": _digest(asked, [e for shard in plan for e in shard])})
    writer = SignalWriter(run / "signals", key, [[Planned(e.id, e.supervised) for e in s] for s in plan])
    codec, stream, ours = codec_of(key), torch.Generator(), Vocabulary(tokenizer)
    todo, problems, refused = writer.unwritten(), list[Problem](), 0
    with (
        Journal(run / "journal.db") as journal,
        run.progress.line("annotate", sum(e.supervised for n in todo for e in plan[n]), "positions") as line,
    ):
        for number in todo:
            arrays: list[TopKArrays] = []
            for example in plan[number]:
                raw = journal.get(asked[example.completion][0]).raw
                signal = _signal(raw, example, settings, ours, key.vocab_size)
                if isinstance(signal, Problem):
                    refused += 1
                    problems += [signal] if len(problems) < _LISTED else []
                elif not refused:
                    arrays.append(codec.encode([signal], stream))
                line.advance(example.supervised)
            if not refused:
                writer.write(number, arrays)
    if refused:
        listed = f", the first {_LISTED} listed" if refused > _LISTED else ""
        raise ModelError(f"{refused} answers have no log-probabilities of the student's tokens{listed}", problems)
    writer.finish()
    return len(todo)


def _signal(
    raw: bytes, example: Example, settings: TopKSignalSettings, ours: Vocabulary, vocab_size: int
) -> TopKSignal | Problem:
    told = read_logprobs(raw)
    try:
        if told is None:
            raise Wrong("no log-probabilities", "those that collect.logprobs asks for")
        return signal_of(told, example, settings.k, ours, vocab_size)
    except Wrong as wrong:
        if settings.unmatched == "text":
            own_N = [int(token) for token in example.tokens_T[example.mask_T]]
            return text_signal(own_N, settings.k, vocab_size)
        found, expected = wrong.args
        remedy = "take a student with the teacher's tokenizer and chat template, or set signal.unmatched: text"
        where = f"prompt {example.prompt_id[:19]}, teacher {example.teacher}"
        return Problem(where, found, expected, remedy)


def _digest(asked: dict[Digest, tuple[Digest, Digest]], examples: Sequence[Example]) -> Digest:
    return digest_json([asked[example.completion][1] for example in examples])
