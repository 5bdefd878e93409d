"""tools/verify_ledger.py as a module."""

from __future__ import annotations

import importlib.util
import sys

from command import ROOT

SCRIPT = ROOT / "tools" / "verify_ledger.py"


def load():
    spec = importlib.util.spec_from_file_location("verify_ledger", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify_ledger"] = module
    spec.loader.exec_module(module)
    return module


second = load()
