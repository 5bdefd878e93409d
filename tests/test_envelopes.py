"""Laws of keys and envelopes."""

from __future__ import annotations

import base64
import json
import stat

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as Oracle
from securesystemslib.signer import SSlibKey

from limbeck.errors import InputError
from limbeck.ledger.signing import keys
from limbeck.ledger.signing.envelope import Envelope, pae, sign, unbase64


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def other_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "other"))
    return tmp_path / "other"


# Keys


def test_keys_are_made_once_and_only_their_owner_reads_them(other_home):
    first = keys.key_id(keys.signing_key()), keys.secret()
    assert (keys.key_id(keys.signing_key()), keys.secret()) == first
    assert {p.name for p in other_home.iterdir()} == {"signing-key.pem", "secret"}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in other_home.iterdir())
    assert len(first[1]) == 32


def test_a_key_that_others_can_read_is_refused(other_home):
    keys.secret()
    (other_home / "secret").chmod(0o644)
    with pytest.raises(InputError, match="others may read it"):
        keys.secret()


@pytest.mark.parametrize("content", [b"", b"not a key"])
def test_what_is_no_key_is_refused(other_home, content):
    other_home.mkdir()
    for name in ("secret", "signing-key.pem"):
        (other_home / name).write_bytes(content)
        (other_home / name).chmod(0o600)
    with pytest.raises(InputError, match="secret"):
        keys.secret()
    with pytest.raises(InputError, match="signing-key"):
        keys.signing_key()


def test_keys_lie_where_the_user_keeps_configuration(monkeypatch, tmp_path):
    monkeypatch.delenv("LIMBECK_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert keys.home() == tmp_path / "limbeck"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys.home() == tmp_path / ".config" / "limbeck"


def test_nothing_of_the_keys_lies_in_a_run(whole):
    secret, pem = keys.secret(), (keys.home() / "signing-key.pem").read_bytes()
    body = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    for path in whole.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(s in data for s in (secret, secret.hex().encode(), base64.b64encode(secret), body[-32:]))


# Envelopes


def test_the_signed_bytes_are_those_of_the_protocol():
    """The example of the DSSE protocol's own page."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), st.integers(-5, 5), max_size=4))
def test_another_library_verifies_what_is_signed_and_so_do_we(statement):
    key = keys.signing_key()
    envelope = sign(statement, key)
    assert envelope.signed()
    oracle = Oracle.from_dict(json.loads(envelope.data))
    public = SSlibKey(envelope.keyid, "ed25519", "ed25519", {"public": envelope.keyid})
    assert list(oracle.verify([public], 1)) == [envelope.keyid]
    assert json.loads(oracle.payload) == envelope.statement() == statement


def test_a_changed_envelope_is_not_signed():
    envelope = sign({"a": 1}, keys.signing_key())
    values = json.loads(envelope.data)
    other = base64.b64encode(b'{"a":2}').decode()
    assert not Envelope.model_validate(values | {"payload": other}).signed()
    flipped = bytearray(base64.b64decode(envelope.sig))
    flipped[5] ^= 1
    forged = [{"keyid": envelope.keyid, "sig": base64.b64encode(flipped).decode()}]
    assert not Envelope.model_validate(values | {"signatures": forged}).signed()
    stranger = [{"keyid": "11" * 32, "sig": envelope.sig}]
    assert not Envelope.model_validate(values | {"signatures": stranger}).signed()


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"payloadType": "text/plain"},
        {"signatures": []},
        {"signatures": [{"keyid": "aa" * 32, "sig": ""}] * 2},
        {"signatures": [{"keyid": "AA" * 32, "sig": ""}]},
        {"payload": 5},
    ],
)
def test_an_envelope_of_another_shape_is_refused(change):
    values = json.loads(sign({"a": 1}, keys.signing_key()).data)
    with pytest.raises(ValueError, match="validation error"):
        Envelope.model_validate(values | change)


@pytest.mark.parametrize("text", ["YQ", "YQ==\n", "YR==", "Y Q==", "YQ===", "Y-_="])
def test_base64_has_one_form(text):
    assert unbase64("YQ==") == b"a"
    with pytest.raises(ValueError, match="base64"):
        unbase64(text)
