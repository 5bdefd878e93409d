"""SPDX 3.0.1 as JSON-LD, with the profiles for AI, data sets, software and licences.

    student  --trainedOn-->          answers of each teacher  --hasDeclaredLicense--> terms
    student  --descendantOf-->       the model its weights began as
    teacher  --generates-->          its answers              --descendantOf-->       prompts
    prompts  --descendantOf-->       what a model wrote them from
    student  --contains-->           files of its weights
    student  --hasEvidence-->        the ledger

The standard has no field for a share or a verdict: those are properties under `limbeck:` in its extension for such
(CdxPropertiesExtension). Names are those of the model at spdx.org/rdf/3.0.1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from pydantic import JsonValue

from limbeck import __version__
from limbeck.export.card import settings_of
from limbeck.export.evidence import MadeFrom
from limbeck.export.facts import Facts, FileSeen, TeacherTold
from limbeck.export.licences import address, licence_ref, spdx_id
from limbeck.export.properties import PREFIX, ledger_properties, teacher_properties, use_properties
from limbeck.export.teachers import drawn, reached, source_name, written
from limbeck.ledger.canonical import canonical

Object = dict[str, JsonValue]

_CREATION = "_:creation"
_PROFILES = ("core", "software", "ai", "dataset", "simpleLicensing")
"""Not `extension`, though there are extensions: SPDX's own JSON-LD context reads that word as the property of the same
name, so the document would not conform to SPDX's SHACL shapes."""
_NOWHERE = "NOASSERTION"
"""Where something was downloaded from, when nobody recorded it."""


def spdx(facts: Facts) -> str:
    """The document, as JSON text."""
    return _Document(facts).text()


