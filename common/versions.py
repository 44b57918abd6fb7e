"""What differs between the versions of transformers that requirements.txt allows.

A name is chosen by what a signature takes, not by a version number. tests/test_versions.py tries each, and says which
private interface of a library has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from transformers import cache_utils, modeling_utils
from transformers.generation import GenerationMixin, LogitsProcessor, RepetitionPenaltyLogitsProcessor


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


class _TextPenalty(RepetitionPenaltyLogitsProcessor):
    def __init__(self, penalty: float, mask: torch.Tensor) -> None:
        super().__init__(penalty)
        self.mask = mask.bool()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = self.mask.repeat_interleave(len(input_ids) // len(self.mask), 0)  # beams
        prompts, answers = input_ids.tensor_split([mask.shape[1]], 1)
        return super().__call__(torch.cat([prompts.where(mask, prompts[:, -1:]), answers], 1), scores)


def repetition_penalty(penalty: float, mask: torch.Tensor) -> list[LogitsProcessor]:
    """What `generate` takes for a penalty on the ids of prompts and answers: none for 1.

    mask [B, S]: of the prompts, padded on the left. transformers' own counts the pads too, below 5.23: it lowered the
    stop id where pads are that id, and a row's answer went on for it.
    """
    return [] if penalty == 1 else [_TextPenalty(penalty, mask)]
