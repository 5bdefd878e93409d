"""CycloneDX 1.7 ML-BOM: the student as a machine-learning model, its teachers and base as components, its data sets.

The standard has no field for a teacher, a share or terms on outputs: those are properties under `limbeck:`. Field
names are those of bom-1.7.schema.json (cyclonedx.org).
"""

from __future__ import annotations

import json

from pydantic import JsonValue

from limbeck import __version__
from limbeck.errors import ModelError
from limbeck.export.card import settings_of
from limbeck.export.evidence import MadeFrom
from limbeck.export.facts import Facts, FileSeen, TeacherTold
from limbeck.export.licences import address, spdx_id
from limbeck.export.properties import PREFIX, ledger_properties, teacher_properties, use_properties
from limbeck.export.teachers import drawn, reached, source_name, written
from limbeck.models.references import HubReference, WheelReference, check_reference

Object = dict[str, JsonValue]


def cyclonedx(facts: Facts) -> str:
    """The document, as JSON text."""
    teachers = [_teacher(facts, t) for t in facts.teachers]
    names = [t.seen.name for t in facts.teachers]
    base: list[Object] = [] if facts.base in names else [_base(facts)]
    data = [_answers(facts, t) for t in facts.teachers]
    data += [_prompts(facts, place) for place in range(len(facts.evidence.sources))]
    document: Object = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{facts.serial}",
        "version": 1,
        "metadata": {
            "timestamp": f"{facts.made:%Y-%m-%dT%H:%M:%SZ}",
            "tools": {"components": [{"type": "application", "name": "limbeck", "version": __version__}]},
            "component": _student(facts, teachers + base),
            "properties": _properties(ledger_properties(facts)),
        },
        "components": [*teachers, *base, *data],
        "dependencies": _dependencies(facts, bool(base)),
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _student(facts: Facts, models: list[Object]) -> Object:
    return {
        "bom-ref": "student",
        "type": "machine-learning-model",
        "name": facts.name,
        "version": facts.version,
        "description": "A language model distilled from the answers of "
        + " and ".join(t.seen.name for t in facts.teachers),
        "licenses": _licences(facts.licence, "of the weights it started from"),
        "pedigree": {"ancestors": _ancestors(facts, models), "notes": _descent(facts)},
        "modelCard": _model_card(facts),
        "components": [_file(file) for file in facts.student],
        "externalReferences": [
            {"type": "evidence", "url": "ledger.db", "comment": f"the ledger; {facts.ledger.trust}"},
            {"type": "model-card", "url": "student/README.md"},
        ],
        "properties": _properties([(PREFIX + "manifest", facts.weights), *use_properties(facts)]),
    }


def _model_card(facts: Facts) -> Object:
    scores = [s for s in facts.evidence.scores if s.subject == "student" and s.value is not None]
    metrics: list[JsonValue] = [
        {
            "type": s.name,
            "value": f"{s.value:g}",
            "slice": f"{s.n} held-out prompts, {s.unit}",
            **(
                {}
                if s.low is None or s.high is None
                else {"confidenceInterval": {"lowerBound": f"{s.low:g}", "upperBound": f"{s.high:g}"}}
            ),
        }
        for s in scores
    ]
    refs: list[JsonValue] = [{"ref": f"answers:{t.seen.name}"} for t in facts.teachers]
    limits: list[JsonValue] = [
        "The student learned from what a model wrote; that model's mistakes and biases are in its lessons.",
        "Not measured: truth, safety and fairness of answers, benchmarks, other subjects than those of the prompts.",
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "datasets": refs,
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": limits},
        "properties": _properties([(f"{PREFIX}training:{name}", said) for name, said in settings_of(facts.evidence)]),
    }


def _ancestors(facts: Facts, components: list[Object]) -> list[JsonValue]:
    """Teachers and base once more, as the pedigree wants them: whole, and under names of their own."""
    return [one | {"bom-ref": f"ancestor:{place}"} for place, one in enumerate(components)]


def _descent(facts: Facts) -> str:
    pruned = facts.evidence.recipe.student.kind == "pruned"
    began = f"Its weights began as those of {facts.base}, {'with parts removed' if pruned else 'whole'}"
    return f"{began}. Of the ancestors with the role of a teacher it learned the answers."


def _base(facts: Facts) -> Object:
    return {
        "bom-ref": f"model:{facts.base}",
        "type": "machine-learning-model",
        "name": facts.base,
        **_identity(facts.base),
        "licenses": _licences(facts.licence, "as it declares"),
        "properties": _properties(
            [(PREFIX + "role", "base"), *([(PREFIX + "weights", facts.base_digest)] if facts.base_digest else [])]
        ),
    }


