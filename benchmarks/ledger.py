"""How fast the ledger is: sealing, appending, verifying and disclosing, with as many examples as are asked for.

    python benchmarks/ledger.py --examples 1000000
    python benchmarks/ledger.py --examples 1000000 --answers endpoints
    python benchmarks/ledger.py --examples 1000000 --answers endpoints --folder F    # kept; again: verified only

One core, with `taskset -c 0` before it. A run is written whose records are short answers of two teachers (nothing is
generated or trained): models on this machine, or a chat completions and a messages API, whose raw answers then lie in
the journal as such APIs send them. Its examples are sealed, their leaves appended, a checkpoint signed, everything
verified (each completion against its raw answer, and each leaf against its hash), and rows disclosed. Seconds are by
the clock; memory is the largest resident size of a process that does nothing but verify (VmHWM: getrusage would count
what the process that started it had).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import JsonValue

from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.ledger.canonical import canonical, digest_bytes, digest_json, digest_path, manifest
from limbeck.ledger.proofs.disclosure import check_disclosure, disclose
from limbeck.ledger.proofs.documents import document_bytes
from limbeck.ledger.sealing import leaf_hashes, seal
from limbeck.ledger.signing.checkpoints import sign_checkpoint
from limbeck.ledger.store import Ledger
from limbeck.recipe import EndpointTeacher, Recipe
from limbeck.records import Completion, Message, Prompt, Split, Verdict
from limbeck.rundir import RunDir
from limbeck.tables import write_records

_WEIGHTS = digest_bytes(b"weights")
_TEACHERS = ("wheel:one==1.0.0", "wheel:two==1.0.0")
_GROUP = 2000


def _recipe(count: int, answers: str) -> Recipe:
    told: dict[str, JsonValue] = {
        "teacher": [{"model": name, "terms": "own-model"} for name in _TEACHERS],
        "prompts": [{"kind": "self-prompt", "count": count}],
        "student": {"kind": "pruned", "layers": 2},
    }
    if answers == "endpoints":
        told = {
            "teacher": [{"kind": kind, "model": f"a-model-of-{kind}", "terms": "own-model"} for kind in _APIS],
            "prompts": [{"kind": "file", "path": "ducks.jsonl", "licence": "CC0-1.0"}],
            "student": {"kind": "pretrained", "model": "nowhere"},
            "signal": {"kind": "text"},
            "train": {"loss": "cross_entropy"},
        }
    return Recipe.model_validate({"name": "large"} | told)


_APIS = ("openai", "anthropic")


def _raw(kind: str, place: int, text: str) -> bytes:
    """An answer as the API sends it."""
    if kind == "anthropic":
        usage: dict[str, JsonValue] = {
            "input_tokens": 19,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        told: dict[str, JsonValue] = {
            "id": f"msg_{place:024d}", "type": "message", "role": "assistant", "model": "a-model-of-anthropic-2026",
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": usage | {"output_tokens": 14, "service_tier": "standard"},
        }  # fmt: skip
        return json.dumps(told).encode()
    message: JsonValue = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    details: JsonValue = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0}
    told = {
        "id": f"chatcmpl-{place:024d}", "object": "chat.completion", "created": 1_790_000_000 + place // 100,
        "model": "a-model-of-openai-2026",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 19, "completion_tokens": 14, "total_tokens": 33,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": details,
        },
        "service_tier": "default", "system_fingerprint": "fp_0123456789",
    }  # fmt: skip
    return json.dumps(told, indent=2).encode()


def _asked(count: int, journal: Journal, recipe: Recipe) -> Iterator[tuple[Prompt, Completion]]:
    """As `_records`, with answers of endpoints, read by the code that collects them."""
    teachers = [
        Endpoint(one, recipe.collect, recipe.seed) for one in recipe.teachers if isinstance(one, EndpointTeacher)
    ]
    made: list[tuple[Prompt, Answer, Endpoint]] = []
    for place in range(count):
        prompt, teacher = _prompt(place), teachers[place % 2]
        text = f"About {place % 300}, because the days are long enough."
        made.append((prompt, Answer(teacher.request(prompt, 0), _raw(_APIS[place % 2], place, text)), teacher))
        if len(made) == _GROUP or place == count - 1:
            journal.put_group([answer for _, answer, _ in made])
            created = journal.get(made[0][1].request.key).created
            yield from ((prompt, _read(prompt, answer, teacher, created)) for prompt, answer, teacher in made)
            made.clear()


def _read(prompt: Prompt, answer: Answer, teacher: Endpoint, created: datetime) -> Completion:
    said, who = teacher.parse(answer.request, answer.raw), teacher.identity
    return Completion(
        prompt_id=prompt.id, sample=0, messages=prompt.messages, text=said.text, reasoning=said.reasoning,
        finish_reason=said.finish_reason, model=said.model, teacher=who.name, provider=who.provider, route=who.route,
        weights=None, terms=who.terms, prompt_tokens=said.prompt_tokens, completion_tokens=said.completion_tokens,
        created=created, request_id=answer.request.key, response=digest_bytes(answer.raw), split=prompt.split,
        answer_id=said.answer_id, fingerprint=said.fingerprint,
    )  # fmt: skip


def _prompt(place: int) -> Prompt:
    messages = (Message(role="user", content=f"How many eggs does duck {place} lay in a year, and why?"),)
    return Prompt(
        id=Prompt.id_of(messages), messages=messages, source="ducks.jsonl", licence="CC0-1.0", split=Split.TRAIN
    )


def _records(count: int, journal: Journal) -> Iterator[tuple[Prompt, Completion]]:
    """One answer a prompt, by one teacher and the other in turn; journaled as they come."""
    made: list[tuple[Prompt, Answer, str]] = []
    for place in range(count):
        prompt = _prompt(place)
        asked: list[JsonValue] = [message.model_dump() for message in prompt.messages]
        request = Request.of({"form": "local/1", "weights": _WEIGHTS, "messages": asked, "sample": 0})
        name = _TEACHERS[place % 2]
        said = {"text": f"About {place % 300}, because the days are long enough.", "finish_reason": "stop"}
        raw = canonical({"form": "local/1", "model": name, "prompt_tokens": 9, "completion_tokens": 14} | said)
        made.append((prompt, Answer(request, raw), name))
        if len(made) == _GROUP or place == count - 1:
            journal.put_group([answer for _, answer, _ in made])
            created = journal.get(made[0][1].request.key).created
            yield from ((prompt, _completion(prompt, answer, name, created)) for prompt, answer, name in made)
            made.clear()


def _completion(prompt: Prompt, answer: Answer, name: str, created: datetime) -> Completion:
    said = {k: v for k, v in json.loads(answer.raw).items() if k != "form"}
    told = {
        "prompt_id": prompt.id, "sample": 0, "messages": prompt.messages, "reasoning": None, "teacher": name,
        "provider": "self-hosted", "route": "self-hosted", "weights": _WEIGHTS, "terms": "own-model",
        "created": created, "request_id": answer.request.key, "response": digest_bytes(answer.raw),
        "split": prompt.split,
    }  # fmt: skip
    return Completion.model_validate(told | said)


def _write(root: Path, recipe: Recipe, count: int) -> None:
    """The records of the stages before the seal, in one pass."""
    root.mkdir()
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (root / "recipe.yaml").write_text(text, encoding="utf-8")
    prompts: list[Prompt] = []
    rows: list[tuple[str, str, str]] = []

    def completions(journal: Journal) -> Iterator[Completion]:
        local = recipe.teachers[0].kind == "local"
        for prompt, completion in _records(count, journal) if local else _asked(count, journal, recipe):
            prompts.append(prompt)
            rows.append((completion.id, prompt.id, completion.teacher))
            yield completion

    with Journal(root / "journal.db") as journal:
        write_records(root / "completions.parquet", completions(journal), Completion)
    write_records(root / "prompts.parquet", prompts, Prompt)
    verdicts = (Verdict(prompt, 0, teacher, name, True, "", "") for name, prompt, teacher in rows)
    write_records(root / "verdicts.parquet", verdicts, Verdict)
    _examples(root / "examples", rows)


def _examples(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    folder.mkdir()
    tokens, mask = list(range(24)), [False] * 10 + [True] * 14
    packed = (pa.array(tokens, pa.int32()).to_numpy().astype("<i4").tobytes(), bytes(mask))
    digests = [digest_bytes(part) for part in packed]
    names = ("id", "tokens", "mask", "prompt_id", "completion", "teacher", "split")
    kinds = {"tokens": pa.list_(pa.int32()), "mask": pa.list_(pa.bool_())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    with pq.ParquetWriter(folder / "examples.parquet", schema, compression="zstd") as writer:
        for i in range(0, len(rows), 4096):
            part = rows[i : i + 4096]
            columns = [[digest_json([name, *digests]) for name, _, _ in part], [tokens] * len(part), [mask] * len(part)]
            columns += [[p for _, p, _ in part], [n for n, _, _ in part], [t for _, _, t in part]]
            writer.write_table(pa.table([*columns, ["train"] * len(part)], schema=schema))
    nothing = {"examples": 0, "tokens": 0, "supervised": 0}
    counts = {"train": {"examples": len(rows), "tokens": 24 * len(rows), "supervised": 14 * len(rows)}}
    told = {"version": 1, "tokenizer": _WEIGHTS, "templates": {}, "max_length": 2048}
    (folder / "manifest.json").write_text(json.dumps(told | {"counts": counts | {"held_out": nothing}}))


def _enter(
    ledger: Ledger, root: Path, recipe: Recipe, name: str, reads: tuple[str, ...], writes: str, **facts
) -> float:
    """Append the entry of a stage; seconds of the append alone."""
    path, started = root / writes, datetime.now(UTC)
    inputs = {read: digest_path(root / read) for read in reads}
    if path.is_dir():
        facts["manifests"] = {writes: manifest(path)}
    outputs, leaves = {writes: digest_path(path)}, leaf_hashes(root, facts)
    begun = time.perf_counter()
    ledger.append(
        stage=name, started=started, inputs=inputs, outputs=outputs, recipe=recipe.digest, facts=facts, leaves=leaves
    )
    return time.perf_counter() - begun


_VERIFY = """
import json, sys, time
from limbeck.ledger import verify
begun = time.perf_counter()
result = verify(sys.argv[1])
seconds = time.perf_counter() - begun, time.process_time()
assert result.ok, result.differences[:3]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
print(json.dumps([*seconds, int(peak) / 1024]))
"""


def measure(folder: Path, count: int, answers: str = "local") -> dict[str, float]:
    """All figures, for one number of examples; those of verifying alone where the folder holds a run."""
    root, recipe = folder / "run", _recipe(count, answers)
    told: dict[str, float] = {"examples": count}
    if not root.exists():
        told |= _made(root, recipe, count)
    done = subprocess.run([sys.executable, "-c", _VERIFY, root], check=True, capture_output=True, text=True)
    names = ("verify, seconds", "verify, processor's seconds with starting", "verify, MiB")
    told |= zip(names, json.loads(done.stdout), strict=True)
    return told | _disclosed(root, count)


def _made(root: Path, recipe: Recipe, count: int) -> dict[str, float]:
    """Write a run; figures of sealing and appending."""
    _write(root, recipe, count)
    told: dict[str, float] = {}
    with Ledger(root / "ledger.db") as ledger:
        _enter(ledger, root, recipe, "prompts", (), "prompts.parquet")
        _enter(ledger, root, recipe, "collect", ("prompts.parquet",), "completions.parquet")
        _enter(ledger, root, recipe, "curate", ("completions.parquet",), "verdicts.parquet")
        before = ("prompts.parquet", "completions.parquet", "verdicts.parquet")
        _enter(ledger, root, recipe, "render", before[1:], "examples")
        begun = time.perf_counter()
        facts = seal(recipe, RunDir(root))
        told["seal, examples a second"] = count / (time.perf_counter() - begun)
        appended = _enter(ledger, root, recipe, "seal", (*before, "examples"), "leaves.parquet", **facts)
        told["append, leaves a second"] = count / appended
        told["seal and append, examples a second"] = count / (time.perf_counter() - begun)
        sign_checkpoint(ledger, "training-intended", recipe)
    return told


def _disclosed(root: Path, count: int) -> dict[str, float]:
    """Figures of disclosures, and of sizes."""
    told: dict[str, float] = {}
    slowest, longest = 0.0, 0
    for row in range(0, count, max(1, count // 50)):
        begun = time.perf_counter()
        proof = disclose(root, row, "teacher")
        slowest = max(slowest, time.perf_counter() - begun)
        longest = max(longest, len(document_bytes(proof)))
        check_disclosure(proof)
    told["disclosure, slowest of 50, ms"], told["disclosure, longest, bytes"] = 1000 * slowest, longest
    for name in ("ledger.db", "journal.db"):
        told[f"{name}, bytes an example"] = (root / name).stat().st_size / count
    return told


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--answers", choices=["local", "endpoints"], default="local")
    parser.add_argument("--folder", type=Path, help="keep the run there, or verify the one that is there")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="limbeck-ledger-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LIMBECK_HOME"] = str(folder / "keys")
    try:
        told = measure(folder, arguments.examples, arguments.answers)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    told["this process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({name: round(value, 1) for name, value in told.items()}, indent=2))


if __name__ == "__main__":
    main()
