"""limbeck's losses against TRL's and Liger's own functions: `python benchmarks/losses.py`.

Runs `peers/loss_differences.py` in the peers' environment, with this checkout's limbeck on its path. Prints the
greatest difference in value and in gradient of every loss that both sides define alike. Exits 1 when one is beyond its
tolerance, 2 when the peers' environment is not there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench import HERE, add_peers, child_environment, peers_python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peers(parser)
    python = peers_python(parser.parse_args().peers)
    script = HERE / "peers" / "loss_differences.py"
    return subprocess.run([python, script], env=child_environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
