"""A model's weights as llama.cpp's tensors: of which of the model's values each is made, and how.

Each step can be taken back, so that what was read from a file can be put into the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import gguf
import numpy as np
import torch

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.conversation.family import Gguf

ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
FUSED = "experts.gate_up_proj"  # two tensors of the file: the upper half of each expert's rows, and the lower
SUFFIXES = (".weight", ".bias")


class Part(NamedTuple):
    """A tensor of the file: the values of the model it is made of, and what is added to them."""

    of: torch.Tensor  # the model's own memory
    shift: float = 0.0

    def make(self) -> np.ndarray:
        """The values for the file, in fp32."""
        return self.of.float().cpu().numpy() + np.float32(self.shift)

    def put_back(self, read: np.ndarray) -> None:
        """Put what was read from a file in place of the model's values."""
        self.of.copy_(torch.from_numpy(read - np.float32(self.shift)))


def parts(whole: PreTrainedModel, kind: Gguf) -> Iterator[tuple[str, Part]]:
    """(llama.cpp's name, Part) of each tensor; a head tied to the embeddings is written where it has to be."""
    names = gguf.get_tensor_name_map(ARCHS[kind.arch], whole.config.num_hidden_layers)
    left_out = whole.get_output_embeddings() if whole.config.tie_word_embeddings and not kind.own_head else None
    for name, tensor in whole.state_dict().items():
        if whole.get_submodule(name.rpartition(".")[0]) is left_out:
            continue
        for part_name, part in _split(name, tensor):
            label = label_of(part_name, names, kind)
            yield label, Part(part, kind.norm if label.endswith("norm.weight") else 0.0)


def label_of(name: str, names: gguf.TensorNameMap, kind: Gguf) -> str:
    """What llama.cpp calls the model's tensor `name`; UserError where it has none such."""
    label = names.get_name(name, try_suffixes=SUFFIXES)
    if label is None:
        raise UserError(f"--format gguf: llama.cpp 没有 llama.cpp has no tensor {name} in {kind.arch}")
    return label if label.endswith(SUFFIXES) else f"{label}.weight"


def _split(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, view) of what is one tensor in the model and several in a file."""
    if not name.endswith(FUSED):
        yield name, tensor
        return
    for half, view in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
        yield name.replace("gate_up_proj", half), view
