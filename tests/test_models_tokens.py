"""What decides how text becomes tokens: digests, ends of answers, and tokenizers that must agree."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from limbeck import models
from limbeck.errors import ModelError
from limbeck.ledger.canonical import digest_json

DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


TEXTS = st.text(st.sampled_from("ab1٣½ \n\t.é日<|im_end|>xQ'"), max_size=20) | st.text(max_size=20)


def test_the_digest_of_a_tokenizer_is_of_what_decides_tokens(tmp_path):
    words = tiny.tokenizer()
    digest = models.tokenizer_digest(words)
    words.save_pretrained(tmp_path)
    assert models.tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == digest
    words(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert models.tokenizer_digest(words) == digest, "settings of a call are no part of it"
    other = tiny.tokenizer()
    other.backend_tokenizer.pre_tokenizer = DIGITS
    role = tiny.tokenizer()
    role.eos_token = "<|endoftext|>"
    added = tiny.tokenizer()
    added.add_tokens(["<new>"])
    digests = [models.tokenizer_digest(w) for w in (words, other, role, added, tiny.tokenizer(text=tiny.TEXT[:1]))]
    assert len(set(digests)) == 5


def test_the_digest_of_a_template_is_of_its_text():
    words = tiny.tokenizer()
    assert models.template_digest(words) == "sha256:" + hashlib.sha256(tiny.CHATML.encode()).hexdigest()
    with pytest.raises(ModelError, match="chat template"):
        models.template_digest(tiny.tokenizer(template=None))


def test_stop_ids_are_all_that_end_an_answer():
    words = tiny.tokenizer()
    model = tiny.llama(len(words))
    end, text = (words.get_vocab()[name] for name in ("<|im_end|>", "<|endoftext|>"))
    assert models.stop_ids(model, words) == {end}
    words.eos_token = "<|endoftext|>"
    model.generation_config = GenerationConfig(eos_token_id=None)
    assert models.stop_ids(model, words) == {end, text}, "the template's end of turn counts"
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert models.stop_ids(model, words) == {end, text, 7, 9}
    words.chat_template = "{{ raise_exception('only tools') }}"
    assert models.stop_ids(model, words) == {text, 7, 9}
    words.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert models.stop_ids(model, words) == {text, 7, 9}, "an end of turn that is no special token is none"


def differences(teacher, student) -> list[str]:
    """What the two are refused for; nothing if they are not."""
    try:
        models.refuse_other_tokenizer("S", teacher, student)
    except ModelError as error:
        told = error
    else:
        return []
    assert all(p.where.startswith("S: ") and p.found != p.expected and p.remedy for p in told.problems)
    assert all(len(line) < 1000 for line in str(told).splitlines())
    return [p.where.removeprefix("S: ") for p in told.problems]


def variants():
    for text in (tiny.TEXT, tiny.TEXT[:2]):
        for pre in (None, DIGITS):
            words = tiny.tokenizer(text=text)
            if pre is not None:
                words.backend_tokenizer.pre_tokenizer = pre
            yield words


def test_another_tokenizer_is_refused_with_every_difference(tmp_path):
    same, digits, _, both = variants()
    same.save_pretrained(tmp_path)
    assert differences(tiny.tokenizer(), AutoTokenizer.from_pretrained(tmp_path)) == []
    assert differences(same, digits) == ["pre_tokenizer"]
    assert differences(same, both)[:2] == ["vocabulary", "merges"]
    assert "pre_tokenizer" in differences(same, both)
    eos, added, special = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer()
    eos.eos_token = "<|endoftext|>"
    added.add_tokens(["<new>"])
    special.add_special_tokens({"additional_special_tokens": ["the"]})
    assert differences(same, eos) == ["eos_token"]
    assert differences(same, added) == ["vocabulary", "1 added tokens"]
    assert "1 added tokens" in differences(same, special)
    assert differences(same, tiny.tokenizer(pad="<|endoftext|>")) == [], "padding is masked out everywhere"


def test_equal_width_is_not_enough_and_says_so():
    a, _, b, _ = variants()
    b.add_tokens([f"<{i}>" for i in range(len(a) - len(b))])
    assert len(a) == len(b)
    with pytest.raises(ModelError) as caught:
        models.refuse_other_tokenizer("S", a, b)
    assert caught.value.problems[0].found.startswith(f"{len(a)} tokens")


def test_what_changes_no_token_is_no_difference():
    a, b = tiny.tokenizer(), tiny.tokenizer()
    b.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)]
    )
    assert differences(a, b) == []


def test_tokenizers_that_are_not_refused_give_the_same_tokens():
    pool = [*variants(), *variants()]
    agree = {(i, j): differences(a, b) == [] for i, a in enumerate(pool) for j, b in enumerate(pool)}
    assert Counter(agree.values()) == {True: 16, False: 48}

    @settings(max_examples=300, deadline=None)
    @given(st.sampled_from(sorted(agree)), TEXTS)
    def same(pair: tuple[int, int], text: str) -> None:
        a, b = (pool[i] for i in pair)
        assert not agree[pair] or a.encode(text) == b.encode(text)

    same()


def test_the_digest_of_the_tokenizer_is_canonical_json():
    words = tiny.tokenizer()
    backend = json.loads(words.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    roles["unk_token"] = "<|endoftext|>"
    assert models.tokenizer_digest(words) == digest_json({"backend": backend, "roles": roles})
