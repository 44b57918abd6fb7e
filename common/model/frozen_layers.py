"""Matrix products and gated layers of a model in training: the same values in less time on a CPU, and less memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from common import distributed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # transformers' names of a gated layer's parts
ROWS = 512  # of a gated layer at once on a CPU: what lies between its products stays in the processor's cache

# what a module holds of its own while its forward is replaced: accelerate keeps the forward it has wrapped for autocast
HELD = ("forward", "_original_forward", "accepts_loss_kwargs")


@contextlib.contextmanager
def replaced(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within, each module's forward is the function given for it, `self` first; afterwards it is what it was before.

    A wrapper that accelerate has put around the function meanwhile goes with it.
    """
    before = {module: {name: vars(module)[name] for name in HELD if name in vars(module)} for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = MethodType(forward, module)
        yield
    finally:
        for module, held in before.items():
            for name in HELD:
                vars(module).pop(name, None)
            vars(module).update(held)


@contextlib.contextmanager
def lean(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within, `model`, which is trained, keeps less of its gated layers, and computes its frozen products faster.

    Gated layers: only gate and up are kept, act(gate) * up is computed again in the backward pass: a third less memory
    for one cheap product. Frozen layers, where this process holds the whole of them: see `times_transposed`.
    """
    head = model.get_output_embeddings()
    forwards: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
    for module in model.modules():
        if all(hasattr(module, name) for name in GATED):
            frozen = all(is_frozen(getattr(module, name)) for name in GATED[:3])
            forwards[module] = _frozen_gated if frozen else _gated
        if module is not head and is_frozen(module) and module.weight.device.type == "cpu":
            forwards[module] = _frozen
    with replaced(forwards):
        yield


def is_frozen(module: torch.nn.Module) -> bool:
    """Whether it is a plain linear layer without a bias, held whole by this process, that is not trained."""
    plain = type(module) is torch.nn.Linear and module.bias is None and not distributed.shards_weights()
    return plain and not module.weight.requires_grad


def times_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, [..., out] of x [..., in] and weight [out, in].

    In fp32 on a CPU through oneDNN, as torch does itself in bf16: on an AMD EPYC with AVX-512 it took a fifth to a
    quarter less time than MKL's sgemm, two fifths less at 128 rows or fewer (torch 2.13). With AVX2 alone both take as
    long, but oneDNN a third longer for a weight that lies transposed: those of backward passes go to MKL there, and a
    step takes 4 to 8 % less. No gradient is recorded.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and (weight.is_contiguous() or has_avx512())
        and not torch.is_autocast_enabled("cpu")
    ):
        flat = x.reshape(-1, x.shape[-1])
        found = torch.ops.mkldnn._linear_pointwise(with_pads(flat), weight, None, "none", [], "")
        return found[: len(flat)].view(*x.shape[:-1], len(weight))
    return x @ weight.T


@cache
def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def with_pads(flat: torch.Tensor) -> torch.Tensor:
    """flat [rows, …] with rows of zeros below, on a CPU, so that few numbers of rows occur, a few per cent more.

    Up to 16 it is a power of two. oneDNN makes a program for every number of rows it meets, of about 0.3 MB, and keeps
    it to the end of the process.
    """
    rows = len(flat)
    step = max(16, 1 << max(rows.bit_length() - 6, 0)) if rows > 8 else 1 << max(rows - 1, 0).bit_length()
    missing = -rows % step if flat.device.type == "cpu" else 0
    return pad(flat, (0, 0) * (flat.ndim - 1) + (0, missing)) if missing else flat


def _gated(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a gated layer."""

    def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up

    kept = (self.gate_proj(x), self.up_proj(x))
    if not torch.is_grad_enabled():  # a validation loss: nothing is kept anyway
        return self.down_proj(gate(*kept))
    return self.down_proj(checkpoint(gate, *kept, use_reentrant=False, preserve_rng_state=False))


def _frozen_gated(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a gated layer that is not trained."""
    if not torch.is_grad_enabled() and x.shape[:-1].numel() <= ROWS:  # a step of an answer
        return self.down_proj(self.act_fn(self.gate_proj(x)).mul_(self.up_proj(x)))
    return _FrozenGated.apply(x, *(getattr(self, name).weight for name in GATED[:3]), self.act_fn)


def _frozen(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer that is not trained and has no bias."""
    if not torch.is_grad_enabled():
        return times_transposed(x, self.weight)
    return _FrozenLinear.apply(x, self.weight)


class _FrozenLinear(torch.autograd.Function):
    """x @ weight.T, the weight without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.autocast = autocast_in_force(x)
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with ctx.autocast():
            return times_transposed(gradient, ctx.saved_tensors[0].T), None


class _FrozenGated(torch.autograd.Function):
    """(act(x @ gate.T) * (x @ up.T)) @ down.T, the weights without gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
        act: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        outputs = []
        flat = with_pads(x.reshape(-1, x.shape[-1]))
        for part in _parts(flat):
            gate, up = times_transposed(part, gate_weight), times_transposed(part, up_weight)
            outputs.append(times_transposed(act(gate).mul_(up), down_weight))
            kept += [gate, up]
        ctx.save_for_backward(gate_weight, up_weight, down_weight, *kept)
        ctx.act = act
        ctx.autocast = autocast_in_force(x)
        return torch.cat(outputs)[: x.shape[:-1].numel()].view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        gate_weight, up_weight, down_weight, *kept = ctx.saved_tensors
        inputs, flat = [], with_pads(gradient.reshape(-1, gradient.shape[-1]))
        for part, gate, up in zip(_parts(flat), kept[::2], kept[1::2], strict=True):
            with ctx.autocast(), torch.enable_grad():
                gate = gate.detach().requires_grad_()
                opened = ctx.act(gate)
            with ctx.autocast():
                product = times_transposed(part, down_weight.T)  # the gradient of act(gate) * up
                up_gradient = product * opened.detach()
                (gate_gradient,) = torch.autograd.grad(opened, gate, product.mul_(up))
                found = times_transposed(gate_gradient, gate_weight.T)
                inputs.append(found.add_(times_transposed(up_gradient, up_weight.T)))
        return torch.cat(inputs)[: gradient.shape[:-1].numel()].view(gradient.shape), None, None, None, None


def _parts(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """flat [rows, in] as parts of at most ROWS rows, all of it where it is not on a CPU."""
    return flat.split(ROWS if flat.device.type == "cpu" else max(1, len(flat)))


def autocast_in_force(x: torch.Tensor) -> Callable[[], torch.autocast]:
    """Makes an autocast context with the settings that are in force now, for the device of `x`.

    The backward pass needs it: it runs outside of the autocast context of the forward pass.
    """
    kind = x.device.type
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
