"""Prompts read, and the keys and values of the rows that decode."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

_CAPACITY_STEP = 32  # slots added at once when the longest row needs another
_READ_TOKENS = 8_192  # padded prompt tokens that one forward pass reads
_MIN_PREFIX = 8  # shared tokens below which reading them once is not worth a pass


@lru_cache(maxsize=64)
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward has this parameter; the wrapper of an adapter is looked through."""
    base = getattr(model, "get_base_model", None)
    return name in _parameters(type(base() if callable(base) else model))


def has_slots(model: PreTrainedModel) -> bool:
    """Whether a key's place in the cache says nothing: positions are given, and layers keep all keys."""
    layers = DynamicCache(config=model.config).layers
    return accepts(model, "position_ids") and {type(layer) for layer in layers} == {DynamicLayer}


def _forward(model: PreTrainedModel, ids_NT: Tensor, mask_NS: Tensor, positions_NT: Tensor, cache: Cache) -> Tensor:
    """Logits [N, V] of the last position; where the model can be told so, no others are computed.

    The last position is given as an index: the number 1 would give the head a strided view of the hidden states, whose
    product copies the head's weights once a row on a CPU (10 GB for 176 rows and a vocabulary of 49,152).
    """
    last = torch.tensor([ids_NT.shape[1] - 1], device=ids_NT.device)
    options = {"position_ids": positions_NT, "logits_to_keep": last}
    given = {name: value for name, value in options.items() if accepts(model, name)}
    output = model(input_ids=ids_NT, attention_mask=mask_NS, past_key_values=cache, use_cache=True, **given)
    return output.logits[:, -1]


class Read(NamedTuple):
    """Prompts read together: their cache, which of its S slots hold tokens, and what comes next."""

    cache: DynamicCache
    mask_NS: Tensor
    logits_NV: Tensor


def read(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], prefix: DynamicCache | None = None) -> Read:
    """Reads prompts that all begin with `prefix`; shorter ones are padded between it and their rest.

    Equal prompts are read once and their cache is copied.
    """
    known = 0 if prefix is None else prefix.get_seq_length()
    unique = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    width = max(map(len, unique)) - known
    ids = [[0] * (width + known - len(prompt)) + list(prompt[known:]) for prompt in unique]
    lengths_N1 = torch.tensor([[len(prompt) - known] for prompt in unique], device=model.device)
    mask_NS = pad(torch.arange(width, device=model.device) >= width - lengths_N1, (known, 0), value=True)
    positions_NT = (mask_NS.cumsum(-1) - 1).clamp(min=0)[:, known:]
    cache = DynamicCache(None if prefix is None else _copies(prefix, len(unique)), config=model.config)
    logits_NV = _forward(model, torch.tensor(ids, device=model.device), mask_NS, positions_NT, cache)
    if len(unique) < len(prompts):
        places_N = _places(model, [unique[prompt] for prompt in prompts])
        cache.reorder_cache(places_N)
        mask_NS, logits_NV = mask_NS[places_N], logits_NV[places_N]
    return Read(cache, mask_NS, logits_NV)


def _copies(prefix: DynamicCache, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in _pairs(prefix)]


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    return [(cast("Tensor", keys), cast("Tensor", values)) for keys, values, _ in cache]


def _places(model: PreTrainedModel, places: Sequence[int]) -> torch.LongTensor:
    return cast("torch.LongTensor", torch.tensor(places, device=model.device))


