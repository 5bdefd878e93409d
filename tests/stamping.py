"""A time-stamping authority of one's own, by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needed = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to play the authority")

_SETTINGS = """
[ req ]
distinguished_name = dn
prompt = no
[ dn ]
CN = root
[ ca ]
basicConstraints = critical,CA:true
keyUsage = critical,keyCertSign
[ tsa ]
basicConstraints = CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,timeStamping
[ stamp ]
serial = ./serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
"""


class Authority:
    """Keys, certificates, and stamps."""

    def __init__(self, folder: Path, days: int = 3650):
        self.folder = folder
        folder.mkdir()
        (folder / "settings").write_text(_SETTINGS, encoding="utf-8")
        (folder / "serial").write_text("01", encoding="utf-8")
        new = ("-newkey", "rsa:2048", "-nodes", "-config", "settings")
        self._call("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-extensions", "ca", "-days", str(days))
        self._call("req", *new, "-keyout", "tsa.key", "-out", "tsa.csr", "-subj", "/CN=stamps")
        signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days))
        made = ("-in", "tsa.csr", "-out", "tsa.pem", "-extfile", "settings", "-extensions", "tsa")
        self._call("x509", "-req", *made, *signed_by)
        self.root = folder / "ca.pem"

    def stamp(self, data: bytes, *more: str, algorithm: str = "sha256") -> Path:
        """A file with the response for these bytes."""
        (self.folder / "data").write_bytes(data)
        self._call("ts", "-query", "-data", "data", f"-{algorithm}", "-cert", "-out", "query")
        settings = ("-config", "settings", "-section", "stamp", "-signer", "tsa.pem", "-inkey", "tsa.key")
        self._call("ts", "-reply", *settings, "-queryfile", "query", "-out", "response", *more)
        return self.folder / "response"

    def _call(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)
