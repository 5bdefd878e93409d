"""A teacher whose tokenizer is the test server's toy vocabulary, and runs that ask that server."""

from __future__ import annotations

from pathlib import Path

import tiny
from test_annotate import chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from limbeck.ledger.canonical import digest_bytes
from limbeck.recipe import Recipe
from limbeck.records import Split
from limbeck.render.examples import make_set, write_examples
from limbeck.rundir import RunDir
from limbeck.signal import annotate as stage
from limbeck.testing import Server, Settings
from limbeck.testing.vocabulary import Vocabulary

SIZE = 515
START, END, PAD = "<|512|>", "<|513|>", "<|514|>"
SERVER = Settings(vocabulary=SIZE)


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if it is shown, else one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(rest)) for byte in range(256)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every id of the toy vocabulary reads as it does there; the last three are special."""
    letters, toy = byte_characters(), Vocabulary(SIZE)
    vocab = {"".join(letters[byte] for byte in toy.tokens[n]): n for n in range(SIZE - 3)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([START, END, PAD])
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=PAD, model_max_length=512
    )
    words.chat_template = tiny.CHATML.replace("<|im_start|>", START).replace("<|im_end|>", END)
    return words


def save_teacher(directory: Path, *, seed: int = 0) -> Path:
    tiny.llama(SIZE, seed=seed).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def recipe_for(teacher: Path, base_url: str, *, k: int = 7, **server) -> Recipe:
    asked = {"base_url": base_url, "model": "toy", "concurrency": 4} | server
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "prompts": [{"kind": "self-prompt", "count": 1}],
            "student": {"kind": "pruned", "layers": 2},
            "teacher": {"model": str(teacher), "precision": "float32"},
            "signal": {"kind": "top_k", "k": k, "server": asked},
            "train": {"allow_biased": True},
        }
    )


def run_with(root: Path, recipe: Recipe, lengths: list[int]) -> RunDir:
    """A RUN directory that has come as far as its examples, one of them held out."""
    name, some = recipe.teachers[0].name, digest_bytes(b"something")
    chats = [chat(i, n, name, vocab=SIZE) for i, n in enumerate(lengths)]
    chats.append(chat(99, 12, name, split=Split.HELD_OUT))
    write_examples(root / "examples", make_set(chats, tokenizer=some, templates={name: some}, max_length=999))
    return RunDir(root)


LENGTHS = [30, 12, 45, 20, 27, 33, 50, 28]


def attempted(teacher: Path, root: Path, server: Server, **changes):
    recipe = recipe_for(teacher, server.url + "/v1", **changes)
    run = run_with(root, recipe, LENGTHS)
    return recipe, run


def work(teacher: Path, url: str, root: Path) -> None:
    """The stage alone, of a run whose examples are there; in a process to be killed."""
    stage._SHARD_MIN = 40
    stage.annotate(recipe_for(teacher, url), RunDir(root))
