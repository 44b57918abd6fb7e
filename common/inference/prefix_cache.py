"""What a model has read, kept for prompts that begin alike: keys and values in blocks of tokens, least used first out.

Exact: a block is found by its ids and all ids before it, within one scope (whatever else the keys depend on or must
not be shared across), and only where a token's keys depend on nothing behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import DynamicLayer

from common import distributed
from common.errors import UserError
from common.inference.cache import NAMES, RoomyLayer, new_cache, with_roomy_cache
from common.inference.products import weight_bytes
from common.model.layers import causal_of
from common.versions import CACHE, DummyLayer

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

BLOCK = 16  # tokens
LEAST_SHARED = 512  # tokens not read twice, for which several prompts are begun with one reading
PART, LEAST = 8, 64 << 20  # kept unless told otherwise: bytes, an eighth of the weights', and at least so many


class Block:
    """BLOCK tokens, `ids`, behind those of `parent`, and their keys and values in all layers: `values` [BLOCK, N].

    The root of a scope has no tokens: its ids are (scope,).
    """

    def __init__(self, parent: Block | None, ids: tuple[Any, ...], values: torch.Tensor | None = None) -> None:
        self.parent = parent
        self.ids = ids
        self.values = values
        self.children: dict[tuple[Any, ...], Block] = {}


class _ForMany(DynamicLayer):
    """A layer's keys and values of one row, that many rows go on from; theirs are not kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, of which the new ones are forgotten again."""
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


