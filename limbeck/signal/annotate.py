"""The annotate stage: RUN/examples and the teachers to RUN/signals.

A teacher that a server runs is asked by `served`; what follows is about teachers that run here.

A batch of training examples goes through the teacher's decoder once; only the hidden states at positions
whose next token is supervised go through its head, `head.CHUNK` of them at a time; each is sampled and
encoded at once. Logits of [batch, time, vocabulary] never exist.

Which examples share a batch follows from the whole set and nothing else, and each example draws from a
random stream of its own. So a resumed run stores, to the bit, what an uninterrupted one stores.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import JsonValue
from transformers import PreTrainedModel

from limbeck import models
from limbeck.errors import StaleError
from limbeck.ledger.canonical import digest_json
from limbeck.models import amx
from limbeck.models.inference import fast_reading
from limbeck.recipe import EndpointTeacher, FileTeacher, LocalTeacher, Recipe
from limbeck.records import Digest, Example
from limbeck.render.batches import collate
from limbeck.render.examples import ExampleSet, read_examples
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed
from limbeck.signal.codec import A, Codec, S
from limbeck.signal.head import CHUNK, head_logits, hidden_states
from limbeck.signal.manifest import ServerIdentity, SignalKey
from limbeck.signal.store import Planned, SignalStore, SignalWriter, write_manifest_only
from limbeck.signal.stored import CODECS, StoredArrays, codec_of

_BATCH = 4096
"""Tokens of a batch, padding counted; an example that is longer goes alone."""
_SHARDS = 32
"""About how many shards a small set makes: what a kill can cost is one of them."""
_SHARD_MIN, _SHARD_MAX = 2048, 65536
"""Positions of a shard."""

Batch = list[Example]


def annotate(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write what the teachers say about every supervised position of the training examples.

    Signals that are there already and are what they should be are left as they are.
    """
    started, examples = time.monotonic(), read_examples(run / "examples")
    key = signal_key(recipe, examples)
    plan = plan_shards(examples.train, [t.name for t in recipe.teachers])
    written = 0
    if not _there(run / "signals", key, examples):
        if key.kind not in CODECS:
            write_manifest_only(run / "signals", key, examples.train)
        elif key.server:
            written = _write_served(recipe, run, key, plan)
        elif key.source:
            written = _write_told(recipe, run, key, plan)
        else:
            written = _write(recipe, run, key, plan)
    store = SignalStore.open(run / "signals", expect=key, examples=examples.train)
    server = recipe.signal.server if recipe.signal.kind == "top_k" else None
    return (
        _facts(store)
        | ({"server_terms": server.terms} if server and server.terms else {})
        | {
            "shards": len(store.manifest.shards),
            "shards_from_an_earlier_attempt": len(store.manifest.shards) - written,
            "padding": _padding(plan),
            "seconds": time.monotonic() - started,
        }
    )


def signal_key(recipe: Recipe, examples: ExampleSet) -> SignalKey:
    """What the signals of this recipe and these examples are made from. Loads no weights, and asks no server: what one
    says of itself is added when it is asked.

    The vocabulary is what the tokenizer can write: rows of a head beyond it are padding, at every teacher.
    """
    settings = recipe.signal
    words = models.load_tokenizer(recipe.words_of(recipe.teachers[0]))
    key = SignalKey(
        kind=settings.kind,
        tokenizer=examples.manifest.tokenizer,
        templates=examples.manifest.templates,
        teachers={},
        examples=SignalKey.digest_of(examples.train),
        vocab_size=len(words),
        seed=recipe.seed,
    )
    match settings.kind:
        case "sampled":
            key = key.model_copy(update={"tau": settings.tau, "temperature": recipe.train.temperature})
        case "top_k":
            key = key.model_copy(update={"k": settings.k, "temperature": recipe.train.temperature})
            if settings.source == "answers":
                unmatched = "text" if settings.unmatched == "text" else None
                key = key.model_copy(update={"source": "answers", "unmatched": unmatched})
            if server := settings.server:
                named = ServerIdentity(base_url=server.base_url, model=server.model, ask=server.ask)
                return key.model_copy(update={"server": named})
    local = recipe.local_teachers
    widths = [models.load_config(t.model, t.precision).get_text_config().vocab_size for t in local]
    update = {"teachers": {t.name: _who(t) for t in recipe.teachers}, "vocab_size": min([len(words), *widths])}
    if settings.kind != "text" and local:
        precisions = {str(models.precision_dtype(t.precision)).removeprefix("torch.") for t in local}
        update["precision"] = ", ".join(sorted(precisions))
    return key.model_copy(update=update)


