"""Keys and values of the ids a model has read, in tensors with room for more: one more id is not a copy of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from common.errors import UserError
from common.versions import CACHE, DummyLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAMES = ("keys", "values")
ROOM = 64  # columns: as many ids are appended between two copies
ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


class RoomyLayer(DynamicLayer):
    """transformers' layer of a cache, whose keys and values [B, heads, K, D] are parts of larger tensors.

    What is put in the place of keys or values is taken over with the next columns, into a larger tensor of its own; so
    nothing that was taken out of them is written to, and they may be cut, padded or joined by whom it suits.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # the larger tensor, and what was given out of it

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with these columns [B, heads, S, D] at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not old.numel():
            return torch.cat([old, new], -2)
        width, end = old.shape[-2], old.shape[-2] + new.shape[-2]
        larger = self._larger(name, old, end)
        larger[..., width:end, :] = new
        return self._given(name, larger, end)

    def _larger(self, name: str, old: torch.Tensor, end: int) -> torch.Tensor:
        """What `old` is a part of, or a copy of it, with at least `end` columns."""
        larger, given = self.given.get(name, (old, None))
        if given is not old or end > larger.shape[-2]:
            larger = old.new_empty((*old.shape[:-2], end + ROOM, old.shape[-1]))
            larger[..., : old.shape[-2], :] = old
        return larger

    def _given(self, name: str, larger: torch.Tensor, end: int) -> torch.Tensor:
        self.given[name] = larger, larger[..., :end, :]
        return self.given[name][1]

    def with_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with room for one more column, which whoever fills it announces by `grow`."""
        end = self.keys.shape[-2] + 1
        kept = self._larger("keys", self.keys, end), self._larger("values", self.values, end)
        self.keys, self.values = (self._given(name, one, end - 1) for name, one in zip(NAMES, kept, strict=True))
        return kept

    def grow(self) -> None:
        """Count the column as its own that was filled after `with_room`."""
        end = self.keys.shape[-2] + 1
        self.keys, self.values = (self._given(name, self.given[name][0], end) for name in NAMES)


# of a model's layers: none (another layer's is used), keys and values, states, both
SHARED = (DummyLayer, RoomyLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


def with_roomy_cache(net: PreTrainedModel) -> dict[str, DynamicCache]:
    """An argument for `generate`: an empty cache, of a model of attention alone; {} for others, which make their own.

    Layers that look at the last ids only keep no others, as transformers has them.
    """
    cache = DynamicCache(config=getattr(net, "config", None))
    kinds = {type(one) for one in cache.layers}
    if not kinds or not kinds.issubset(ATTENTION):
        return {}
    cache.layers = [RoomyLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return {CACHE: cache}


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model whose rows join and leave; UserError where a layer keeps what rows cannot share.

    Layers of attention keep all keys, also where they look at the last ones only, so that rows can be padded. Those of
    linear attention keep states, which have no columns: padding is not in them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(one) in ATTENTION else one for one in cache.layers]
    other = {type(one).__name__ for one in cache.layers if type(one) not in SHARED}
    if other:
        raise UserError(
            f"{config.model_type}: 服务还不能给这种模型 the service cannot batch rows of this model yet, whose layers "
            f"keep {', '.join(sorted(other))}; predict.py and evaluation.py answer with it"
        )
    return cache
