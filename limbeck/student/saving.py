"""A student on disk: in Hugging Face layout, and proved to be the model that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from limbeck.errors import ModelError, Problem

_PROBE = 16
"""Tokens that the saved student is compared on with the one that was measured."""


def save(model: PreTrainedModel, words: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write weights, configuration and tokenizer."""
    with quiet():
        model.save_pretrained(directory)
    words.save_pretrained(directory)


def prove(model: PreTrainedModel, directory: Path) -> None:
    """Load what was saved and compare it with the model that was measured: an architecture whose layers
    depend on their number in a way that the configuration does not show would come back as another model.

    Raises:
        ModelError: it comes back as another model.


    """
    with quiet():
        both: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    saved, told = both
    unfit = {*told["missing_keys"], *told["unexpected_keys"], *(str(m[0]) for m in told["mismatched_keys"])}
    if unfit:
        raise _other_model(model, f"{len(unfit)} weights that do not fit: {', '.join(sorted(unfit)[:4])}")
    tokens_1T = torch.arange(_PROBE)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        measured, loaded = (
            m(input_ids=tokens_1T.to(m.device), use_cache=False).logits.float()
            for m in (model, saved.eval().to(model.device))  # two processors round otherwise
        )
    difference = float((measured - loaded).abs().mean() / measured.std())
    if not difference < 0.01:
        raise _other_model(model, f"logits that differ by {difference:.2g} standard deviations")


def _other_model(model: PreTrainedModel, found: str) -> ModelError:
    remedy = "this architecture cannot be pruned so; use student: {kind: pretrained, ...}"
    problem = Problem(type(model).__name__, found, "the same weights and logits", remedy)
    return ModelError("the pruned student is another model when it is loaded again", [problem])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, and without its warnings: what they warn of is checked."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