def _who(teacher: LocalTeacher | FileTeacher | EndpointTeacher) -> Digest:
    """Digest of a teacher's weights, or of its address and name where they are not here."""
    if isinstance(teacher, LocalTeacher):
        return models.resolve(teacher.model).digest
    if isinstance(teacher, FileTeacher):
        return digest_json([teacher.kind, teacher.path, teacher.model])
    return digest_json([teacher.kind, teacher.base_url, teacher.model])


def plan_shards(examples: Sequence[Example], teachers: Sequence[str]) -> list[list[Batch]]:
    """The batches of each shard, settled by the examples alone: teacher after teacher, longest examples
    first.
    """
    order = {name: n for n, name in enumerate(teachers)}
    ranked = sorted(examples, key=lambda e: (order[e.teacher], -len(e.tokens_T), e.id))
    size = min(max(sum(e.supervised for e in examples) // _SHARDS, _SHARD_MIN), _SHARD_MAX)
    shards: list[list[Batch]] = []
    room = 0
    for batch in _batches(ranked):
        if room <= 0:
            shards.append([])
            room = size
        shards[-1].append(batch)
        room -= sum(e.supervised for e in batch)
    return shards


def planned(plan: Sequence[Sequence[Batch]]) -> list[list[Planned]]:
    """The plan in the store's words."""
    return [[Planned(e.id, e.supervised) for batch in shard for e in batch] for shard in plan]


def _batches(ranked: Sequence[Example]) -> Iterator[Batch]:
    """Neighbours of one teacher, as many as `_BATCH` tokens hold when all are as long as the first."""
    batch: Batch = []
    for example in ranked:
        full = batch and (len(batch) + 1) * len(batch[0].tokens_T) > _BATCH
        if full or (batch and batch[0].teacher != example.teacher):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _padding(plan: list[list[Batch]]) -> float:
    """Share of the positions computed that hold no token."""
    batches = [[len(e.tokens_T) for e in batch] for shard in plan for batch in shard]
    return 1 - sum(map(sum, batches)) / max(1, sum(len(b) * max(b) for b in batches))


def _there(directory: Path, key: SignalKey, examples: ExampleSet) -> bool:
    """Whether whole and fitting signals are there: an attempt may have been killed between its last two
    steps.
    """
    try:
        SignalStore.open(directory, expect=key, examples=examples.train)
    except StaleError:
        return False
    return True


def _write(recipe: Recipe, run: RunDir, key: SignalKey, plan: list[list[Batch]]) -> int:
    """Write the shards that are not written yet; returns how many."""
    codec, teachers = codec_of(key), {t.name: t for t in recipe.local_teachers}
    models.keep_memory()
    writer = SignalWriter(run / "signals", key, planned(plan))
    todo = writer.unwritten()
    positions = sum(e.supervised for n in todo for batch in plan[n] for e in batch)
    # By the whole plan, so that a resumed run computes as the one that was killed did. On a CPU nothing is compiled by
    # torch: reading gains a tenth by that, which hardly repays the time it takes.
    tokens = sum(len(e.tokens_T) for shard in plan for batch in shard for e in batch)
    with ExitStack() as stack:
        line = stack.enter_context(run.progress.line("annotate", positions, "positions"))
        stack.enter_context(amx.for_training(tokens))
        reading, name, model = stack.enter_context(ExitStack()), None, None
        for number in todo:
            arrays: list[StoredArrays] = []
            for batch in plan[number]:
                if model is None or batch[0].teacher != name:  # one teacher comes after the other, and one is held
                    reading.close()
                    name = batch[0].teacher
                    teacher = teachers[name]
                    model = models.load_model(teacher.model, teacher.precision, models.processor().device)
                    reading.enter_context(fast_reading(model))
                arrays += annotate_batch(model, batch, codec, recipe.seed)
                line.advance(sum(e.supervised for e in batch))
            writer.write(number, arrays)
    writer.finish()
    return len(todo)


def _write_served(recipe: Recipe, run: RunDir, key: SignalKey, plan: list[list[Batch]]) -> int:
    from limbeck.signal.served import write_served  # needs aiohttp

    assert recipe.signal.kind == "top_k"
    assert recipe.signal.server
    words = models.load_tokenizer(recipe.words_of(recipe.teachers[0]))
    return write_served(recipe.signal.server, run, key, [[e for b in shard for e in b] for shard in plan], words)


def _write_told(recipe: Recipe, run: RunDir, key: SignalKey, plan: list[list[Batch]]) -> int:
    from limbeck.signal.told import write_told  # needs what endpoints need

    assert recipe.signal.kind == "top_k"
    words = models.load_tokenizer(recipe.words_of(recipe.teachers[0]))
    return write_told(recipe.signal, run, key, [[e for b in shard for e in b] for shard in plan], words)


@torch.inference_mode()
def annotate_batch(model: PreTrainedModel, examples: Sequence[Example], codec: Codec[A, S], seed: int) -> list[A]:
    """The encoded signal of each example at every position whose next token is supervised."""
    batch = collate(examples, pad_id=0).to(model.device)
    # No attention mask: padding stands to the right, where causal attention never looks from a real token.
    hidden_ND = hidden_states(model, batch.tokens_BT)[batch.predict_BT]
    streams = [torch.Generator().manual_seed(derive_seed(seed, "annotate", e.id)) for e in examples]
    parts: list[list[S]] = [[] for _ in examples]
    first = 0
    for chunk in _chunks([e.supervised for e in examples]):
        logits_CV = head_logits(model, hidden_ND[first : first + sum(size for _, size in chunk)])
        first += len(logits_CV)
        for (number, _), piece_PV in zip(chunk, logits_CV.split([size for _, size in chunk]), strict=True):
            parts[number].append(codec.from_logits(piece_PV, streams[number]))
    return [codec.encode(part, stream) for part, stream in zip(parts, streams, strict=True)]


def _chunks(counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Pieces (number of the example, positions) of at most `CHUNK` positions together. An example is cut
    only at multiples of `CHUNK` of its own, so that how it is cut does not depend on its neighbours.
    """
    chunk: list[tuple[int, int]] = []
    room = CHUNK
    for number, count in enumerate(counts):
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            if size > room:
                yield chunk
                chunk, room = [], CHUNK
            chunk.append((number, size))
            room -= size
    if chunk:
        yield chunk


def _facts(store: SignalStore) -> dict[str, JsonValue]:
    """Counts, and what is read back from the disk: mean entropy and stored mass."""
    key, counts = store.manifest.key, store.manifest.counts
    facts: dict[str, JsonValue] = {
        "kind": key.kind,
        "examples": counts.examples,
        "positions": counts.positions,
        "entries_a_position": counts.entries / max(1, counts.positions),
        "bytes_a_position": store.bytes_on_disk / max(1, counts.positions),
        "vocabulary": key.vocab_size,
    }
    if key.precision:
        facts["precision"] = key.precision
    if key.kind not in CODECS:
        return facts
    settings = {"tau": key.tau, "k": key.k, "temperature": key.temperature}
    facts |= {name: value for name, value in settings.items() if value is not None}
    if key.server:
        facts["server"] = key.server.model_dump(mode="json")
    if key.source:
        facts |= {"source": key.source, "unmatched": key.unmatched or "refuse", "answers": key.answers}
    codec, sums = codec_of(key), Counter[str]()
    for signal in store.shards():
        sums.update(codec.sums(signal))
    return facts | {name: total / max(1, counts.positions) for name, total in sums.items()}
