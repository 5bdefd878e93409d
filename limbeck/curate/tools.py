"""Whether answers with tools can be learned, asked before they are bought: what no template can say is dropped."""

from __future__ import annotations

from limbeck.curate.filters import Tools
from limbeck.errors import ModelError, Problem
from limbeck.recipe import EndpointTeacher, Recipe
from limbeck.recipe.prompts import rows_of


def refuse_tools(recipe: Recipe) -> None:
    """Raises `ModelError` where an endpoint would be paid for answers with tools, and the chat template that is to
    render them cannot say those. Prompt files are read only then.
    """
    from limbeck.models import load_tokenizer  # takes seconds
    from limbeck.models.speech import cannot_call

    templates = {recipe.words_of(t) for t in recipe.teachers if isinstance(t, EndpointTeacher)}
    lacking = {ref: why for ref in sorted(templates) if (why := cannot_call(load_tokenizer(ref)))}
    if not lacking or not (asked := _asked(recipe)):
        return
    expected = "a chat template that says tools, calls of them and their results"
    problems = [Problem(f"student {ref}", f"{why}; {asked}", expected, Tools.loosen) for ref, why in lacking.items()]
    raise ModelError("answers with tools would be paid for and then dropped", problems)


def _asked(recipe: Recipe) -> str:
    """What asks for answers with tools; empty where nothing does."""
    from limbeck.collect.files import iter_file_prompts

    if recipe.collect.tools:
        return "collect.tools gives the teacher tools"
    first, count = "", 0
    for source in recipe.prompts:
        for row in (row for key, file in rows_of(source) if not key for row in iter_file_prompts(file)):
            if row.wanted.tools or any(message.tool_calls for message in row.messages):
                first, count = first or row.where, count + 1
    return f"{count:,} {'prompt has' if count == 1 else 'prompts have'} tools, the first at {first}" if count else ""
