"""Croissant 1.1: the training set as the Parquet files of the run, with fields for responsible AI and provenance.

Files are named without a directory: the document lies beside them. Prompts, answers and verdicts are record sets; an
answer refers to its prompt. Who wrote what, from what and when is told with PROV; how the data came to be, with
Croissant's RAI vocabulary. Shares, terms and the ledger stand under `limbeck:`.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.export.data_card import licence_of_data
from limbeck.export.evidence import PromptSource
from limbeck.export.facts import Facts, FileSeen, TeacherTold
from limbeck.export.licences import address, spdx_id
from limbeck.export.properties import ledger_properties, teacher_properties, use_properties
from limbeck.export.teachers import drawn, reached, source_name, written

Object = dict[str, JsonValue]

_CONTEXT: Object = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "limbeck": "urn:x-limbeck:terms:",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
    "usageInfo": "sc:usageInfo",
}
"""The terms of Croissant 1.1, with PROV's and ours."""


_TIMEFRAME = ("rai:dataCollectionTimeframe", "rai:dataCollectionTimeFrame")
"""The first is what the vocabulary has, the second what mlcroissant and the spec's prose call it."""


class _Column(NamedTuple):
    name: str
    kind: str
    says: str


_TEXT, _WHOLE, _YES, _TIME = "sc:Text", "sc:Integer", "sc:Boolean", "sc:DateTime"
_ANSWER = (
    _Column("prompt_id", _TEXT, "The prompt that was answered"),
    _Column("sample", _WHOLE, "Number of the answer to that prompt"),
    _Column("teacher", _TEXT, "The model that was asked"),
)
"""What an answer is named by."""
_RECORDS = {
    "prompts": (
        _Column("id", _TEXT, "Digest of the messages"),
        _Column("messages", _TEXT, "Chat messages, as JSON"),
        _Column("source", _TEXT, "The file, or the model that wrote the prompt"),
        _Column("licence", _TEXT, "Licence of the source"),
        _Column("split", _TEXT, "train or held_out"),
        _Column("writer", _TEXT, "The teacher that wrote the prompt, if one did"),
    ),
    "completions": (
        *_ANSWER,
        _Column("text", _TEXT, "The answer"),
        _Column("reasoning", _TEXT, "What the teacher thought before, where it says so apart"),
        _Column("finish_reason", _TEXT, "Why the answer ended"),
        _Column("model", _TEXT, "The model that answered, by its own word"),
        _Column("provider", _TEXT, "Who ran it"),
        _Column("route", _TEXT, "How it was reached"),
        _Column("weights", _TEXT, "Digest of its weights, where they were at hand"),
        _Column("terms", _TEXT, "Terms that the answer is used under"),
        _Column("created", _TIME, "When it was written down"),
        _Column("batch", _TEXT, "The provider's batch in which it came, if it came in one"),
        _Column("split", _TEXT, "train or held_out"),
    ),
    "verdicts": (
        *_ANSWER,
        _Column("keep", _YES, "Whether the answer was kept"),
        _Column("filter", _TEXT, "What dropped it"),
        _Column("reason", _TEXT, "Why"),
    ),
}


def croissant(facts: Facts) -> str:
    """The document, as JSON text."""
    licence = licence_of_data(facts)
    known = spdx_id(licence) if licence else None
    shares = ", ".join(f"{t.seen.name} {100 * t.share:.4g} %" for t in facts.teachers)
    document: Object = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": f"training-set-of-{facts.name}",
        "description": f"Prompts, and answers of language models, from which {facts.name} was trained. "
        f"Shares of the supervised tokens: {shares}.",
        "version": f"1.0.0+{facts.version}",
        "license": f"https://spdx.org/licenses/{known}" if known else "unknown",
        "url": f"urn:uuid:{facts.serial}",
        "dateCreated": f"{facts.made:%Y-%m-%d}",
        "datePublished": f"{facts.made:%Y-%m-%d}",
        "citeAs": f"Training set of {facts.name}, ledger root sha256:{facts.ledger.root}",
        "creator": [_person(key) for key in facts.ledger.keys] or [_person(None)],
        "distribution": [_distributed(file) for file in facts.tables if file.name.removesuffix(".parquet") in _RECORDS],
        "recordSet": [_record_set(name) for name in _RECORDS],
        **_rai(facts),
        "prov:wasGeneratedBy": [_collecting(t) for t in facts.teachers],
        "prov:wasDerivedFrom": [_source(s) for s in facts.evidence.sources],
        "prov:wasAttributedTo": [_agent(t) for t in facts.teachers],
        **_usage(facts),
        **_told([*ledger_properties(facts), *use_properties(facts)]),
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _person(key: str | None) -> Object:
    name = f"holder of key ed25519:{key}" if key else "unknown: the ledger is not signed"
    return {"@type": "sc:Organization", "name": name}


