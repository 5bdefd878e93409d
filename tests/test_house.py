"""The plan of the house: rooms import only what stands before them, files stay small, the map is true."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.run import STAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "limbeck"

FOUNDATION = {
    "errors",
    "seeds",
    "records",
    "recipe",
    "recipe_problems",
    "rundir",
    "tables",
    "progress",
    "ranks",
    "ledger",
    "terms",
    "models",
    "generate",
}
"""What every room may use."""

WAY = ("collect", "curate", "render", "signal", "student", "train", "evaluate", "export", "report")
"""The rooms, in the order of the data's way."""

TOP = {
    "run",
    "preflight",
    "recipe_file",
    "cli",
    "doctor",
    "starter",
    "estimate",
    "estimate_written",
    "testing",
    "__init__",
    "__main__",
}
"""What stands above the rooms and may use all of them."""


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> set[str]:
    """Rooms of limbeck that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("limbeck"):
            if node.module == "limbeck":
                found |= {alias.name for alias in node.names}
            else:
                found.add(room_of(node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {room_of(alias.name) for alias in node.names if alias.name.startswith("limbeck.")}
    return found


@pytest.mark.parametrize("room", WAY)
def test_a_room_imports_only_rooms_before_it(room):
    allowed = FOUNDATION | {*WAY[: WAY.index(room) + 1], "__version__"}
    for path in (PACKAGE / room).rglob("*.py"):
        assert imports(path) <= allowed, f"{path.relative_to(ROOT)} reaches past its neighbours"


def test_the_foundation_imports_no_room():
    for name in FOUNDATION:
        for path in [PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")]:
            if path.exists():
                allowed = FOUNDATION | {"__version__"} | ({"run"} if name == "ledger" else set())
                assert imports(path) <= allowed, path.relative_to(ROOT)


def test_every_module_has_a_place():
    names = {
        path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if not path.name.startswith("__py")
    }
    assert names - {"py"} <= FOUNDATION | {*WAY} | TOP


def test_every_stage_has_its_work():
    for stage in STAGES:
        assert callable(pkgutil.resolve_name(stage.work)), stage


def test_a_stage_reads_only_what_an_earlier_one_wrote():
    written: set[str] = set()
    for stage in STAGES:
        assert set(stage.reads) <= written, stage.name
        written |= set(stage.writes)


@pytest.mark.parametrize(
    "module", ["limbeck", "limbeck.cli", "limbeck.run", "limbeck.ledger.verification", "limbeck.recipe_file"]
)
def test_importing_needs_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def sources() -> list[Path]:
    found = [p for top in ("limbeck", "tests", "tools", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    return [p for p in found if ".peers" not in p.parts]  # the environment of the benchmarks' peers


ONE_FILE = ROOT / "tools" / "verify_ledger.py"
"""The second verifier is handed to strangers as one file: it may be long, its functions may not."""


def test_files_and_functions_stay_small():
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400 and path != ONE_FILE:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long, "\n".join(long)


def test_the_readme_tree_is_the_real_tree():
    tree = re.search(r"```\nlimbeck/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree, "README.md has no tree of the package"
    listed = {line.split()[0].rstrip("/") for line in tree[1].splitlines() if line.startswith("  ") and line[2] != " "}
    real = {p.name for p in PACKAGE.iterdir() if not p.name.startswith("__py") and p.name != "py.typed"}
    assert listed == real


def test_links_between_documents_lead_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_promised_names_are_there_after_a_bare_import():
    code = """
import limbeck
for name in ("run", "signal.threshold_sample", "signal.types.SampledSignal.to_dense", "train.losses.forward_kl",
             "train.losses.reverse_kl", "train.losses.generalized_jsd", "train.losses.skew_kl",
             "train.losses.total_variation", "train.fused.fused_loss", "ledger.verify", "errors.InputError", "Recipe"):
    value = limbeck
    for part in name.split("."):
        value = getattr(value, part)
    assert callable(value), name
import limbeck.run
from limbeck.run import STAGES
assert callable(limbeck.run), "the function, not the module"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
