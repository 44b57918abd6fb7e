"""Rows that share forward passes: a left-padded batch over the model's own forward and cache; rows join and leave.

A model whose positions or masks are its own says so by three attributes: `prompt_positions(input_ids, attention_mask)`
(of whole prompts, [B, …, S]), `next_positions(position_ids)` (those of one more id, [B, …, 1], from the last two) and
`whole_prompts` (true where a prompt must be read in one call).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from common.inference.cache import new_cache
from common.model.loss import without_routers
from common.versions import CACHE

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from common.engine.replay import Replay
    from common.engine.request import Row
    from common.inference.prefix_cache import PrefixCache


def prompt_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] of left-padded prompts: 0, 1, 2, … from the first token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def next_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Positions [B, 1] after the last of [B, S]."""
    return position_ids[:, -1:] + 1


class KVBatch:
    """B rows that go through the model together, and their key-value cache, padded on the left to K columns.

    ids [B, S]: the prompts. mask [B, K]: 1 where a row has an id. positions: those of the prompts, and once these are
    read those of the last two columns. read_to: columns of the prompts that have been read.
    """

    def __init__(self, net: PreTrainedModel, rows: Sequence[Row], prompts: Sequence[list[int]], pad_id: int) -> None:
        """rows: whose prompts these are, in order. The prompts have not been read yet; see `prefill`."""
        width = max(map(len, prompts))
        self.net = net
        self.rows = list(rows)
        self.ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=net.device)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=net.device)
        self.positions = getattr(net, "prompt_positions", prompt_positions)(self.ids, self.mask)
        self.cache = new_cache(net.config)
        self.read_to = 0

    def resume(self, prefixes: PrefixCache) -> None:
        """Begin behind what is kept of the prompts: with the last columns, as many as all rows need to have read."""
        found = [prefixes.find(row.scope, row.ask.ids) for row in self.rows]
        lengths = [len(row.ask.ids) for row in self.rows]
        left = max(length - sum(map(len, parts)) for length, parts in zip(lengths, found, strict=True))
        for row, length in zip(self.rows, lengths, strict=True):
            row.cached = max(0, length - left)
        if any(row.cached for row in self.rows):
            self.read_to = self.ids.shape[1] - left
            prefixes.fill(self.cache, list(map(_first, found, [row.cached for row in self.rows])), self.read_to)

    def offer(self, prefixes: PrefixCache, numbers: Iterable[int]) -> None:
        """Give what these rows have read to be kept."""
        for number in numbers:
            row, count = self.rows[number], int(self.mask[number].sum())
            prefixes.offer(row.scope, [*row.ask.ids, *row.ids][:count], self.cache, number)

    def prefill(self, most: int) -> torch.Tensor | None:
        """Read at most `most` columns of the prompts: the logits [B, V] after the last one, or None before the end."""
        columns = self.ids.shape[1]
        start = self.read_to
        end = columns if getattr(self.net, "whole_prompts", False) else min(columns, start + most)
        logits = self._forward(self.ids[:, start:end], self.mask[:, :end], self.positions[..., start:end])
        self.read_to = end
        if end < columns:
            return None
        last = self.positions[..., -2:]
        self.positions = last if columns > 1 else torch.cat([last, last], -1)
        return logits

    def step(self, ids: list[int], replay: Replay | None = None) -> torch.Tensor:
        """Append one id to each row (a list of B): the logits [B, V] after it; replay: of the net, in its place."""
        column, self.mask, new = self.next_column(ids)
        self.positions = torch.cat([self.positions, new], -1)[..., -2:]
        return replay(column, self.mask, new, self.cache) if replay else self._forward(column, self.mask, new)

    def next_column(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids [B, 1], mask [B, K + 1], positions [B, …, 1]) of one more id in each row."""
        column = torch.tensor(ids, device=self.mask.device)[:, None]
        new = getattr(self.net, "next_positions", next_positions)(self.positions)
        return column, pad(self.mask, (0, 1), value=1), new

    def forward_over(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, layers: list[Any]
    ) -> torch.Tensor:
        """As a step's logits [B, V], over another cache's layers."""
        cache = new_cache(self.net.config)
        cache.layers = layers
        return self._forward(ids, mask, positions, cache)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Logits [B, V], fp32, after the last column of ids [B, S]; mask [B, K] covers the cached columns too."""
        output = self.net(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache or self.cache} | without_routers(self.net),
        )
        return output.logits[:, -1].float()

    def join(self, other: KVBatch) -> None:
        """Take in the rows of `other`, whose prompts have been read; both are padded to the wider one."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self._widen(width)
        other._widen(width)
        self.rows += other.rows
        self.mask = torch.cat([self.mask, other.mask])
        self.positions = torch.cat([self.positions, other.positions])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for (kept, name, _), (more, _, _) in zip(_tensors(mine), _tensors(theirs), strict=True):
                kept[name] = torch.cat([kept[name], more[name]])

    def keep(self, numbers: list[int]) -> None:
        """Let go of all rows but these; columns that only they had go as well."""
        self.rows = [self.rows[number] for number in numbers]
        index = torch.tensor(numbers, device=self.mask.device)
        first = int(self.mask[index].any(0).int().argmax())
        self.mask = self.mask[index, first:]
        self.positions = self.positions[index]
        for layer in self.cache.layers:
            for kept, name, has_columns in _tensors(layer):
                rows = index.to(kept[name].device)
                kept[name] = kept[name][rows, :, first:] if has_columns else kept[name][rows]

    def _widen(self, width: int) -> None:
        """Pad mask and cache on the left to `width` columns."""
        missing = width - self.mask.shape[1]
        if missing:
            self.mask = pad(self.mask, (missing, 0))
            for layer in self.cache.layers:
                for kept, name, has_columns in _tensors(layer):
                    if has_columns:
                        kept[name] = pad(kept[name], (0, 0, missing, 0))


def _first(parts: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The first `count` rows of tensors that stand one behind the other."""
    starts = itertools.accumulate(map(len, parts), initial=0)
    return [part[: count - start] for start, part in zip(starts, parts, strict=False) if start < count]


def _tensors(layer: Any) -> Iterator[tuple[dict[Any, torch.Tensor], Any, bool]]:
    """(where it is kept, under which name, whether it is [B, heads, K, D] or [B, …]) of each tensor of a layer."""
    attributes = vars(layer)
    for name in ("keys", "values"):
        if attributes.get(name) is not None:
            yield attributes, name, True
    for states in (attributes.get("conv_states", {}), attributes.get("recurrent_states", {})):
        yield from ((states, number, False) for number, state in states.items() if state is not None)
