"""Rows of embedding and head that an adapter trains, without a copy of the whole matrix at each call.

peft (0.21) puts them into a new matrix in every forward pass: of 0.6 GB for a vocabulary of 262,144, for each token
that is generated and each chunk of logits, with a gradient as large. Here they are multiplied beside the old matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from common.peft_names import TrainableTokensLayer, TrainableTokensWrapper


class Rows(NamedTuple):
    """Rows that stand in for some of a matrix: ids [K] of the vocabulary, values [K, H]."""

    ids: torch.Tensor
    values: torch.Tensor


def mend(net: torch.nn.Module) -> None:
    """Let peft's layers with trained rows in `net` compute the same without copying their matrix.

    And let adapters that have no rows be loaded beside them, for which peft raises KeyError.
    """
    for module in net.modules():
        if isinstance(module, TrainableTokensLayer):
            vars(module)["forward_adapters"] = MethodType(_forward, module)
        elif isinstance(module, TrainableTokensWrapper):
            for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
                vars(module)[name] = MethodType(_of_those_with_rows(name), module)


def _of_those_with_rows(method: str) -> Callable[..., dict[str, Any]]:
    def called(self: TrainableTokensWrapper, adapter: str, *args: Any) -> dict[str, Any]:
        has_rows = adapter in self.token_adapter.trainable_tokens_delta
        return getattr(TrainableTokensWrapper, method)(self, adapter, *args) if has_rows else {}

    return called


def matrix_of(head: torch.nn.Module) -> torch.nn.Module:
    """The layer itself: what is in peft's wrapper, or `head` where it has none."""
    return head.token_adapter.base_layer if isinstance(head, TrainableTokensWrapper) else head


def rows_of(head: torch.nn.Module) -> Rows | None:
    """The Rows that now stand in for those of `matrix_of(head)`, or None."""
    if not isinstance(head, TrainableTokensWrapper):
        return None
    layer = head.token_adapter
    return None if layer.disable_adapters or layer.merged else _rows(layer, layer.active_adapters)


def _rows(layer: TrainableTokensLayer, names: Sequence[str]) -> Rows | None:
    names = [name for name in names if name in layer.trainable_tokens_delta]  # an adapter may have none
    if not names:
        return None
    ids = [id_ for name in names for id_ in layer.token_indices[name]]
    values = [layer.trainable_tokens_delta[name] for name in names]
    return Rows(torch.tensor(ids, device=values[0].device), values[0] if len(values) == 1 else torch.cat(values))


def _forward(self: TrainableTokensLayer, x: torch.Tensor, active_adapters: Sequence[str], *args: Any) -> torch.Tensor:
    """The forward of an embedding, ids [...], or of a head, hidden [..., H]."""
    if self.disable_adapters or self.merged:
        return TrainableTokensLayer.forward_adapters(self, x, active_adapters, *args)
    result, found = self.base_layer(x), _rows(self, active_adapters)
    if found is None:
        return result
    if isinstance(self.base_layer, torch.nn.Embedding):
        values = found.values.to(result.dtype)
        here = x[..., None] == found.ids
        looked_up, scale = functional.embedding(here.int().argmax(-1), values), self._get_embed_scale()
        if scale is not None:
            looked_up = looked_up * scale.to(looked_up.dtype)
        return torch.where(here.any(-1, keepdim=True), looked_up, result)
    bias = self.base_layer.bias
    own = functional.linear(x, found.values.to(x.dtype), None if bias is None else bias[found.ids])
    return result.index_copy(-1, found.ids, own.to(result.dtype))