def _teacher(facts: Facts, teacher: TeacherTold) -> Object:
    own = facts.base == teacher.seen.name
    told: Object = {
        "bom-ref": f"model:{teacher.seen.name}",
        "type": "machine-learning-model",
        "name": teacher.seen.name,
        **_identity(teacher.seen.name),
        "properties": _properties(teacher_properties(teacher)),
    }
    if teacher.terms:
        told["supplier"] = {"name": teacher.terms.holder}
        reference: Object = {
            "type": "license",
            "url": address(teacher.terms.address),
            "comment": f"terms {teacher.terms.id}",
        }
        told["externalReferences"] = [reference]
    if own:
        told["licenses"] = _licences(facts.licence, "as it declares")
    return told


def _answers(facts: Facts, teacher: TeacherTold) -> Object:
    name = f"answers of {teacher.seen.name}"
    file = next(file for file in facts.tables if file.name == "completions.parquet")
    return {
        "bom-ref": f"answers:{teacher.seen.name}",
        "type": "data",
        "name": name,
        "description": f"{teacher.rows} training examples, {teacher.tokens} supervised tokens that the model wrote "
        f"{written(teacher.first, teacher.last)}; {reached(teacher.seen)}. {drawn(facts.evidence)}",
        "hashes": [{"alg": "SHA-256", "content": file.sha256}],
        "licenses": [_terms(teacher)],
        "data": [
            {
                "type": "dataset",
                "name": name,
                "contents": {"url": file.name, "properties": _properties([(PREFIX + "sha256", file.sha256)])},
                "description": "synthetic: written by a language model",
            }
        ],
        "properties": _properties(
            [
                (PREFIX + "share", f"{teacher.share:.6f}"),
                (PREFIX + "supervised-tokens", str(teacher.tokens)),
                (PREFIX + "terms", teacher.seen.terms),
            ]
        ),
    }


def _prompts(facts: Facts, place: int) -> Object:
    source = facts.evidence.sources[place]
    file = next(file for file in facts.tables if file.name == "prompts.parquet")
    by = f", written by {source.writer}" if source.writer else ""
    told = f"{source.train} prompts to train on and {source.held_out} held out{by}"
    lineage: Object = {"pedigree": {"ancestors": [*map(_made_from, source.made_from)]}} if source.made_from else {}
    return {
        **lineage,
        "bom-ref": f"prompts:{place}",
        "type": "data",
        "name": f"prompts from {source_name(source.source)}",
        "description": told,
        "licenses": _licences(source.licence, "as the recipe declares"),
        "data": [
            {"type": "dataset", "name": source_name(source.source), "contents": {"url": file.name}, "description": told}
        ],
    }


def _made_from(rows: MadeFrom) -> Object:
    """What a model wrote prompts from."""
    return {
        "type": "data",
        "name": source_name(rows.source),
        "licenses": _licences(rows.licence, "as the recipe declares"),
        "properties": _properties([(PREFIX + "parent-kind", rows.kind)]),
    }


def _terms(teacher: TeacherTold) -> Object:
    """The terms that the recipe says the outputs are used under."""
    inner: Object = {"name": teacher.seen.terms, "acknowledgement": "declared"}
    if teacher.terms:
        inner["url"] = address(teacher.terms.address)
    return {"license": inner}


def _licences(licence: str | None, note: str) -> list[JsonValue]:
    known = spdx_id(licence) if licence else None
    inner: Object = {"id": known} if known else {"name": licence or "unknown"}
    inner["acknowledgement"] = "declared"
    inner["properties"] = _properties([(PREFIX + "licence", note)])
    return [{"license": inner}]


def _identity(reference: str) -> Object:
    """Version and package URL, where a reference says them."""
    try:
        said = check_reference(reference)
    except ModelError:  # a model behind an endpoint, or a directory that is gone
        return {}
    if isinstance(said, WheelReference):
        return {"version": said.version, "purl": f"pkg:pypi/{said.name}@{said.version}"}
    if isinstance(said, HubReference):
        return {"version": said.revision, "purl": f"pkg:huggingface/{said.repository}@{said.revision}"}
    return {}


def _file(file: FileSeen) -> Object:
    return {"type": "file", "name": file.name, "hashes": [{"alg": "SHA-256", "content": file.sha256}]}


def _dependencies(facts: Facts, base: bool) -> list[JsonValue]:
    models = [f"model:{facts.base}"] if base else []
    models += [f"model:{t.seen.name}" for t in facts.teachers]
    answers = [f"answers:{t.seen.name}" for t in facts.teachers]
    prompts: list[JsonValue] = [f"prompts:{n}" for n in range(len(facts.evidence.sources))]
    return [
        {"ref": "student", "dependsOn": [*models, *answers]},
        *({"ref": f"answers:{t.seen.name}", "dependsOn": [f"model:{t.seen.name}", *prompts]} for t in facts.teachers),
    ]


def _properties(told: list[tuple[str, str]]) -> list[JsonValue]:
    return [{"name": name, "value": value} for name, value in told]
