"""Makes the peers' own Python environments: `python benchmarks/peers/environment.py`.

They lie in benchmarks/.peers, which git ignores. `training` holds TRL and Liger, with limbeck's versions of torch,
transformers and accelerate; `curator` and `distilabel` are what collecting is measured against, apart because each
wants its own version of the openai client. Nothing of them enters limbeck's environment. An environment that is there
and whole is left as it is; one whose installation was cut off is made again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
AT = HERE.parent / ".peers"
PROOFS = {
    "training": (
        "requirements.txt",
        "from trl import DistillationTrainer; from trl.experimental.gkd import GKDTrainer; import liger_kernel",
    ),
    "curator": ("requirements-curator.txt", "import litellm, openai; import bespokelabs.curator"),
    "distilabel": (
        "requirements-distilabel.txt",
        "import openai, httpx_aiohttp; from distilabel.models import OpenAILLM",
    ),
}
"""What is installed, and what can then be imported."""


def make(name: str = "training", directory: Path | None = None) -> Path:
    """An environment's interpreter. Raises `CalledProcessError` where pip fails or a peer cannot be imported."""
    # The first one lies in .peers itself, where it was before there were others.
    directory = directory or (AT if name == "training" else AT / name)
    requirements, proof = PROOFS[name]
    python, done = directory / "bin" / "python", directory / "whole"
    wanted = (HERE / requirements).read_text(encoding="utf-8")
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([python, *install, "-r", str(HERE / requirements)], check=True)
        subprocess.run([python, "-W", "ignore", "-c", proof], check=True)
        done.write_text(wanted, encoding="utf-8")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, default=HERE.parent / ".peers", help="where to make it")
    try:
        print(make(parser.parse_args().at))
    except subprocess.CalledProcessError as error:
        print(f"the peers' environment could not be made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
