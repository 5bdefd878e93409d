"""Real models of a few thousand parameters, made on the spot: a byte-level BPE tokenizer with a ChatML template, and a
Llama with grouped-query attention."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. How many eggs does a duck lay in a day?",
    "A teacher writes an answer, and a smaller student learns from it. Sieben Ähren, 12 + 30 = 42.",
    "Tell me about the sea. What is the capital of France? Paris is the capital of France.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
)


def tokenizer(
    *, template: str | None = CHATML, text: tuple[str, ...] = TEXT, pad: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 entries. As in SmolLM2, pad is eos unless told otherwise."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    core.train_from_iterator(text, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token=pad,
        model_max_length=512,
    )
    if template is not None:
        wrapped.chat_template = template
    return wrapped


def llama(
    vocab: int, *, layers: int = 4, hidden: int = 32, head: int | None = None, seed: int = 0, tied: bool = True
) -> LlamaForCausalLM:
    """A Llama with 4 heads and 2 key-value heads, weights large enough that its distributions are not flat."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head or hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save(
    directory: Path,
    *,
    layers: int = 4,
    seed: int = 0,
    template: str | None = CHATML,
    text: tuple[str, ...] = TEXT,
) -> Path:
    """A model directory as Hugging Face lays it out; returns it."""
    words = tokenizer(template=template, text=text)
    llama(len(words), layers=layers, seed=seed).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