class PrefixCache:
    """Blocks of one model's prompts and answers; not for several threads at once.

    most_tokens: kept at most, and may be changed before `shrink`; None: by the size of the weights. usable: false where
    keys depend on what is behind them (prompts read in both directions), on how long the text is (some RoPE), or where
    layers keep states, which cannot be cut: then nothing is kept and nothing found.
    """

    def __init__(self, net: PreTrainedModel, most_tokens: int | None = None) -> None:
        self.net = net
        self.most_tokens = most_tokens
        self.by_weights = LEAST  # tokens; lowered once it is known how large one is
        self.usable = _is_cuttable(net)
        self.roots: dict[Hashable, Block] = {}
        self.order: OrderedDict[Block, None] = OrderedDict()  # least used first; a block before its parent
        self.layout: list[tuple[int, str, torch.Tensor]] = []  # what a cache has: (layer, name, nothing [heads, 0, D])

    @property
    def tokens(self) -> int:
        """Tokens kept."""
        return len(self.order) * BLOCK

    @property
    def limit(self) -> int:
        """Tokens kept at most."""
        if not self.usable:
            return 0
        return self.by_weights if self.most_tokens is None else max(0, self.most_tokens)

    def known(self, scope: Hashable, ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens are kept: whole blocks, and never all of it."""
        return len(self._path(scope, ids[:-1])) * BLOCK

    def find(self, scope: Hashable, ids: Sequence[int]) -> list[torch.Tensor]:
        """Keys and values of a prompt's first `known` tokens, for `fill`: one [BLOCK, N] a block."""
        path = self._path(scope, ids[:-1])
        self._touch(path)
        return [block.values for block in path if block.values is not None]

    def fill(self, cache: DynamicCache, found: Sequence[Sequence[torch.Tensor]], columns: int) -> None:
        """Give an empty cache so many columns, of which row r has in its last ones those [n, N] of found[r]."""
        sizes = [empty.shape[0] * empty.shape[2] for *_, empty in self.layout]
        rows = [[one.split(sizes, 1) for one in parts] for parts in found]
        starts = [columns - sum(map(len, parts)) for parts in found]
        for place, (number, name, empty) in enumerate(self.layout):
            filled = empty.new_empty(len(found), columns, sizes[place])
            for row, (start, parts) in enumerate(zip(starts, rows, strict=True)):
                filled[row, :start] = 0
                if parts:
                    torch.cat([one[place].to(empty.device) for one in parts], out=filled[row, start:])
            layer: Any = cache.layers[number]
            if not layer.is_initialized:
                layer.lazy_initialization(filled, filled)
            setattr(layer, name, filled.unflatten(2, (empty.shape[0], -1)).transpose(1, 2))

    def offer(self, scope: Hashable, ids: Sequence[int], cache: DynamicCache, row: int = 0) -> None:
        """Keep what the last columns of a row of a cache hold: one column for each of `ids`, all that it has read."""
        if self.limit < BLOCK:
            return
        path = self._path(scope, ids)
        behind, end = len(path) * BLOCK, len(ids) // BLOCK * BLOCK
        if behind < end:
            values = self._values(cache, row, behind - len(ids), end - len(ids) or None)
            last = path[-1] if path else self.roots.setdefault(scope, Block(None, (scope,)))
            for start in range(0, end - behind, BLOCK):
                own = tuple(ids[behind + start : behind + start + BLOCK])
                last.children[own] = last = Block(last, own, values[start : start + BLOCK].clone())
                path.append(last)
        self._touch(path)
        self.shrink()

    def shrink(self) -> None:
        """Let go of the least used blocks beyond the limit."""
        while self.tokens > self.limit:
            block, _ = self.order.popitem(last=False)
            parent = cast(Block, block.parent)
            del parent.children[block.ids]
            if parent.parent is None and not parent.children:
                del self.roots[parent.ids[0]]

    def started(self, scope: Hashable, ids: Sequence[int]) -> DynamicCache | None:
        """A cache of one row with a prompt's first `known` tokens in it; None where nothing can be kept."""
        if not self.usable:
            return None
        cache, found = new_cache(self.net.config), self.find(scope, ids)
        if found:
            self.fill(cache, [found], len(found) * BLOCK)
        return cache

    def generate(
        self, net: Any, scope: Hashable, prompts: Sequence[list[int]] | None, **arguments: Any
    ) -> torch.Tensor:
        """What the net's own generate returns. Of a prompt alone, what is kept is not read again; what several prompts
        begin with, padded on the left, is read once.

        prompts: None where nothing is to be kept.
        """
        alone = prompts is not None and len(prompts) == 1
        cache = None
        if prompts:
            cache = self.started(scope, prompts[0]) if alone else self._begun(net, scope, prompts)
        if cache is None:
            return net.generate(**arguments, **with_roomy_cache(self.net))
        output = net.generate(**arguments, **{CACHE: cache})
        if alone:
            self.offer(scope, output[0, : cache.get_seq_length()].tolist(), cache)
        return output

    def _begun(self, net: Any, scope: Hashable, prompts: Sequence[list[int]]) -> DynamicCache | None:
        """A cache of many rows with the first columns of prompts that are padded on the left to the same length: what
        they begin with, read once and moved to where it stands. None where this saves fewer than LEAST_SHARED tokens.
        """
        common = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
        if common * (len(prompts) - 1) < LEAST_SHARED or distributed.shards_weights():
            return None  # the trunk of a net in parts is not called but through the net
        cache = self._read(causal_of(net).get_decoder(), scope, prompts[0][:common])
        if cache is None:
            return None
        longest = max(map(len, prompts))
        for layer in cache.layers:
            for name in NAMES if getattr(layer, "keys", None) is not None else ():
                one = getattr(layer, name)
                rows = one.new_zeros(len(prompts), *one.shape[1:])
                for row, prompt in zip(rows, prompts, strict=True):
                    pads = min(longest - len(prompt), common)
                    row[:, pads:] = one[0, :, : common - pads]
                setattr(layer, name, rows)
        return cache

    def read(self, trunk: PreTrainedModel, scope: Hashable, ids: Sequence[int], count: int) -> DynamicCache | None:
        """The keys and values of `ids` as those of `count` rows at once, for one call of the net's trunk.

        What is not kept of them is read, and then kept. None where nothing can be kept.
        """
        cache = self._read(trunk, scope, ids)
        if cache is None:
            return None
        for number, layer in enumerate(cache.layers):
            if getattr(layer, "keys", None) is not None:
                cache.layers[number] = _ForMany(layer.keys, layer.values, count)
        return cache

    def _read(self, trunk: PreTrainedModel, scope: Hashable, ids: Sequence[int]) -> DynamicCache | None:
        """A cache of one row with `ids` in it."""
        cache = self.started(scope, [*ids, -1])
        if cache is not None and (behind := cache.get_seq_length()) < len(ids):
            rest = torch.tensor([ids[behind:]], device=self.net.device)
            mask = rest.new_ones(1, len(ids))
            trunk(input_ids=rest, attention_mask=mask, use_cache=True, **{CACHE: cache})
            self.offer(scope, ids, cache)
        return cache

    def _path(self, scope: Hashable, ids: Sequence[int]) -> list[Block]:
        """The blocks with which ids begin."""
        block, path = self.roots.get(scope), []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            block = block and block.children.get(tuple(ids[start : start + BLOCK]))
            if block is None:
                break
            path.append(block)
        return path

    def _touch(self, path: list[Block]) -> None:
        """These have been used; the first ones, which more prompts begin with, count as used last."""
        for block in reversed(path):
            self.order[block] = None
            self.order.move_to_end(block)

    def _values(self, cache: DynamicCache, row: int, start: int, end: int | None) -> torch.Tensor:
        """Keys and values [n, N] of columns of a row, counted from the end."""
        if not self.layout:
            self._lay_out(cache)
        parts = [getattr(cache.layers[number], name)[row, :, start:end] for number, name, _ in self.layout]
        return torch.cat([part.transpose(0, 1).flatten(1).to(self.net.device) for part in parts], 1)

    def _lay_out(self, cache: DynamicCache) -> None:
        kinds = [
            (number, name, getattr(layer, name, None))
            for number, layer in enumerate(cache.layers)
            for name in ("keys", "values")
        ]
        self.layout = [(number, name, kept[0, :, :0].clone()) for number, name, kept in kinds if kept is not None]
        token = sum(empty.shape[0] * empty.shape[2] * empty.element_size() for *_, empty in self.layout)
        self.by_weights = max(LEAST, weight_bytes(self.net) // PART) // token


def _is_cuttable(net: PreTrainedModel) -> bool:
    """Whether a cache of the first tokens of a text is that of a text that goes on otherwise."""
    config = getattr(net, "config", None)
    if config is None or getattr(net, "whole_prompts", False):
        return False
    rope = str(getattr(config.get_text_config(), "rope_parameters", ""))
    if "'dynamic'" in rope or "'longrope'" in rope:
        return False
    try:
        layers = new_cache(config).layers
    except UserError:
        return False
    return bool(layers) and all(type(one) in (DummyLayer, RoomyLayer) for one in layers)
