"""A model's weights as llama.cpp's tensors: of which of the model's values each is made, and how.

Each step can be taken back, so that what was read from a file can be put into the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import torch

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.conversation.family import Gguf

ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
FUSED = "experts.gate_up_proj"  # two tensors of the file: the upper half of each expert's rows, and the lower
SUFFIXES = (".weight", ".bias", ".scale")
RENAMED = {  # ends of the model's names that llama.cpp has as a part of another tensor's
    ".dt_bias": ".dt_proj.bias",
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
}
UNTURNED = 1e30  # divides the angle of what does not turn
# of linear attention: the model's name of a tensor, llama.cpp's of others
CONVOLUTION = "conv1d.weight"
GATED_NORM, DECAY = "ssm_norm.weight", "ssm_a"
OF_A_HEAD = ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt")  # one slice a value head; of the others one a value
HEADS = dict.fromkeys(("attn_qkv", "attn_gate", "ssm_conv1d", *OF_A_HEAD), 0) | {"ssm_out": 1}


class Part(NamedTuple):
    """A tensor of the file: the values of the model it is made of, and how."""

    of: torch.Tensor  # the model's own memory
    shift: float = 0.0  # added to the values
    decays: bool = False  # they are logarithms, and written as -exp(value)
    order: torch.Tensor | None = None  # the model's slices along the axis in the file's order
    axis: int = 0

    def make(self) -> np.ndarray:
        """The values for the file, in fp32."""
        values = self.of.float().cpu()
        values = values if self.order is None else values.index_select(self.axis, self.order)
        values = -values.exp() if self.decays else values
        return values.numpy() + np.float32(self.shift)

    def put_back(self, read: np.ndarray) -> None:
        """Put what was read from a file in place of the model's values."""
        values = torch.from_numpy(read - np.float32(self.shift))
        values = (-values).log() if self.decays else values
        self.of.copy_(values if self.order is None else values.index_select(self.axis, self.order.argsort()))


def parts(whole: PreTrainedModel, kind: Gguf) -> Iterator[tuple[str, Part]]:
    """(llama.cpp's name, Part) of each tensor; a head tied to the embeddings is written where it has to be."""
    names = gguf.get_tensor_name_map(ARCHS[kind.arch], whole.config.num_hidden_layers)
    left_out = whole.get_output_embeddings() if whole.config.tie_word_embeddings and not kind.own_head else None
    for name, tensor in whole.state_dict().items():
        if whole.get_submodule(name.rpartition(".")[0]) is left_out:
            continue
        for part_name, part in _split(name, tensor, kind):
            label = label_of(part_name, names, kind)
            shift = kind.norm if label.endswith("norm.weight") and not label.endswith(GATED_NORM) else 0.0
            axis = axis_of_heads(whole.config, label)
            order = None if axis is None else order_of_heads(whole.config, label, part.shape[axis])
            yield label, Part(part, shift, label.endswith(DECAY), order, axis or 0)
    if kind.mixed:
        yield "rope_freqs.weight", Part(_rope_freqs(whole.config.to_dict()))


def label_of(name: str, names: gguf.TensorNameMap, kind: Gguf) -> str:
    """What llama.cpp calls the model's tensor `name`; UserError where it has none such."""
    known = next((name.removesuffix(end) + new for end, new in RENAMED.items() if name.endswith(end)), name)
    label = names.get_name(known, try_suffixes=SUFFIXES)
    if label is None:
        raise UserError(f"--format gguf: llama.cpp 没有 llama.cpp has no tensor {name} in {kind.arch}")
    return label if label.endswith((*SUFFIXES, DECAY)) else f"{label}.weight"


def axis_of_heads(config: PreTrainedConfig, label: str) -> int | None:
    """Along which axis a tensor has the value heads of linear attention; None where it has none."""
    return HEADS.get(_kind(label)) if getattr(config, "linear_num_value_heads", 0) else None


def order_of_heads(config: PreTrainedConfig, label: str, size: int) -> torch.Tensor:
    """The model's `size` slices along that axis in the file's order.

    A model has the value heads of one key head beside each other, llama.cpp the first ones of all key heads, then the
    second ones. What belongs to no value head comes first, and stays.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    width = 1 if _kind(label) in OF_A_HEAD else config.linear_value_head_dim
    others = size - values * width
    heads = torch.arange(others, size).view(keys, values // keys, width).transpose(0, 1)
    return torch.cat([torch.arange(others), heads.flatten()])


def _rope_freqs(config: dict[str, Any]) -> torch.Tensor:
    """What the angles of layers that see the whole text are divided by, a number for each pair of a head's values."""
    pairs = head_sizes(config)[0] // 2
    turned = int(pairs * config["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1))
    return torch.tensor([1.0] * turned + [UNTURNED] * (pairs - turned))


def head_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Values of a head in layers that see the whole text, and in the others."""
    every = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return of_layers(config, "head_dim", every)[-1], every


def of_layers(config: dict[str, Any], name: str, every: int) -> list[int]:
    """A size for each layer, which is `every` where a layer has none of its own."""
    own = config.get("per_layer_config") or {}
    return [own.get(str(layer), {}).get(name, every) for layer in range(config["num_hidden_layers"])]


def _kind(label: str) -> str:
    """What a tensor of a layer is: attn_qkv of blk.3.attn_qkv.weight."""
    return "".join(label.split(".")[2:3])


def _split(name: str, tensor: torch.Tensor, kind: Gguf) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, view) of what is one tensor in the model and several, or of fewer dimensions, in a file."""
    if kind.mixed or not name.endswith(FUSED):
        yield name, tensor.squeeze(1) if name.endswith(CONVOLUTION) else tensor
        return
    for half, view in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
        yield name.replace("gate_up_proj", half), view
