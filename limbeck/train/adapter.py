"""A low-rank adapter (LoRA, arXiv 2106.09685, by peft) that learns in place of the student's own weights."""

from __future__ import annotations

import copy
from typing import Any, cast

from transformers import PreTrainedModel

from limbeck.recipe import Adapter


def adapted(model: PreTrainedModel, settings: Adapter) -> PreTrainedModel:
    """The model with an adapter in its linear layers; nothing else of it learns. The head has none: its logits stay
    those that the loss computes from its weights.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast("int", settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        task_type=TaskType.CAUSAL_LM,
    )
    return cast("PreTrainedModel", get_peft_model(model, config))


def inner(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model itself, with its adapter in place if it has one."""
    return cast("Any", model).get_base_model() if hasattr(model, "peft_config") else model


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its adapter, if it has one, added into its weights."""
    copied = copy.deepcopy(model)
    return cast("Any", copied).merge_and_unload() if hasattr(model, "peft_config") else copied