def read_prefix(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> DynamicCache | None:
    """The cache, of one row, of the tokens that all prompts begin with; None if they are not worth a pass.

    At least one token of each prompt stays out of it: what follows the last one is still to be computed.
    """
    if len(set(prompts)) < 2:
        return None
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    return read(model, [first[:shared]]).cache if shared >= _MIN_PREFIX else None


class Row(Protocol):
    """What a store must know of a row: the token it is fed next, its position, the slot of its key."""

    fed: int
    position: int
    slot: int


class Store(Protocol):
    """Where the keys and values of the decoding rows lie."""

    @property
    def read_tokens(self) -> float:
        """Padded prompt tokens that may be admitted at once; infinite where all rows must come together."""
        ...

    def admit(self, places: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> Read:
        """Reads prompts into the rows at `places`."""
        ...

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Feeds every row its token; logits [B, V] of what comes next."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Drops all rows but these."""
        ...


def _fed(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    ids_B1 = torch.tensor([[row.fed] for row in rows], device=model.device)
    return ids_B1, torch.tensor([[row.position] for row in rows], device=model.device)


class Columns:
    """A `Store` of rows that are read together and fed together, in the model's own kind of cache.

    Right for every layer that the model may have: windows, recurrent states.
    """

    read_tokens = math.inf

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def admit(self, places: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> Read:
        """As `Store.admit`; `places` are all rows."""
        new = read(self._model, prompts)
        self._cache, self._mask_BS = new.cache, new.mask_NS
        return new

    def step(self, rows: Sequence[Row]) -> Tensor:
        """As `Store.step`."""
        self._mask_BS = pad(self._mask_BS, (0, 1), value=True)
        ids_B1, positions_B1 = _fed(self._model, rows)
        return _forward(self._model, ids_B1, self._mask_BS, positions_B1, self._cache)

    def keep(self, places: Sequence[int]) -> None:
        """As `Store.keep`."""
        places_N = _places(self._model, places)
        self._cache.reorder_cache(places_N)
        self._mask_BS = self._mask_BS[places_N]


class _SlotLayer(DynamicLayer):
    """A layer whose rows end in different slots; keys and values are [B, heads, capacity, d].

    Attention is handed all slots, and the mask says which are filled: on a CPU, products over whole,
    contiguous tensors are several times faster than over a part of each row. Adding a key copies nothing.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, rows: int, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys = keys.new_zeros(rows, keys.shape[1], 0, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], 0, values.shape[3])
        self.rows_B = self.slots_B = torch.empty(0, dtype=torch.long)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[self.rows_B, :, self.slots_B] = key_states[:, :, 0]
        self.values[self.rows_B, :, self.slots_B] = value_states[:, :, 0]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class Slots:
    """A `Store` whose rows begin and end on their own: prompts may take finished rows' places any time."""

    read_tokens = _READ_TOKENS

    def __init__(self, model: PreTrainedModel, rows: int, prefix: DynamicCache | None = None):
        self._model, self._prefix = model, prefix
        self._filled_BS = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
        self._layers: list[_SlotLayer] = []

    def admit(self, places: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> Read:
        """As `Store.admit`."""
        new = read(self._model, prompts, self._prefix)
        if not self._layers:
            rows = len(self._filled_BS)
            self._layers = [_SlotLayer(rows, keys, values) for keys, values in _pairs(new.cache)]
            self._cache = Cache(layers=list(self._layers))
        slots = new.mask_NS.shape[1]
        self._reserve(slots)
        places_N = _places(self._model, places)
        for layer, (keys, values) in zip(self._layers, _pairs(new.cache), strict=True):
            layer.keys[places_N, :, :slots] = keys
            layer.values[places_N, :, :slots] = values
        self._filled_BS[places_N] = pad(new.mask_NS, (0, self._filled_BS.shape[1] - slots), value=False)
        return new

    def _reserve(self, slots: int) -> None:
        more = slots - self._filled_BS.shape[1]
        if more > 0:
            more += -slots % _CAPACITY_STEP
            self._filled_BS = pad(self._filled_BS, (0, more), value=False)
            for layer in self._layers:
                layer.keys = pad(layer.keys, (0, 0, 0, more))
                layer.values = pad(layer.values, (0, 0, 0, more))

    def step(self, rows: Sequence[Row]) -> Tensor:
        """As `Store.step`."""
        self._reserve(max(row.slot for row in rows) + 1)
        rows_B = torch.arange(len(rows), device=self._model.device)
        slots_B = torch.tensor([row.slot for row in rows], device=self._model.device)
        self._filled_BS[rows_B, slots_B] = True
        for layer in self._layers:
            layer.rows_B, layer.slots_B = rows_B, slots_B
        ids_B1, positions_B1 = _fed(self._model, rows)
        return _forward(self._model, ids_B1, self._filled_BS, positions_B1, self._cache)

    def keep(self, places: Sequence[int]) -> None:
        """As `Store.keep`."""
        places_N = _places(self._model, places)
        self._filled_BS = self._filled_BS[places_N]
        self._cache.reorder_cache(places_N)
