"""Whatever stands in a recipe, the error is limbeck's own and names the place."""

from __future__ import annotations

import re

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_recipe import PROMISED, keys_of, refused, write

from limbeck.recipe import Recipe
from limbeck.recipe_file import json_schema, load_recipe

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PLACES = sorted(keys_of(dict(json_schema())))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_recipe_the_error_is_ours_and_names_the_place(tmp_path, data):
    recipe = yaml.safe_load(PROMISED)
    place = data.draw(st.sampled_from(PLACES))
    inner = recipe
    steps = [int(step) if step.isdigit() else step for step in place.split(".")]
    for step in steps[:-1]:
        if isinstance(inner, dict) and not isinstance(inner.get(step), dict | list):
            inner[step] = {}  # a key that may be a word or a mapping: here it is a mapping
        inner = inner[step]
    inner[steps[-1]] = data.draw(JUNK)
    path = write(tmp_path, yaml.safe_dump(recipe, allow_unicode=True))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        Recipe.model_validate(written)
    except ValidationError:
        assert any(re.search(rf"\b{re.escape(str(steps[0]))}\b", where) for where in refused(path))
    else:
        assert load_recipe(path).digest
