"""Which layers a pruned student keeps, by measurement on the teacher's own answers.

    greedy        remove one layer at a time, each time the one without which the model strays least
    divergence    remove at once those layers each of which, taken out alone, makes the model stray least
    influence     remove at once those that turn their input least: 1 - cosine(input, output), the block
                  influence of ShortGPT (Men et al., arXiv 2403.03853)
    even          keep the first, the last, and layers at even distances between them; nothing is measured
    all           keep every layer (`all_layers`)

How far a model strays is said in `calibrate`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.records import Example
from limbeck.render.batches import Batch
from limbeck.student.calibrate import TOKENS, Calibration, calibrate, predicting, stray
from limbeck.student.layers import after, hidden_of, only, stack_of

Criterion = Literal["greedy", "divergence", "influence", "even", "all"]
MEASURED: Criterion = "divergence"
"""What `choose: importance` means; docs/student.md has the figures it was chosen by."""


class Choice(NamedTuple):
    """The layers that stay, and why. Layers are counted from 0."""

    criterion: Criterion
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    """Those that went: in the order they went for `greedy`, else least important first."""
    scores: tuple[float, ...]
    """The harm of removing each layer alone; empty for `even` and `all`."""
    unit: str
    """Of the scores."""
    divergence: tuple[float, ...]
    """KL(teacher || model), nats a token: after each removal for `greedy`, else after all of them."""
    tokens: int
    """Supervised tokens measured on; 0 for `even` and `all`."""


def choose_layers(
    model: PreTrainedModel,
    examples: Sequence[Example],
    keep: int,
    criterion: Criterion = MEASURED,
    *,
    seed: int = 0,
    tokens: int = TOKENS,
    on_measured: Callable[[], None] = lambda: None,
) -> Choice:
    """Choose `keep` of the model's layers. The model is left as it was.

    `examples` are the teacher's answers; about `tokens` supervised tokens of them are drawn by `seed`.

    Raises:
        ModelError: more layers asked for than there are, layers that cannot be told apart, or no examples.

    """
    count = len(stack_of(model).layers)
    if not 1 <= keep <= count:
        expected = f"1 to {count}, the teacher's layers"
        raise ModelError("there are not so many layers", [Problem("student.layers", str(keep), expected)])
    if criterion == "even":
        return _even(count, keep)
    with torch.inference_mode():
        calibration = calibrate(model, examples, seed=seed, tokens=tokens)
        if criterion == "greedy":
            return _greedy(model, calibration, keep, on_measured)
        if criterion == "divergence":
            scores, unit = _alone(model, calibration, on_measured), "nats a token"
        else:
            scores, unit = _influence(model, calibration), "1 - cosine"
        choice = _least(criterion, scores, keep, unit, calibration.positions)
        if not choice.removed:
            return choice
        return choice._replace(divergence=(stray(model, calibration, lambda _: only(model, choice.kept)),))


def all_layers(model: PreTrainedModel) -> Choice:
    """The choice that keeps every layer; nothing is measured."""
    return Choice("all", tuple(range(len(stack_of(model).layers))), (), (), "none", (), 0)


def _even(count: int, keep: int) -> Choice:
    kept = [count - 1] if keep == 1 else [round(i * (count - 1) / (keep - 1)) for i in range(keep)]
    removed = tuple(i for i in range(count) if i not in kept)
    return Choice("even", tuple(kept), removed, (), "none", (), 0)


def _least(criterion: Criterion, scores: Sequence[float], keep: int, unit: str, positions: int) -> Choice:
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = len(scores) - keep
    return Choice(criterion, tuple(sorted(ranked[gone:])), tuple(ranked[:gone]), tuple(scores), unit, (), positions)


def _alone(model: PreTrainedModel, calibration: Calibration, on_measured: Callable[[], None]) -> list[float]:
    """How far the model strays without each of its layers."""
    layers = list(range(len(stack_of(model).layers)))
    outputs = _outputs(model, calibration, layers)
    scores = []
    for layer in layers:
        scores.append(_without(model, calibration, layers, layer, outputs))
        on_measured()
    return scores


def _without(
    model: PreTrainedModel,
    calibration: Calibration,
    kept: list[int],
    layer: int,
    outputs: list[dict[int, Any]],
) -> float:
    """How far the model with the layers `kept` but one strays. The layers before that one are not computed
    again: `outputs` holds what they gave.
    """
    at = kept.index(layer)
    if at == 0:
        return stray(model, calibration, lambda _: only(model, kept[1:]))
    return stray(model, calibration, lambda b: after(model, kept[at + 1 :], outputs[b][kept[at - 1]]))


def _outputs(model: PreTrainedModel, calibration: Calibration, kept: list[int]) -> list[dict[int, Any]]:
    """What each layer of the model with the layers `kept` returns, for each batch."""
    layers, gathered = stack_of(model).layers, []
    for batch in calibration.batches:
        seen: dict[int, Any] = {}
        with only(model, kept):
            _hooked(
                model,
                batch,
                {i: layers[i] for i in kept},
                lambda i, _, output, seen=seen: seen.update({i: output}),
            )
        gathered.append(seen)
    return gathered


def _influence(model: PreTrainedModel, calibration: Calibration) -> list[float]:
    layers = stack_of(model).layers
    scores = [0.0] * len(layers)
    for batch in calibration.batches:

        def add(i: int, given: Tensor, output: Any, at_BT: Tensor = batch.predict_BT) -> None:
            turned_N = 1 - cosine_similarity(given[at_BT].float(), hidden_of(output)[at_BT].float(), dim=-1)
            scores[i] += float(turned_N.double().sum())

        _hooked(model, batch, dict(enumerate(layers)), add)
    return [score / calibration.positions for score in scores]


def _hooked(
    model: PreTrainedModel, batch: Batch, layers: dict[int, Any], see: Callable[[int, Tensor, Any], None]
) -> None:
    """Run the model and show `see` the input and the output of each of the layers."""

    def hook(i: int) -> Callable[..., None]:
        return lambda _, args, kwargs, output: see(i, args[0] if args else kwargs["hidden_states"], output)

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in layers.items()]
    try:
        predicting(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _greedy(model: PreTrainedModel, calibration: Calibration, keep: int, on_measured: Callable[[], None]) -> Choice:
    """Remove the least harmful layer, again and again.

    What a layer's removal adds to the divergence seldom falls while others go. So its last measured value,
    which may be of an earlier round, ranks it, and only the layer on top is measured anew: it goes if it
    stays on top (the lazy greedy algorithm of Minoux, 1978).
    """
    kept = list(range(len(stack_of(model).layers)))
    scores = _alone(model, calibration, on_measured)
    added = {layer: (scores[layer], 0) for layer in kept}
    removed: list[int] = []
    path: list[float] = []
    while len(kept) > keep:
        now = path[-1] if path else 0.0
        outputs = _outputs(model, calibration, kept)
        queue = [(added[layer][0], layer) for layer in kept]
        heapq.heapify(queue)
        while added[(layer := heapq.heappop(queue)[1])][1] != len(removed):
            added[layer] = (_without(model, calibration, kept, layer, outputs) - now, len(removed))
            heapq.heappush(queue, (added[layer][0], layer))
        path.append(now + added[layer][0])
        kept.remove(layer)
        removed.append(layer)
    return Choice(
        "greedy",
        tuple(kept),
        tuple(removed),
        tuple(scores),
        "nats a token",
        tuple(path),
        calibration.positions,
    )
