"""Counts of tokens that an endpoint says, whatever they are."""

from __future__ import annotations

import json

import pytest

from limbeck.collect.endpoints.anthropic import AnthropicMessages
from limbeck.collect.endpoints.dialects import read_raw
from limbeck.collect.endpoints.openai_chat import OpenAIChat
from limbeck.collect.endpoints.openai_responses import OpenAIResponses

DIALECTS = OpenAIChat("max_tokens"), AnthropicMessages(), OpenAIResponses()


@pytest.mark.parametrize("said", [2**63, 2**64 - 1, 2**200, -1, True, 1.5, "7", None])
def test_a_count_that_no_table_can_hold_is_none(said: object):
    """It stands in the journal, and must not end every later run."""
    read, written = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
    raw = {"choices": [{"message": {"content": "x"}}], "content": [], "output": [], "status": "completed"}
    for wrong in (read, written):
        usage = dict.fromkeys(read + written, 7) | dict.fromkeys(wrong, said)
        for dialect in DIALECTS:
            parsed, found = read_raw(dialect, json.dumps(raw | {"usage": usage}).encode())
            assert (parsed.prompt_tokens, parsed.completion_tokens, found) == (0, 0, None)
