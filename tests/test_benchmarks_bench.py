"""The arithmetic of the benchmarks; the measurements themselves need a quiet machine."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
from bench import Run, alternate, write_result
from flops import forward_flops, shape_of
from torch.utils.flop_counter import FlopCounterMode


def test_operations_of_a_forward_pass_are_those_that_torch_counts():
    model, lengths = tiny.llama(320, layers=3, hidden=64), [7, 12]
    model.set_attn_implementation("eager")  # torch does not count the CPU's own attention kernel
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        for length in lengths:
            model(input_ids=torch.arange(length)[None])
    shape = shape_of(model)
    # Eager attention computes both halves of a causal matrix.
    other_half = 2 * shape.layers * shape.attention * sum(n * n for n in lengths)
    assert forward_flops(shape, lengths, sum(lengths)) + other_half == counter.get_total_flops()


def test_runs_alternate_and_a_failed_one_is_left_out(tmp_path, capsys):
    order = tmp_path / "order"
    note = f"import sys; open({str(order)!r}, 'a').write(sys.argv[1]); "
    write = "from pathlib import Path; from bench import write_result; write_result(Path(sys.argv[3]), {'figure': 1})"
    runs = [
        Run("one", (sys.executable, "-c", note + write, "1")),
        Run("two", (sys.executable, "-c", note + "sys.exit(3)", "2")),
    ]
    results = alternate(runs, 2, tmp_path / "logs")
    assert order.read_text() == "1212"
    assert [r["figure"] for r in results["one"]] == [1, 1]
    assert results["two"] == []
    assert "two: exit 3" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_the_runs_own_and_sees_what_it_held(tmp_path):
    """The process that starts a run may be larger than the run: its peak must not be taken for the run's."""
    held = bytearray(b"x") * (400 << 20)
    code = "import sys; from pathlib import Path; from bench import write_result; x = b'x' * ({} << 20); del x; "
    code += "write_result(Path(sys.argv[2]), {{}})"
    small, large = (Run(name, (sys.executable, "-c", code.format(size))) for name, size in (("a", 1), ("b", 200)))
    found = alternate([small, large], 1, tmp_path)
    assert len(held) == 400 << 20
    assert float(str(found["a"][0]["peak_bytes"])) < 100 << 20
    assert 200 << 20 < float(str(found["b"][0]["peak_bytes"])) < 300 << 20


def test_a_result_keeps_its_figures(tmp_path):
    write_result(tmp_path / "result.json", {"seconds": 1.5})
    assert json.loads((tmp_path / "result.json").read_text())["seconds"] == 1.5
