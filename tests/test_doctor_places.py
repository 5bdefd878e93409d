"""What `limbeck doctor` says of the places that a run writes to."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from limbeck import doctor


def cache_told() -> doctor.Finding:
    (told,) = [finding for finding in doctor.examine() if finding.name == "model cache"]
    return told


def test_doctor_says_whether_the_model_cache_can_be_written(monkeypatch, tmp_path):
    """And leaves nothing there."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "a" / "cache"))
    assert cache_told() == ("model cache", f"{tmp_path}/a/cache, not there yet, can be made", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a" / "cache" / "wheels").mkdir(parents=True)
    assert re.fullmatch(rf"{tmp_path}/a/cache, [\d.]+ GiB free, can be written", cache_told().value)
    (tmp_path / "file").touch()
    for place, why in ((f"{tmp_path}/file/cache", "Not a directory"), ("/proc/nothing", "No such file or directory")):
        monkeypatch.setenv("LIMBECK_CACHE", place)
        told = cache_told()
        assert told.value == f"{place}, not there yet, and cannot be made: {why}"
        assert told.remedy == "set LIMBECK_CACHE to a directory of your own"


@pytest.mark.parametrize(("inner", "mode"), [("", 0o555), ("", 0o000), ("wheels", 0o555)])
def test_doctor_says_that_a_cache_of_somebody_else_cannot_be_written(monkeypatch, inner, mode):
    """As a user who is not allowed to, which root has to become first."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        cache = Path(place, "cache")
        (cache / "wheels").mkdir(parents=True)
        cache.chmod(0o777)
        (cache / inner).chmod(mode)
        monkeypatch.setenv("LIMBECK_CACHE", str(cache))
        try:
            if user == 0:
                os.seteuid(65534)
            told = cache_told()
        finally:
            os.seteuid(user)
            (cache / inner).chmod(0o755)
    assert re.search(r"cannot be (written: \S+/cache(/wheels)?|read): Permission denied$", told.value)
    assert told.remedy == "set LIMBECK_CACHE to a directory of your own"


def test_doctor_goes_on_where_nobody_has_a_home(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LIMBECK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_told().value == "nowhere: Could not determine home directory."
    assert cache_told().remedy
