"""A server's answer, read by hand: an example of 4 tokens, the last two supervised. Nothing is ever filled in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from test_annotate import chat

from limbeck.errors import EndpointError, ModelError
from limbeck.signal.answers import read_answer
from limbeck.signal.types import TopKSignal


def listed(*entries: tuple[int, float], ranks: bool = True) -> dict:
    return {
        str(token): {"logprob": math.log(p), "rank": rank if ranks else None, "decoded_token": None}
        for rank, (token, p) in enumerate(entries, 1)
    }


WHOLE = [None, listed((5, 0.9)), listed((7, 0.5), (8, 0.2), (6, 0.1)), listed((7, 0.4), (9, 0.3))]


def read(rows=WHOLE, *, k: int = 2, words=lambda token: "", **choice) -> TopKSignal:
    example = chat(0, 4, "t")
    example = served_example([4, 5, 6, 7], [False, False, True, True], example)
    body = {"model": "m", "choices": [{"prompt_logprobs": rows} | choice]}
    return read_answer(
        json.dumps(body).encode(), example, ask="prompt_logprobs", k=k, vocab_size=10, words=words
    ).signal


def served_example(tokens, mask, like):
    return type(like)(
        "ex", np.array(tokens, np.int32), np.array(mask), like.prompt_id, like.completion, like.teacher, like.split
    )


def test_an_answer_by_hand():
    found = read()
    assert found.ids_NK.tolist() == [[7, 8], [7, 9]]
    np.testing.assert_allclose(found.log_probs_NK.exp(), [[0.5, 0.2], [0.4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(found.tail_mass_N, [0.3, 0.3], rtol=1e-6)
    unordered = [*WHOLE[:2], listed((6, 0.1), (8, 0.2), (7, 0.5), ranks=False), WHOLE[3]]
    assert read(unordered).ids_NK.tolist() == [[7, 8], [7, 9]]
    tie = [*WHOLE[:2], listed((6, 0.2), (8, 0.2), (7, 0.5), ranks=False), WHOLE[3]]
    assert read(tie).ids_NK.tolist() == [[7, 8], [7, 9]], "of two equals the one that was listed only as the prompt's"


@pytest.mark.parametrize(
    ("place", "row", "words"),
    [
        (2, None, "position 2 of 4\n.*no log-probabilities"),
        (3, {}, "position 3 of 4\n.*no log-probabilities"),
        (2, listed((6, 0.5)), "position 2 of 4\n.*no token of rank 2"),
        (2, listed((6, 0.5), ranks=False), "position 2 of 4\n.*1 tokens"),
        (3, {"7": {"logprob": -1.0, "rank": 1}, "9": {"logprob": -2.0, "rank": 3}}, "no token of rank 2"),
        (2, listed((6, 0.5), (12, 0.2)), "token 12\n.*another"),
        (2, listed((6, 0.5), (8, 1.5)), "0.405.* for token 8"),
        (2, listed((6, 0.7), (8, 0.7)), "sum to 1.4"),
        (2, {"6": {"logprob": None, "rank": 1}}, "TypeError"),
        (2, {"six": {"logprob": -1.0}}, "ValueError"),
        (1, listed((6, 0.5), (8, 0.2)), "position 1 without token 5"),
        (3, listed((8, 0.5), (9, 0.2)), "position 3 without token 7"),
    ],
)
def test_nothing_is_filled_in(place, row, words):
    with pytest.raises(EndpointError, match=f"(?s){words}") as caught:
        read([*WHOLE[:place], row, *WHOLE[place + 1 :]])
    assert "example ex" in str(caught.value)


def test_all_wrong_positions_of_an_answer_are_told():
    with pytest.raises(EndpointError) as caught:
        read([None, WHOLE[1], None, None])
    assert len(caught.value.problems) == 2


def test_other_tokens_than_were_sent_are_refused():
    with pytest.raises(EndpointError, match=r"3 token ids, at position 0 \[4, 5, 6\]|at position 3"):
        read(prompt_token_ids=[4, 5, 6])
    with pytest.raises(EndpointError, match=r"at position 1 \[9, 6, 7\]"):
        read(prompt_token_ids=[4, 9, 6, 7])
    with pytest.raises(EndpointError, match="of 3 tokens"):
        read(WHOLE[:3])
    with pytest.raises(EndpointError, match="a list, as vLLM"):
        read(None)


def test_an_echo_without_ids_is_refused():
    example = served_example([4, 5], [False, True], chat(0, 4, "t"))

    def echoed(tokens, top):
        body = {"model": "m", "choices": [{"logprobs": {"tokens": tokens, "top_logprobs": top}}]}
        return read_answer(json.dumps(body).encode(), example, ask="echo", k=1, vocab_size=10, words=str).signal

    top = [None, {"token_id:5": -0.5}, {"token_id:1": -0.1}]
    assert echoed(["token_id:4", "token_id:5", "token_id:1"], top).ids_NK.tolist() == [[5]]
    with pytest.raises(EndpointError, match="return_tokens_as_token_ids"):
        echoed(["a", "b"], top)
    with pytest.raises(EndpointError, match="that were sent"):
        echoed(["token_id:4", "token_id:6"], top)
    with pytest.raises(EndpointError, match="no log-probabilities"):
        echoed(["token_id:4", "token_id:5"], [None, None])


def test_words_that_read_otherwise_are_another_vocabulary():
    def told(*texts):
        rows = [None, *({str(t): {"logprob": -0.5, "decoded_token": x}} for t, x in zip((5, 6, 7), texts, strict=True))]
        for row in rows[2:]:
            row["8"] = {"logprob": -2.0, "decoded_token": "eight"}
        return read(rows, words=lambda token: {5: "five", 6: " six", 7: "\ufffd"}[token])

    assert len(told(" five", "six", "x")) == 2, "white space and pieces of characters are no difference"
    assert len(told(None, None, None)) == 2, "a server need not show text"
    with pytest.raises(ModelError, match="another vocabulary") as caught:
        told("fife", "six", "x")
    assert (caught.value.problems[0].found, caught.value.problems[0].expected[:6]) == ("'fife'", "'five'")


def test_what_rounding_does_is_no_error():
    rows = [None, WHOLE[1], listed((6, 1.0002), (8, 1e-9)), listed((7, 1.0), (8, 1e-9))]
    assert (read(rows).tail_mass_N >= 0).all()
    every = [None, WHOLE[1], listed(*((i, 0.1) for i in range(10))), listed(*((i, 0.1) for i in range(10)))]
    assert read(every, k=10).tail_mass_N.tolist() == [0, 0], "with the whole vocabulary listed nothing is left"
