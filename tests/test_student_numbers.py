"""The numbers of a pruned student: what a recipe leaves open, and what does not fit its teacher."""

from __future__ import annotations

import pytest
import transformers as hf
from test_recipe import GOOD, refused, write
from test_student import COMMON

from limbeck.errors import ModelError
from limbeck.recipe import PrunedStudent
from limbeck.recipe_file import load_recipe
from limbeck.student.wanted import wanted
from limbeck.student.width import Heads, Width


def numbers(**student) -> Width | None:
    config = hf.LlamaConfig(**(COMMON | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}))
    return wanted(PrunedStudent(**student), config, "t").width


@pytest.mark.parametrize(
    ("student", "heads"),
    [
        ({"attention_heads": 6}, (6, 3)),
        ({"attention_heads": 6, "key_value_heads": 2}, (6, 2)),
        ({"attention_heads": 2}, (2, 2)),
        ({"key_value_heads": 1}, (3, 1)),
        ({"attention_heads": 9}, (9, 3)),
    ],
)
def test_heads_that_are_left_open_are_filled_in(student, heads):
    assert numbers(**student) == Width(Heads(*heads, 8), None)
    assert numbers(**student, intermediate_size=7) == Width(Heads(*heads, 8), 7)


def test_without_numbers_nothing_is_cut():
    assert numbers(layers=2) is None


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ({"attention_heads": 7}, [("student.attention_heads", "7", "3, 6 or 9: 1 to 3 for each of 3 key-value heads")]),
        ({"attention_heads": 9, "key_value_heads": 2},
         [("student.attention_heads", "9", "2, 4 or 6: 1 to 3 for each of 2 key-value heads")]),
        ({"attention_heads": 1, "key_value_heads": 2},
         [("student.attention_heads", "1", "2, 4 or 6: 1 to 3 for each of 2 key-value heads")]),
        ({"layers": 5, "attention_heads": 12, "key_value_heads": 4, "intermediate_size": 49},
         [("student.layers", "5", "at most 4, the layers of t"),
          ("student.attention_heads", "12", "at most 9, the attention heads in each layer of t"),
          ("student.key_value_heads", "4", "at most 3, the key-value heads in each layer of t"),
          ("student.intermediate_size", "49", "at most 48, the MLP neurons in each layer of t")]),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_all_told(student, told):
    with pytest.raises(ModelError) as caught:
        numbers(**student)
    assert [(p.where, p.found, p.expected) for p in caught.value.problems] == told
    assert all(p.remedy for p in caught.value.problems)


def test_a_pruned_student_loses_something(tmp_path):
    [(where, told)] = refused(write(tmp_path, GOOD.replace(", layers: 2", ""))).items()
    assert where.endswith(": student")
    assert "intermediate_size" in told[0]
    assert told[1] == "at least one of them"
    for key in ("layers", "attention_heads", "key_value_heads", "intermediate_size"):
        load_recipe(write(tmp_path, GOOD.replace("layers: 2", f"{key}: 2")))
