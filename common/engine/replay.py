"""A model's step recorded as torch's operations and replayed without the model's Python: half a small model's time.

The values are those of the model: other rows and columns than the recorded ones are tried first, and where anything
differs, or cannot be recorded, the model itself goes on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common.engine.kv_batch import KVBatch
from common.inference.cache import RoomyLayer
from common.model.complete import report_hidden

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

RECORDED, TRIED = (3, 6), ((1, 9), (4, 40))  # rows, columns
LONGEST = 1 << 14  # columns of a sliding window that is tried
NEAR = 1e-4  # of the largest logit
log = logging.getLogger(__name__)


class _Written(RoomyLayer):
    """A layer whose last column is written in place: `width` columns of its keys and values count."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values, self.width = keys, values, width
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.narrow(2, self.width - 1, 1).copy_(new)
        return self.keys.narrow(2, 0, self.width), self.values.narrow(2, 0, self.width)

    def get_seq_length(self) -> int:
        return self.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0


class _Step(torch.nn.Module):
    """The forward of one more id in each row, as a function of tensors alone."""

    def __init__(self, batch: KVBatch) -> None:
        super().__init__()
        self.net = batch.net
        self.forward_of = batch.forward_over

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *kept: torch.Tensor
    ) -> torch.Tensor:
        width = mask.shape[1]
        layers = [_Written(*pair, width) for pair in zip(kept[::2], kept[1::2], strict=True)]
        return self.forward_of(ids, mask, positions, layers)


class Replay:
    """A recorded step: (ids [B, 1], mask [B, K], positions, cache of K - 1 columns) -> logits [B, V], and K columns."""

    def __init__(self, graph: Callable[..., torch.Tensor]) -> None:
        self.graph = graph

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        kept = [tensor for layer in cache.layers for tensor in layer.with_room()]
        logits = self.graph(ids, mask, positions, *kept)
        for layer in cache.layers:
            layer.grow()
        return logits


def record(net: PreTrainedModel) -> Replay | None:
    """The Replay of `net` with the adapter that is in force; None where its steps cannot be replayed.

    They can on a CPU, of a model whose layers keep keys and values, and do the same whatever the values are: one whose
    experts are chosen, or whose positions are scaled anew with the length, does not.
    """
    scaled = any(word in str(getattr(net.config, "rope_parameters", "")) for word in ("dynamic", "longrope"))
    if net.device.type != "cpu" or scaled or any("experts" in name.split(".") for name, _ in net.named_modules()):
        return None
    try:
        batch = _batch(net, *RECORDED)
        if not all(type(layer) is RoomyLayer for layer in batch.cache.layers):
            return None
        replay = Replay(_recorded(batch))
        window = getattr(net.config, "sliding_window", None) or LONGEST
        tried = (*TRIED, (2, window + 9)) if window < LONGEST else TRIED
        found = replay if all(_same(net, replay, *shape) for shape in tried) else None
    except Exception as error:  # of the tracer, or of a model that needs more than tensors
        log.info("不录制步骤 steps are not recorded, the model makes each: %s", type(error).__name__)
        return None
    return found


def _recorded(batch: KVBatch) -> Callable[..., torch.Tensor]:
    """The graph of the next step of a batch."""
    kept = [tensor for layer in batch.cache.layers for tensor in layer.with_room()]
    with report_hidden(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what becomes a constant, which is tried; of trace's being frozen
        given = (*batch.next_column([1] * len(batch.ids)), *kept)
        return torch.jit.trace(_Step(batch).eval(), given, check_trace=False)


def _batch(net: PreTrainedModel, rows: int, columns: int) -> KVBatch:
    """A batch whose prompts, of one length less in each row, have been read; their keys come again up to `columns`."""
    prompts = [[*range(1, 7 - number % 3)] for number in range(rows)]
    batch = KVBatch(net, [], prompts, 0)
    batch.prefill(len(prompts[0]))
    times = -(-columns // batch.mask.shape[1])
    batch.mask = batch.mask.repeat(1, times)[:, -columns:]
    batch.mask[:, -1] = 1
    batch.positions = batch.positions + columns - len(prompts[0])
    for layer in batch.cache.layers:
        layer.keys, layer.values = (t.repeat(1, 1, times, 1)[:, :, -columns:] for t in (layer.keys, layer.values))
    return batch


def _same(net: PreTrainedModel, replay: Replay, rows: int, columns: int) -> bool:
    """Whether two steps of such a batch are the same by the model and replayed."""
    ours, theirs = _batch(net, rows, columns), _batch(net, rows, columns)
    for first in (2, 5):
        ids = [first + number for number in range(rows)]
        found, expected = ours.step(ids, replay), theirs.step(ids)
        if not bool((found - expected).abs().max() <= NEAR * expected.abs().max()):
            return False
    return True
