"""Matrix products and gated layers of a model in training: the same values in less time on a CPU, and less memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from common import distributed
from common.device import hand_back

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # transformers' names of a gated layer's parts
ROWS = 512  # of a gated layer at once on a CPU: what lies between its products stays in the processor's cache

# what a module holds of its own while its forward is replaced: accelerate keeps the forward it has wrapped for autocast
HELD = ("forward", "_original_forward", "accepts_loss_kwargs")
HALVES = (torch.bfloat16, torch.float16)  # in which frozen fp32 weights may lie, where no number changes by it
LEAST = 1 << 16  # numbers of a weight that is worth it; a model's code may read small ones, of a few, by itself
_memory: dict[str, torch.Tensor] = {}  # of `fitting`: to take new memory each time would be slower than to convert


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
    for one cheap product. Frozen layers, where this process holds the whole of them: see `times_transposed`; under an
    adapter on a CPU their fp32 weights lie in 16 bits where these hold the same numbers, as of a checkpoint in bf16.
    """
    head = model.get_output_embeddings()
    forwards: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
    for module in model.modules():
        if _is_gated(module):
            frozen = all(is_frozen(getattr(module, name)) for name in GATED[:3])
            forwards[module] = _frozen_gated if frozen else _gated
        if module is not head and is_frozen(module) and module.weight.device.type == "cpu":
            forwards[module] = _frozen
    lookups = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    able = {*forwards, *lookups, *([head] if is_frozen(head) else [])}
    halves = _halves(model, able) if hasattr(model, "peft_config") else {}
    forwards |= {module: _lookup for module in lookups if module.weight in halves}
    model.halves = halves  # for `widened`
    try:
        with replaced(forwards), _stored(halves):
            yield
    finally:
        del model.halves
        _memory.clear()


@contextlib.contextmanager
def widened(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within, what `lean` keeps in 16 bits is fp32: to answer, all of it is read for each id."""
    with _stored(dict.fromkeys(vars(model).get("halves", ()), torch.float32)):
        yield


@contextlib.contextmanager
def _stored(dtypes: Mapping[torch.nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Within, each weight lies in memory in the dtype given for it; afterwards in its own again."""
    before = {weight: weight.dtype for weight in dtypes}
    try:
        hand_back()  # what steps have freed lies in parts too small for these
        for weight, dtype in dtypes.items():
            weight.data = weight.data.to(dtype)
        yield
    finally:
        hand_back()
        for weight, dtype in before.items():
            weight.data = weight.data.to(dtype)


def _halves(model: PeftModel, able: Collection[torch.nn.Module]) -> dict[torch.nn.Parameter, torch.dtype]:
    """{large frozen fp32 weight: dtype of 16 bits that holds its numbers}, of those on a CPU that `able` alone read.

    Those whose norms DoRA reads at each call stay as they are.
    """
    if distributed.shards_weights():
        return {}
    users: dict[torch.nn.Parameter, list[torch.nn.Module]] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(weight, []).append(module)
    reread = {module.base_layer for module in model.modules() if getattr(module, "lora_magnitude_vector", None)}
    found: dict[torch.nn.Parameter, torch.dtype | None] = {}
    for weight, modules in users.items():
        plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
        if plain and weight.numel() >= LEAST and all(module in able and module not in reread for module in modules):
            found[weight] = next((dtype for dtype in HALVES if _holds(dtype, weight)), None)
    return {weight: dtype for weight, dtype in found.items() if dtype}


def _holds(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    return all(torch.equal(part.to(dtype).float(), part) for part in weight.detach().split(ROWS))


def _is_gated(module: torch.nn.Module) -> bool:
    """Whether its forward is down(act(gate) * up) and no more: some models have such parts, and drop small gates."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and set(code.co_names) == set(GATED)


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


def fitting(weight: torch.Tensor, x: torch.Tensor, place: str = "") -> torch.Tensor:
    """`weight`; fp32 where it lies in 16 bits under `x` in fp32 on a CPU: in memory the next one at this place gets."""
    wide = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not wide or weight.dtype not in HALVES:
        return weight
    if place not in _memory or _memory[place].numel() < weight.numel():
        _memory[place] = torch.empty(weight.numel())
    return _memory[place][: weight.numel()].view(weight.shape).copy_(weight)


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
        return times_transposed(x, fitting(self.weight, x))
    return _FrozenLinear.apply(x, self.weight)


def _lookup(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """The forward of an embedding in 16 bits: its own, over an fp32 table of the rows that are wanted."""
    wanted, places = torch.unique(ids, return_inverse=True)
    whole, padding = self.weight, self.padding_idx
    self.weight, self.padding_idx = torch.nn.Parameter(whole[wanted].float(), False), None
    try:
        return type(self).forward(self, places)
    finally:
        self.weight, self.padding_idx = whole, padding


class _FrozenLinear(torch.autograd.Function):
    """x @ weight.T, the weight without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.autocast = autocast_in_force(x)
        return times_transposed(x, fitting(weight, x)).data  # no view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with ctx.autocast():
            return times_transposed(gradient, fitting(ctx.saved_tensors[0], gradient).T), None


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
        weights = zip((gate_weight, up_weight, down_weight), GATED, strict=False)
        wide_gate, wide_up, wide_down = (fitting(weight, x, place) for weight, place in weights)
        for part in _parts(flat):
            gate, up = times_transposed(part, wide_gate), times_transposed(part, wide_up)
            outputs.append(times_transposed(act(gate).mul_(up), wide_down))
            kept += [gate, up]
        ctx.save_for_backward(gate_weight, up_weight, down_weight, *kept)
        ctx.act = act
        ctx.autocast = autocast_in_force(x)
        return torch.cat(outputs)[: x.shape[:-1].numel()].view(x.shape).data  # no view, as above

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        saved = ctx.saved_tensors  # asked for once: checkpointing makes them anew, and refuses a second time
        weights, kept = zip(saved[:3], GATED, strict=False), saved[3:]
        with ctx.autocast():
            gate_weight, up_weight, down_weight = (fitting(weight, gradient, place) for weight, place in weights)
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