class _Document:
    """Elements by their identifiers, in the order in which they were told."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.space = f"urn:uuid:{facts.serial}#"
        self.elements: dict[str, Object] = {}
        self.signers = [self._signer(key) for key in facts.ledger.keys] or [self._signer(None)]
        self.tool = self.add("tool", "Tool", name=f"limbeck {__version__}")

    def text(self) -> str:
        """All of it."""
        student = self._student()
        for teacher in self.facts.teachers:
            model, answers = self._teacher(teacher), self._answers(teacher)
            self.relate(student, "trainedOn", [answers])
            self.relate(model, "generates", [answers])
            self.relate(answers, "descendantOf", self._prompts())
            self.relate(answers, "hasDeclaredLicense", [self._terms(teacher)])
        self.relate(student, "descendantOf", [self._base()])
        self.relate(student, "hasDeclaredLicense", [self._licence(self.facts.licence)])
        self.relate(student, "contains", [self._file(file, "model") for file in self.facts.student])
        ledger = self.add("ledger", "software_File", name="ledger.db", software_primaryPurpose="evidence")
        self.elements[ledger]["extension"] = _extension(ledger_properties(self.facts))
        self.relate(student, "hasEvidence", [ledger])
        self._document(student)
        created: Object = {
            "type": "CreationInfo",
            "@id": _CREATION,
            "specVersion": "3.0.1",
            "created": self._time(),
            "createdBy": list(self.signers),
            "createdUsing": [self.tool],
        }
        graph: list[JsonValue] = [created, *self.elements.values()]
        document = {"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld", "@graph": graph}
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"

    def add(self, name: str, kind: str, /, **values: JsonValue) -> str:
        """An element; returns its identifier. A second one of the same name is the first."""
        made = f"{self.space}{name}"
        said = {key: value for key, value in values.items() if value is not None}
        self.elements.setdefault(made, {"type": kind, "spdxId": made, "creationInfo": _CREATION, **said})
        return made

    def relate(self, source: str, kind: str, targets: Sequence[str]) -> None:
        """A relationship; with no targets there is none."""
        if targets:
            name = f"relationship-{sum(e['type'] == 'Relationship' for e in self.elements.values())}"
            self.add(name, "Relationship", **{"from": source, "relationshipType": kind, "to": list(targets)})

    def _time(self) -> str:
        return f"{self.facts.made:%Y-%m-%dT%H:%M:%SZ}"

    def _document(self, student: str) -> None:
        elements: list[JsonValue] = list(self.elements)
        self.add(
            "document",
            "SpdxDocument",
            name=f"{self.facts.name} {self.facts.version}",
            profileConformance=list(_PROFILES),
            rootElement=[student],
            element=elements,
            comment="Made from the ledger of a run. What it does not know is left out, such as when other people's "
            "models were released. Of student and data, the times of building and release are when training was done.",
        )

    def _signer(self, key: str | None) -> str:
        if key is None:
            return self.add("signer", "Agent", name="unknown: the ledger is not signed")
        identifier: Object = {
            "type": "ExternalIdentifier",
            "externalIdentifierType": "other",
            "identifier": f"ed25519:{key}",
        }
        return self.add(f"signer-{key[:16]}", "Agent", name=f"holder of key {key}", externalIdentifier=[identifier])

    def _student(self) -> str:
        facts = self.facts
        scores = [s for s in facts.evidence.scores if s.subject == "student" and s.value is not None]
        tokens = facts.tokens
        told = f"Trained on {tokens.supervised} tokens in {tokens.examples} answers of "
        told += ", ".join(f"{t.seen.name} ({100 * t.share:.4g} % of them)" for t in facts.teachers)
        if tokens.rollouts:
            told += f"; and on {tokens.rollouts} answers of its own ({tokens.own} tokens), which its teachers judged"
        told += f". Ledger root sha256:{facts.ledger.root}, {facts.ledger.trust}."
        made = self.add(
            "student",
            "ai_AIPackage",
            name=facts.name,
            software_packageVersion=facts.version,
            software_downloadLocation=_NOWHERE,
            software_primaryPurpose="model",
            releaseTime=self._time(),
            suppliedBy=self.signers[0],
            ai_typeOfModel=["transformer", "causal language model"],
            ai_informationAboutTraining=told,
            ai_hyperparameter=[_entry(name, said) for name, said in settings_of(facts.evidence)],
            ai_metric=[_entry(s.name, f"{s.value:g} ({s.unit}; {s.n} held-out prompts)") for s in scores],
            ai_limitation="Truth, safety and fairness of its answers were not measured.",
            ai_useSensitivePersonalInformation="noAssertion",
        )
        properties = [(PREFIX + "manifest", facts.weights), *use_properties(facts), *ledger_properties(facts)]
        self.elements[made]["extension"] = _extension(properties)
        return made

    def _model(self, name: str) -> str:
        return f"model-{list(dict.fromkeys([self.facts.base, *self._names()])).index(name)}"

    def _names(self) -> list[str]:
        return [t.seen.name for t in self.facts.teachers]

    def _unknown(self) -> str:
        return self.add("unknown", "Agent", name="unknown")

    def _supplier(self, teacher: TeacherTold) -> str:
        """Whose model it is: the holder of its terms, the signer where it is declared to be one's own, or unknown."""
        if teacher.terms:
            name = teacher.terms.holder
            return self.add(f"holder-{licence_ref(name)}", "Organization", name=name)
        return self.signers[0] if teacher.seen.terms == "own-model" else self._unknown()

    def _writer(self, name: str | None) -> str:
        wrote = next((teacher for teacher in self.facts.teachers if teacher.seen.name == name), None)
        return self._supplier(wrote) if wrote else self._unknown()

    def _teacher(self, teacher: TeacherTold) -> str:
        made = self.add(
            self._model(teacher.seen.name),
            "ai_AIPackage",
            name=teacher.seen.name,
            software_packageVersion=teacher.seen.weights or teacher.seen.model,
            software_downloadLocation=_NOWHERE,
            software_primaryPurpose="model",
            suppliedBy=self._supplier(teacher),
        )
        self.elements[made]["extension"] = _extension(teacher_properties(teacher))
        return made

    def _base(self) -> str:
        facts = self.facts
        made = self.add(
            self._model(facts.base),
            "ai_AIPackage",
            name=facts.base,
            software_packageVersion=facts.base_digest or "unknown",
            software_downloadLocation=_NOWHERE,
            software_primaryPurpose="model",
            suppliedBy=self._unknown() if facts.base not in self._names() else None,
        )
        self.relate(made, "hasDeclaredLicense", [self._licence(facts.licence)])
        return made

    def _answers(self, teacher: TeacherTold) -> str:
        place = self._names().index(teacher.seen.name)
        file = self._table("completions.parquet")
        how = f"Answers of a language model ({reached(teacher.seen)}), written {written(teacher.first, teacher.last)}, "
        how += f"kept by filters. {drawn(self.facts.evidence)}"
        made = self.add(
            f"answers-{place}",
            "dataset_DatasetPackage",
            name=f"answers of {teacher.seen.name}",
            dataset_datasetType=["text"],
            dataset_dataCollectionProcess=how,
            dataset_datasetSize=teacher.tokens,
            dataset_dataPreprocessing=["rendered with the chat template; the teacher's tokens are supervised"],
            dataset_hasSensitivePersonalInformation="noAssertion",
            software_packageVersion=self.facts.version,
            software_downloadLocation=_NOWHERE,
            software_primaryPurpose="data",
            builtTime=self._time(),
            releaseTime=self._time(),
            originatedBy=[self._supplier(teacher)],
            suppliedBy=self.signers[0],
            comment="Synthetic: written by a language model. The size is in supervised tokens.",
        )
        told = [("share", f"{teacher.share:.6f}"), ("supervised-tokens", str(teacher.tokens))]
        told.append(("training-examples", str(teacher.rows)))
        self.elements[made]["extension"] = _extension([(PREFIX + name, value) for name, value in told])
        self.relate(made, "hasDataFile", [file])
        return made

    def _prompts(self) -> list[str]:
        made, file = [], self._table("prompts.parquet")
        for place, source in enumerate(self.facts.evidence.sources):
            by = f", written by {source.writer}" if source.writer else ""
            name = f"prompts-{place}"
            new = f"{self.space}{name}" not in self.elements
            one = self.add(
                name,
                "dataset_DatasetPackage",
                name=f"prompts from {source_name(source.source)}",
                dataset_datasetType=["text"],
                dataset_dataCollectionProcess=f"From {source_name(source.source)}{by}.",
                dataset_datasetSize=source.train,
                software_downloadLocation=_NOWHERE,
                software_primaryPurpose="data",
                software_packageVersion=self.facts.version,
                releaseTime=self._time(),
                builtTime=self._time(),
                originatedBy=[self._writer(source.writer)],
                comment="The size is in prompts that were trained on.",
            )
            if new:
                self.relate(one, "hasDeclaredLicense", [self._licence(source.licence)])
                self.relate(one, "hasDataFile", [file])
            if new and source.made_from:
                self.relate(one, "descendantOf", list(dict.fromkeys(map(self._made_from, source.made_from))))
            made.append(one)
        return made

    def _made_from(self, rows: MadeFrom) -> str:
        """What a model wrote prompts from."""
        name = source_name(rows.source)
        key = hashlib.sha256(canonical(list(rows))).hexdigest()[:32]
        new = f"{self.space}made-from-{key}" not in self.elements
        one = self.add(
            f"made-from-{key}",
            "dataset_DatasetPackage",
            name=name,
            dataset_datasetType=["text"],
            dataset_dataCollectionProcess=f"Rows from which a model wrote prompts: each was a {rows.kind} to it.",
            software_downloadLocation=_NOWHERE,
            software_primaryPurpose="data",
            software_packageVersion=self.facts.version,
            releaseTime=self._time(),
            builtTime=self._time(),
            originatedBy=[self._writer(None)],
            comment="Its rows are named by digest in prompts.parquet and in the ledger's leaves; not part of the run.",
        )
        if new:
            self.relate(one, "hasDeclaredLicense", [self._licence(rows.licence)])
        return one

    def _table(self, name: str) -> str:
        return self._file(next(file for file in self.facts.tables if file.name == name), "data")

    def _file(self, file: FileSeen, purpose: str) -> str:
        hashed: list[JsonValue] = [{"type": "Hash", "algorithm": "sha256", "hashValue": file.sha256}]
        name = f"file-{file.sha256[:32]}-{file.name.replace('/', '-')}"
        return self.add(name, "software_File", name=file.name, verifiedUsing=hashed, software_primaryPurpose=purpose)

    def _licence(self, licence: str | None) -> str:
        known = spdx_id(licence) if licence else None
        if known:
            return self._expression(known, known)
        if not licence or licence == "unknown":
            return self.add("licence-unknown", "simplelicensing_SimpleLicensingText", name="unknown",
                            simplelicensing_licenseText="Nobody said which licence this is under.")  # fmt: skip
        return self._expression(licence_ref(licence), f"As declared: {licence}", custom=True)

    def _terms(self, teacher: TeacherTold) -> str:
        row, seen = teacher.terms, teacher.seen
        told = f"{row.clause}. Our paraphrase: {row.says} Read: {row.read}." if row else teacher.ruling.reason
        where = address(row.address) if row else None
        return self._expression(licence_ref(seen.terms), told, custom=True, where=where)

    def _expression(self, said: str, told: str, *, custom: bool = False, where: str | None = None) -> str:
        more: Object = {}
        if custom:
            text = self.add(f"text-{said}", "simplelicensing_SimpleLicensingText", name=said,
                            simplelicensing_licenseText=told)  # fmt: skip
            more["simplelicensing_customIdToUri"] = [_entry(said, text)]
            if where:
                self.elements[text]["externalRef"] = [
                    {"type": "ExternalRef", "externalRefType": "license", "locator": [where]}
                ]
        return self.add(f"licence-{said}", "simplelicensing_LicenseExpression", simplelicensing_licenseExpression=said,
                        **more)  # fmt: skip


def _entry(key: str, value: str) -> Object:
    return {"type": "DictionaryEntry", "key": key, "value": value}


def _extension(properties: Sequence[tuple[str, str]]) -> list[JsonValue]:
    told: list[JsonValue] = [
        {"type": "extension_CdxPropertyEntry", "extension_cdxPropName": name, "extension_cdxPropValue": value}
        for name, value in properties
    ]
    return [{"type": "extension_CdxPropertiesExtension", "extension_cdxProperty": told}]
