"""A tokenizer as a GGUF file has it: tokens with their kinds, merges, and the name for how text is split first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf import TokenType

from limbeck.errors import Problem

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast


_OTHERS = "use llama.cpp's own converter for others"


class Words(NamedTuple):
    """What is written of a tokenizer."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    """llama.cpp's name for how text is split before it is merged."""
    special: dict[str, int]
    """Ids by role: `bos`, `eos`, `unk`, `pad`."""
    adds_bos: bool
    adds_eos: bool
    template: str | None


def words_problems(words: PreTrainedTokenizerFast, rows: int) -> list[Problem]:
    """Why a tokenizer cannot be written; `rows` is how many embeddings the model has."""
    told, where = _backend(words), "student: tokenizer"
    problems = []
    if told["model"].get("type") != "BPE" or told["model"].get("byte_fallback"):
        found = f"{told['model'].get('type')}{', falling back to bytes' if told['model'].get('byte_fallback') else ''}"
        problems.append(Problem(where, found, "byte-level BPE, as of GPT-2 and SmolLM2", _OTHERS))
    if told.get("normalizer"):
        problems.append(Problem(f"{where}: normalizer", _short(told["normalizer"]), "none", _OTHERS))
    if _pre(told) is None:
        expected = "GPT-2's splitting, alone or after single digits"
        problems.append(Problem(f"{where}: pre_tokenizer", _short(told["pre_tokenizer"]), expected, _OTHERS))
    if len(words) > rows:
        problems.append(Problem(where, f"{len(words)} tokens", f"at most {rows}, the model's embeddings"))
    return problems


def read_words(words: PreTrainedTokenizerFast, rows: int) -> Words:
    """Everything a GGUF file says of a tokenizer that `words_problems` has nothing against."""
    told = _backend(words)
    added = {token["id"]: token for token in told["added_tokens"]}
    names = {place: token for token, place in words.get_vocab().items()}
    tokens, kinds = [], []
    for place in range(rows):
        tokens.append(names.get(place, f"[PAD{place}]"))
        kind = TokenType.NORMAL if place in names else TokenType.UNUSED
        if place in added:
            kind = TokenType.CONTROL if added[place]["special"] else TokenType.USER_DEFINED
        kinds.append(int(kind))
    plain, whole = (words("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    roles = ("bos", "eos", "unk", "pad")
    found = {role: getattr(words, f"{role}_token_id") for role in roles}
    return Words(
        tokens=tokens,
        kinds=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in told["model"]["merges"]],
        pre=_pre(told) or "",
        special={role: place for role, place in found.items() if place is not None},
        adds_bos=whole[: len(whole) - len(plain)] == [words.bos_token_id],
        adds_eos=len(whole) > len(plain) and whole[-1] == words.eos_token_id,
        template=words.chat_template if isinstance(words.chat_template, str) else None,
    )


def add_words(file: GGUFWriter, words: Words) -> None:
    """Write it."""
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(words.pre)
    file.add_token_list(words.tokens)
    file.add_token_types(words.kinds)
    file.add_token_merges(words.merges)
    adders = {
        "bos": file.add_bos_token_id,
        "eos": file.add_eos_token_id,
        "unk": file.add_unk_token_id,
        "pad": file.add_pad_token_id,
    }
    for role, place in words.special.items():
        adders[role](place)
    file.add_add_bos_token(words.adds_bos)
    file.add_add_eos_token(words.adds_eos)
    if words.template is not None:
        file.add_chat_template(words.template)


def _pre(told: dict[str, Any]) -> str | None:
    """llama.cpp's name for a splitting (llama-vocab.cpp), where it is one whose name says all of it."""
    part = told.get("pre_tokenizer") or {}
    parts = part.get("pretokenizers", []) if part.get("type") == "Sequence" else [part]
    last = parts[-1] if parts else {}
    gpt2 = last.get("type") == "ByteLevel" and last.get("use_regex") and not last.get("add_prefix_space")
    if not gpt2:
        return None
    if len(parts) == 1:
        return "gpt-2"
    digits = len(parts) == 2 and parts[0].get("type") == "Digits" and parts[0].get("individual_digits")
    return "smollm" if digits else None


def _backend(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(words.backend_tokenizer.to_str())


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
