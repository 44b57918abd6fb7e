"""Matrix products of a model that answers on a CPU: of a few rows they take as long as it takes to read the weights."""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, pad

from common.model.layers import NEW

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SMALLEST_STEP = 2.0**-24  # of float16: numbers of bfloat16 lose half of it, where they are that small, and else nothing
SMALL_PART = 2.0**-16  # of a layer's largest number: what its smallest ones may lose
ENGINES = ("x86", "fbgemm")  # of torch, that have products of float16
FEW, LARGE = 16, 1 << 20  # rows and weights of a product for which oneDNN is faster than MKL


class HalfLinear(torch.nn.Linear):
    """A linear layer over float32 whose weights, which float16 holds, are kept in float16: x @ weight.T + bias.

    The products are float32's, by torch's FBGEMM. `weight` is made anew, float32, where somebody asks for it; it is no
    property, since torch's tracer would ask each module for all of them.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        bias = None if layer.bias is None else layer.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach(), bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Linear:
        """An ordinary layer with the same weights: peft copies one to put an adapter's own weights in it."""
        found = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        found.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            found.bias = copy.deepcopy(self.bias, memo)
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float32 [..., out] of float32 [..., in]"""
        return torch.ops.quantized.linear_dynamic_fp16(input, self.packed)


def quicken(net: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """`net`, which will only answer, with faster products where it computes in float32 on a CPU; else as it is.

    Weights that float16 holds, as those of a checkpoint in bfloat16, are read in half the bytes; other large layers
    multiply few rows by oneDNN. Either way the products differ from torch's own in the order of their sums alone.
    """
    halves = torch.backends.quantized.engine in ENGINES
    for name, module in list(net.named_modules()):
        if not _is_plain(module) or NEW.search(f".{name}."):
            continue
        parent, _, own = name.rpartition(".")
        if halves and not _is_reread(net.get_submodule(parent)) and _fits_half(module.weight):
            setattr(net.get_submodule(parent), own, HalfLinear(module))
        elif module.weight.numel() >= LARGE and torch.backends.mkldnn.is_available():
            module.forward = MethodType(_few_by_onednn, module)
    return net


def weight_bytes(net: torch.nn.Module) -> int:
    """Size of all weights; those of a HalfLinear are not among the parameters."""
    halves = (2 * one.in_features * one.out_features for one in net.modules() if type(one) is HalfLinear)
    return sum(halves) + sum(weight.numel() * weight.element_size() for weight in net.parameters())


def give_back(net: PreTrainedModel | PeftModel) -> None:
    """Make ordinary layers again, in place, of those whose weights an adapter that came later reads at each call."""
    for module in list(net.modules()):
        if _is_reread(module) and type(module.base_layer) is HalfLinear:
            module.base_layer = copy.deepcopy(module.base_layer)


def _is_reread(parent: torch.nn.Module) -> bool:
    """Whether its base layer's weights are read at each call, as DoRA's norms are of them: making them anew is slow."""
    return bool(getattr(parent, "lora_magnitude_vector", None))


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer, nothing more, in float32 on a CPU."""
    if type(module) is not torch.nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _fits_half(weight: torch.Tensor) -> bool:
    """Whether float16 holds these numbers as bfloat16 holds them; no layer of small numbers alone, which lose more."""
    low, high = weight.detach().aminmax()
    bound = min(SMALLEST_STEP / 2, SMALL_PART * max(-float(low), float(high)))
    halves = (part.half().float().sub_(part).abs_().max() for part in weight.detach().split(512))
    return all(bool(most <= bound) for most in halves)


def _few_by_onednn(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer: a few rows by oneDNN, in numbers of rows for which it makes few programs."""
    if torch.jit.is_tracing():  # as many rows as there will be: the slots of a service
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
    flat = x.reshape(-1, x.shape[-1])
    if not 0 < len(flat) <= FEW:
        return linear(x, self.weight, self.bias)
    missing = (1 << (len(flat) - 1).bit_length()) - len(flat)
    padded = pad(flat, (0, 0, 0, missing)) if missing else flat
    found = torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")
    return found[: len(flat)].view(*x.shape[:-1], -1)
