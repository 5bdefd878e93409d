"""Laws of the exports: each is valid by its standard's own library, and says of teachers, shares, terms and ledger what
the ledger says.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import rdflib
import yaml
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.export.evidence import MadeFrom
from limbeck.export.facts import Facts, read_facts
from limbeck.export.formats import DOCUMENTS
from limbeck.export.rulings import register_says, row_of
from limbeck.export.teachers import owner
from limbeck.export.words import markdown
from limbeck.ledger.proofs.share import share
from limbeck.ledger.store import Ledger
from limbeck.recipe import Use

LLAMA = "meta/llama-3.1/2024-07-23"
MAKE = {one.name: one.make for one in DOCUMENTS}


@pytest.fixture(scope="module")
def facts(finished_run: Path) -> Facts:
    return read_facts(finished_run)


@pytest.fixture(scope="module")
def foreign(facts: Facts) -> Facts:
    """As if a second teacher, of foreign terms, had written three quarters, for a student that is published."""
    (one,) = facts.teachers
    seen = one.seen._replace(name="hf:meta-llama/Llama-3.1-8B-Instruct@abc", terms=LLAMA)
    ruling = register_says(LLAMA, Use(), [one.first], "self-hosted")
    other = one._replace(seen=seen, tokens=3 * one.tokens, share=0.75, ruling=ruling, terms=row_of(LLAMA))
    rows = (MadeFrom("seed", "/home/me/seeds.jsonl", "MIT"), MadeFrom("document", "docs.jsonl", "CC-BY-4.0"))
    first, *more = facts.evidence.sources
    evidence = dataclasses.replace(facts.evidence, sources=(first._replace(made_from=rows), *more))
    return dataclasses.replace(facts, teachers=(one._replace(share=0.25), other), evidence=evidence)


def run_cli(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def front_matter(text: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_shares_are_those_that_the_ledger_proves(facts, finished_run):
    proved = share(finished_run).shares
    total = sum(one.tokens for one in proved)
    assert [(t.seen.name, t.tokens, t.rows) for t in facts.teachers] == [(s.name, s.tokens, s.rows) for s in proved]
    assert [t.share for t in facts.teachers] == [s.tokens / total for s in proved]
    assert facts.tokens.supervised == total


def test_cyclonedx_is_valid_by_its_strict_schema(facts, foreign):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    for told in (facts, foreign):
        wrong = JsonStrictValidator(SchemaVersion.V1_7).validate_str(MAKE["cyclonedx"](told))
        assert wrong is None, wrong
    broken = json.loads(MAKE["cyclonedx"](facts))
    broken["components"][0]["type"] = "teacher"
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(json.dumps(broken))


def test_cyclonedx_names_teachers_shares_and_ledger(foreign):
    told = json.loads(MAKE["cyclonedx"](foreign))
    student = told["metadata"]["component"]
    refs = {c["bom-ref"]: c for c in told["components"]}
    assert {d["ref"] for d in student["modelCard"]["modelParameters"]["datasets"]} <= refs.keys()
    for teacher in foreign.teachers:
        values = properties(refs[f"model:{teacher.seen.name}"]["properties"])
        assert float(values["limbeck:share"]) == pytest.approx(teacher.share, abs=1e-6)
        assert values["limbeck:terms"] == teacher.seen.terms
        assert values["limbeck:terms:verdict"] == teacher.ruling.verdict
    ancestors = student["pedigree"]["ancestors"]
    assert {a["name"] for a in ancestors} == {foreign.base, *(t.seen.name for t in foreign.teachers)}
    ledger = properties(told["metadata"]["properties"])
    assert ledger["limbeck:ledger:root"] == f"sha256:{foreign.ledger.root}"
    assert "unanchored" in ledger["limbeck:ledger:trust"]
    assert {ref for d in told["dependencies"] for ref in [d["ref"], *d["dependsOn"]]} <= {"student", *refs}


def properties(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["name"]: row["value"] for row in rows}


def test_spdx_is_valid_by_its_model(facts, foreign):
    """The library's classes are generated from SPDX's own SHACL: reading checks types, writing checks counts."""
    from spdx_python_model.bindings.v3_0_1 import model

    for told in (facts, foreign):
        objects = model.SHACLObjectSet()
        model.JSONLDDeserializer().read(io.BytesIO(MAKE["spdx"](told).encode()), objects)
        model.JSONLDSerializer().write(objects, io.BytesIO())
        assert not objects.missing_ids, "an element that is referred to is not there"
        (document,) = objects.foreach_type(model.SpdxDocument)
        (student,) = document.rootElement
        related = {(r.relationshipType.rsplit("/", 1)[-1], to._id) for r in objects.foreach_type(model.Relationship)
                   if r.from_ is student for to in r.to}  # fmt: skip
        trained_on = [place for kind, place in related if kind == "trainedOn"]
        assert len(trained_on) == len(told.teachers)
        assert {kind for kind, _ in related} >= {"trainedOn", "descendantOf", "hasDeclaredLicense", "contains"}
    broken = io.BytesIO(MAKE["spdx"](facts).replace('"text"\n', '"words"\n').encode())
    with pytest.raises(ValueError, match="words"):
        model.JSONLDDeserializer().read(broken, model.SHACLObjectSet())


def test_what_prompts_were_written_from_stands_in_the_fields_of_each_standard(foreign):
    """SPDX: descendantOf. CycloneDX: pedigree.ancestors. Croissant: wasDerivedFrom of what the set was derived from."""
    first, *more = foreign.evidence.sources
    evidence = dataclasses.replace(foreign.evidence, sources=(first._replace(writer="a writer"), *more))
    foreign = dataclasses.replace(foreign, evidence=evidence)
    graph = {e.get("spdxId"): e for e in json.loads(MAKE["spdx"](foreign))["@graph"]}
    relations = [e for e in graph.values() if e.get("relationshipType") == "descendantOf"]
    found = {graph[one]["name"]: one for r in relations for one in r["to"] if "prompts-0" in r["from"]}
    assert {*found} == {"seeds.jsonl", "docs.jsonl"}
    for one in found.values():
        assert [e for e in graph.values() if e.get("relationshipType") == "hasDeclaredLicense" and e["from"] == one]
    (prompts,) = [c for c in json.loads(MAKE["cyclonedx"](foreign))["components"] if c.get("bom-ref") == "prompts:0"]
    ancestors = {one["name"]: one["licenses"][0]["license"]["id"] for one in prompts["pedigree"]["ancestors"]}
    assert ancestors == {"seeds.jsonl": "MIT", "docs.jsonl": "CC-BY-4.0"}
    (source, *_) = json.loads(MAKE["croissant"](foreign))["prov:wasDerivedFrom"]
    told = {(one["prov:label"], one["limbeck:parent-kind"]) for one in source["prov:wasDerivedFrom"]}
    assert told == {("seeds.jsonl", "seed"), ("docs.jsonl", "document")}
    assert source["prov:wasAttributedTo"]["prov:label"] == "a writer"


def test_spdx_gives_each_teachers_answers_their_share_and_terms(foreign):
    graph = {e.get("spdxId"): e for e in json.loads(MAKE["spdx"](foreign))["@graph"]}
    relations = [e for e in graph.values() if e["type"] == "Relationship"]
    for teacher in foreign.teachers:
        (model,) = (e for e in graph.values() if e["type"] == "ai_AIPackage" and e["name"] == teacher.seen.name)
        (answers,) = related(relations, model["spdxId"], "generates")
        (terms,) = related(relations, answers, "hasDeclaredLicense")
        assert "LicenseRef-limbeck-" in graph[terms]["simplelicensing_licenseExpression"]
        told = graph[answers]["extension"][0]["extension_cdxProperty"]
        values = {row["extension_cdxPropName"]: row["extension_cdxPropValue"] for row in told}
        assert float(values["limbeck:share"]) == pytest.approx(teacher.share, abs=1e-6)


def related(relations: list[dict], source: str, kind: str) -> list[str]:
    return [to for r in relations if (r["from"], r["relationshipType"]) == (source, kind) for to in r["to"]]


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib, by itself
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # mlcroissant with pandas 3.1
def test_croissant_is_valid_and_its_records_load(foreign, finished_run, tmp_path):
    import mlcroissant

    for name in ("prompts", "completions", "verdicts"):
        shutil.copy(finished_run / f"{name}.parquet", tmp_path)
    (tmp_path / "croissant.json").write_text(MAKE["croissant"](foreign), encoding="utf-8")
    data = mlcroissant.Dataset(jsonld=tmp_path / "croissant.json")
    assert not data.metadata.issues.errors
    assert not data.metadata.issues.warnings
    assert str(data.metadata.ctx.conforms_to.value).endswith("croissant/1.1")
    for name in ("prompts", "completions", "verdicts"):
        due = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        found = list(data.records(record_set=name))
        assert len(found) == len(due)
        for row, wanted in zip(found, due, strict=True):
            for key, value in row.items():
                plain = value.decode() if isinstance(value, bytes) else value
                assert plain == wanted[key.split("/")[1]] or key.endswith("created"), key
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1" + b"x" * 40)
    with pytest.raises(mlcroissant._src.core.issues.GenerationError):
        list(mlcroissant.Dataset(jsonld=tmp_path / "croissant.json").records(record_set="prompts"))


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib, by itself
def test_croissant_is_rdf_that_names_who_wrote_what(foreign):
    """As another reader of JSON-LD, which knows nothing of Croissant, sees it."""
    graph = rdflib.Graph().parse(data=MAKE["croissant"](foreign), format="json-ld")
    prov, ours = rdflib.Namespace("http://www.w3.org/ns/prov#"), rdflib.Namespace("urn:x-limbeck:terms:")
    found = {}
    for agent in graph.objects(None, prov.wasAttributedTo):
        label = str(graph.value(agent, prov.label))
        found[label] = (float(str(graph.value(agent, ours["share"]))), str(graph.value(agent, ours["terms"])))
    assert found == {t.seen.name: (pytest.approx(t.share, abs=1e-6), t.seen.terms) for t in foreign.teachers}
    assert [str(o) for o in graph.objects(None, ours["ledger:root"])] == [f"sha256:{foreign.ledger.root}"]


def test_cards_are_what_the_hub_reads(facts, foreign, finished_run):
    from huggingface_hub import DatasetCard, ModelCard

    text = MAKE["card"](facts)
    assert text == (finished_run / "student" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-generation"
    for told in (facts, foreign):
        card = DatasetCard(MAKE["data-card"](told))
        assert card.data.to_dict() == front_matter(str(card))
        for teacher in told.teachers:
            assert f"| {markdown(teacher.seen.name)} |" in card.text
    assert "Built with Llama" in MAKE["data-card"](foreign)


def test_the_code_of_the_data_card_gives_the_training_set(facts, finished_run, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", MAKE["data-card"](facts), re.DOTALL)
    assert code
    monkeypatch.chdir(finished_run)
    found: dict = {}
    exec(code[1], found)
    leaves = [json.loads(row) for row in pq.read_table(finished_run / "leaves.parquet")["share"].to_pylist()]
    assert sum(row["split"] == "train" for row in leaves) == facts.tokens.examples
    left_out = sum(facts.evidence.counts("render", "left_out").values())
    assert facts.tokens.examples <= len(found["training"]) <= facts.tokens.examples + left_out
    assert len(found["training"]) < sum(t.seen.answers for t in facts.teachers)


def test_the_summary_has_every_section_and_lists_what_it_does_not_know(foreign):
    text = MAKE["eu-summary"](foreign)
    numbers = re.findall(r"^#+ (\d[\d.]*) ", text, re.MULTILINE)
    due = "1 1.1 1.2 1.3 2 2.1 2.2 2.2.1 2.2.2 2.3 2.4 2.5 2.6 3 3.1 3.2 3.3"
    assert " ".join(numbers) == due
    listed = re.findall(r"^- (\d[\d.]*) ", text, re.MULTILINE)
    assert len(listed) == text.count("\nFor the provider to fill in: ")
    assert {"1.1", "3.1", "2.5"} <= {*listed}
    synthetic = text.partition("### 2.5")[2].partition("### 2.6")[0]
    assert "Yes, by model distillation" in synthetic
    on_market, _, rest = synthetic.partition("Other AI models")
    assert "Llama-3.1-8B-Instruct" in on_market
    assert "75.0" in on_market
    assert markdown(foreign.teachers[0].seen.name) in rest


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_run_gives_the_same_document_each_time(facts, finished_run, name):
    again = MAKE[name](read_facts(finished_run)) if name == "spdx" else MAKE[name](facts)
    assert again == MAKE[name](facts)


@pytest.mark.parametrize("name", ["data-card", "spdx", "cyclonedx", "croissant", "eu-summary"])
def test_the_ledgers_root_signer_and_trust_stand_in_every_document(facts, finished_run, name):
    with Ledger(finished_run / "ledger.db", read_only=True) as ledger:
        from limbeck.ledger.signing.checkpoints import checkpoints

        last = list(checkpoints(ledger.entries()))[-1]
    text = MAKE[name](facts)
    assert last.statement.root.hex() in text
    assert last.envelope.keyid in text
    assert "unanchored" in text


def test_gguf_carries_the_evidence(finished_run, tmp_path):
    from gguf import GGUFReader

    code, out, err = run_cli("export", finished_run, "--to", "gguf", "--out", tmp_path / "m.gguf", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == (tmp_path / "m.gguf").stat().st_size
    reader, told = GGUFReader(tmp_path / "m.gguf"), read_facts(finished_run)
    said = {name: reader.get_field(name).contents() for name in reader.fields if name.startswith("limbeck.")}
    assert said["limbeck.ledger.root"] == f"sha256:{told.ledger.root}"
    assert said["limbeck.teacher.0.name"] == told.teachers[0].seen.name
    assert float(said["limbeck.teacher.0.share"]) == 1.0
    assert said["limbeck.manifest"] == told.weights


def test_a_run_that_does_not_verify_is_not_exported(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "scores.json").write_text("[]", encoding="utf-8")
    for to in [*MAKE, "gguf"]:
        code, _, err = run_cli("export", run, "--to", to, "--out", tmp_path / "out")
        assert code == 1, to
        assert "scores.json" in err
        assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(tiny_run, tmp_path):
    code, out, err = run_cli("export", tiny_run, "--to", "spdx")
    assert (code, out) == (2, "")
    assert ": train" in err
    assert ": evaluate" in err
    assert run_cli("export", tmp_path, "--to", "spdx")[0] == 2


def test_options_that_do_not_fit_are_refused_together(finished_run, tmp_path):
    there = tmp_path / "there"
    there.write_text("kept", encoding="utf-8")
    code, _, err = run_cli("export", finished_run, "--to", "spdx", "--out", there, "--precision", "f16")
    assert code == 2
    assert "--precision" in err
    assert str(there) in err
    assert there.read_text(encoding="utf-8") == "kept"
    assert run_cli("export", finished_run, "--to", "gguf")[0] == 2
    assert run_cli("export", finished_run, "--to", "parchment")[0] == 2


def test_exports_go_to_standard_output_or_to_a_file(finished_run, tmp_path):
    code, out, _ = run_cli("export", finished_run, "--to", "cyclonedx")
    assert code == 0
    assert run_cli("export", finished_run, "--to", "cyclonedx", "--out", tmp_path / "bom.json")[0] == 0
    assert (tmp_path / "bom.json").read_text(encoding="utf-8") == out


def test_a_teachers_owner_is_the_holder_of_its_terms_by_the_register(facts):
    (one,) = facts.teachers
    (path,) = (Path(limbeck.__file__).parent / "terms" / "register").glob("meta__llama-3.1__*")
    holder = yaml.safe_load(path.read_text(encoding="utf-8"))["holder"]
    said = owner(one.seen._replace(terms=LLAMA))
    assert said.startswith(f"{holder}, as the register names")
    assert owner(one.seen._replace(terms="own-model")) != said
    assert owner(one.seen._replace(terms="unknown")) == "Not recorded."
