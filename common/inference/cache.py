"""Keys and values of the ids a model has read, in tensors with room for more: one more id is not a copy of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOM = 64  # columns: as many ids are appended between two copies


class RoomyLayer(DynamicLayer):
    """transformers' layer of a cache, whose keys and values [B, heads, K, D] are parts of larger tensors.

    What is put in the place of keys or values is taken over with the next columns, into a larger tensor of its own; so
    nothing that was taken out of them is written to, and they may be cut, padded or joined by whom it suits.
    """

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
        larger, given = self.given.get(name, (old, None))
        if given is not old or end > larger.shape[-2]:
            larger = old.new_empty((*old.shape[:-2], end + ROOM, old.shape[-1]))
            larger[..., :width, :] = old
        larger[..., width:end, :] = new
        self.given[name] = larger, larger[..., :end, :]
        return self.given[name][1]


def roomy_cache(config: PreTrainedConfig) -> DynamicCache | None:
    """An empty cache for `generate` of a model of attention alone; None for others, which make their own.

    Layers that look at the last ids only keep no others, as transformers has them.
    """
    cache = DynamicCache(config=config)
    if any(type(one) not in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers):
        return None
    cache.layers = [RoomyLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
