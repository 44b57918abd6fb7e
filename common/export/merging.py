"""A run's adapter added to the weights of its base."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from common.export.proof import say
from common.model.layers import causal_of
from common.peft_names import BaseTunerLayer, ModulesToSaveWrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.export.proof import Tuned


def merge(tuned: Tuned) -> PreTrainedModel:
    """The base model with the adapter added to its weights, in fp32; a run without adapter is merged as it is.

    A head tied to the embeddings is untied first where the adapter changes one or the other: merged into the matrix
    they share, the change of one would change both.
    """
    if not tuned.rank:
        return tuned.net
    say("合并 merging: 适配器并入基座 the adapter into the base")
    untie(causal_of(tuned.net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied heads, followed above
        return tuned.net.merge_and_unload(safe_merge=True)


def unties(causal: PreTrainedModel) -> bool:
    """Whether an adapter sits on a tied head or on the embeddings it is tied to."""
    ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    changed = any(isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends)
    return causal.config.tie_word_embeddings and changed


def untie(causal: PreTrainedModel) -> None:
    """Give the head a matrix of its own where the merged model will need one."""
    if unties(causal):
        head = causal.get_output_embeddings()
        head = getattr(head, "original_module", head)
        head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        causal.config.tie_word_embeddings = False