def _distributed(file: FileSeen) -> Object:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "contentUrl": file.name,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": "application/x-parquet",
        "sha256": file.sha256,
    }


def _record_set(name: str) -> Object:
    columns = _RECORDS[name]
    key: list[JsonValue] = [{"@id": f"{name}/{part.name}"} for part in _ANSWER]
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "key": {"@id": "prompts/id"} if name == "prompts" else key,
        "field": [_field(name, column) for column in columns],
    }


def _field(name: str, column: _Column) -> Object:
    told: Object = {
        "@type": "cr:Field",
        "@id": f"{name}/{column.name}",
        "name": column.name,
        "description": column.says,
        "dataType": column.kind,
        "source": {"fileObject": {"@id": f"{name}.parquet"}, "extract": {"column": column.name}},
    }
    if column.name == "prompt_id":
        told["references"] = {"field": {"@id": "prompts/id"}}
    return told


def _rai(facts: Facts) -> Object:
    """Responsible AI, in the words of Croissant RAI 1.0."""
    recipe = facts.evidence.recipe
    drops = ", ".join(f"{d.filter} ({d.answers})" for d in facts.evidence.dropped) or "none"
    days: list[JsonValue] = [*sorted({f"{day}" for t in facts.teachers for day in (t.first, t.last) if day})]
    return {
        "rai:dataCollection": f"{_how(facts)} {drawn(facts.evidence)}",
        "rai:dataCollectionType": _types(facts),
        **dict.fromkeys(_TIMEFRAME if days else (), days[:1] + days[-1:]),
        "rai:dataCollectionRawData": "journal.db of the run holds the raw bytes of each answer",
        "rai:dataPreprocessingProtocol": [f"Filters that dropped answers: {drops}."],
        "rai:machineAnnotationTools": [t.seen.name for t in facts.teachers],
        "rai:hasSyntheticData": True,
        "rai:dataUseCases": [f"training {facts.name}: {recipe.use.purpose}, {recipe.use.distribution}"],
        "rai:dataBiases": "Not measured. What the teachers get wrong or leave out is in their answers.",
        "rai:dataLimitations": "Whether answers are true, safe or fair was not measured.",
        "rai:personalSensitiveInformation": "Not looked for, unless a filter named above does.",
    }


def _types(facts: Facts) -> list[JsonValue]:
    """Of the values that the vocabulary recommends, those for models run here, asked over HTTP, and read from files."""
    seen = [t.seen for t in facts.teachers]
    found: list[tuple[bool, JsonValue]] = [
        (any(one.weights for one in seen), "Software Collection"),
        (any(not one.weights and not one.file for one in seen), "Web API"),
        (any(one.file for one in seen), "Secondary Data analysis"),
    ]
    return [name for there, name in found if there]


def _how(facts: Facts) -> str:
    """By which way each teacher's answers came."""
    ways = "; ".join(f"{t.seen.name}: {reached(t.seen)}, written {written(t.first, t.last)}" for t in facts.teachers)
    return f"Language models answered prompts ({ways}). Every answer was journaled before it was parsed."


def _source(source: PromptSource) -> Object:
    """Where prompts came from; of those that a model wrote, who wrote them, and from what."""
    told: Object = {"@type": "prov:Entity", "prov:label": source_name(source.source)}
    if source.writer:
        told["prov:wasAttributedTo"] = {"@type": "prov:SoftwareAgent", "prov:label": source.writer}
    if source.made_from:
        told["prov:wasDerivedFrom"] = [
            {
                "@type": "prov:Entity",
                "prov:label": source_name(one.source),
                "limbeck:parent-kind": one.kind,
                "limbeck:licence": one.licence,
            }
            for one in source.made_from
        ]
    return told


def _collecting(teacher: TeacherTold) -> Object:
    days = {"prov:startedAtTime": f"{teacher.first}", "prov:endedAtTime": f"{teacher.last}"} if teacher.first else {}
    return {
        "@type": "prov:Activity",
        "prov:label": f"answers of {teacher.seen.name}, {reached(teacher.seen)}",
        **days,
        "prov:wasAssociatedWith": {"@type": "prov:SoftwareAgent", "prov:label": teacher.seen.name},
    }


def _agent(teacher: TeacherTold) -> Object:
    """A teacher, with its share and terms. Several values of one name are one list."""
    return {"@type": "prov:SoftwareAgent", "prov:label": teacher.seen.name, **_told(teacher_properties(teacher))}


def _usage(facts: Facts) -> Object:
    where = [address(t.terms.address) for t in facts.teachers if t.terms]
    return {"usageInfo": list(dict.fromkeys(where))} if where else {}


def _told(properties: list[tuple[str, str]]) -> Object:
    found: dict[str, list[JsonValue]] = {}
    for name, value in properties:
        found.setdefault(name, []).append(value)
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}
