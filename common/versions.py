"""What differs between the versions of transformers that requirements.txt allows.

A name is chosen by what a signature takes, not by a version number. tests/test_versions.py tries each, and says which
private interface of a library has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from transformers import cache_utils, modeling_utils
from transformers.generation import GenerationMixin

if TYPE_CHECKING:
    import torch


def name_taken(function: Callable[..., Any], new: str, old: str) -> str:
    """The name under which a function or class takes an argument: `new` where its signature has it, else `old`."""
    return new if new in signature(function).parameters else old


# A model's argument, and its output's field, for cached keys and values: renamed in transformers 5.24.
CACHE = name_taken(GenerationMixin.prepare_inputs_for_generation, "cache", "past_key_values")


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


# (hidden [B, S, D], how many last positions or the indices of some; 0: all) -> [B, kept, D]; there from 5.21.
slice_logits_to_keep = getattr(modeling_utils, "slice_logits_to_keep", _kept)

# What a cache has for a layer that uses another one's keys and values; 5.20 has no such layer.
DummyLayer = getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer)
