"""Bytes that a training step will take, that it took, and that are free: tried on small batches, not computed."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import psutil
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from common import distributed
from common.data.dataset import lengths_of
from common.device import device, hand_back, resolve_dtype
from common.knobs import OPTIMIZERS
from common.model.loading import pad_id_of
from common.model.loss import logits_alive
from common.training.batches import LengthGroupedSampler, collate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.data.dataset import TrainingData

MIB = 1 << 20
CGROUP = Path("/sys/fs/cgroup")
HEAP = 1.6  # on a CPU the C library holds on to about so much of what a step uses (measured with glibc)
PROBE = 512  # ids of the longest row on which memory is tried
SPARE = 0.9  # of the free memory may be planned with: allocators need some room


@dataclass(frozen=True)
class Estimate:
    """Bytes a step needs beside the loaded model, and what recomputing activations would save of them."""

    states: int  # gradients and what the optimizer keeps
    activations: int  # of the heaviest micro batch, all kept for the backward pass
    recomputed: int  # the same with gradient checkpointing
    logits: int  # of the loss at one time

    def total(self, checkpointing: bool) -> int:
        """Bytes of a step with or without gradient checkpointing."""
        return self.states + self.logits + (self.recomputed if checkpointing else self.activations)


def estimate(
    net: PreTrainedModel | PeftModel,
    small: Mapping[str, torch.Tensor],
    larger: Mapping[str, torch.Tensor],
    rows: int,
    length: int,
    moments: int = 8,
) -> Estimate:
    """The Estimate of a step on a micro batch of `rows` × `length` ids.

    small, larger: batches {input_ids, labels [B, T]} of different lengths, tried here: what they keep
    for the backward pass is fitted by B × (a T + b T²); b is attention's where it is not fused. The net must be in
    training mode, not yet checkpointing, its loss the chunked one. Random numbers are left as they were. moments: bytes
    the optimizer keeps of each trained weight; 8 are AdamW's two.
    """
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    tried = [(batch["input_ids"].shape, *kept_by(net, batch)) for batch in (small, larger)]
    gc.collect()
    hand_back()
    activations = fitted([(shape, kept) for shape, kept, _ in tried], rows, length)
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in net.modules())
    inputs = fitted([(shape, entering) for shape, _, entering in tried], rows, length)
    recomputed = inputs + activations // layers if layers else activations
    workspace = activations // max(layers, 1)  # gradients of the layer under way
    logits = 3 * 4 * logits_alive(net, device().type)
    return Estimate((4 + moments) * trainable, activations + workspace, recomputed + workspace, logits)


def kept_by(net: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """(bytes kept for the backward pass, bytes that enter the layers), parameters left out, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}
    entering: list[int] = []

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    def enters(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        entering.append(sum(a.nbytes for a in arguments[:1] if isinstance(a, torch.Tensor)))

    hooks = [m.register_forward_pre_hook(enters) for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    on_gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    batch = {name: tensor.to(device()) for name, tensor in batch.items()}
    try:
        with (
            torch.random.fork_rng(devices=on_gpu),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing),
        ):
            net(**batch)  # no backward pass follows; `pack` gives None, so that the graph keeps no tensor alive
    finally:
        for hook in hooks:
            hook.remove()
    return sum(storage.nbytes() for storage in kept.values()), sum(entering)


def fitted(tried: Sequence[tuple[Sequence[int], int]], rows: int, length: int) -> int:
    """Bytes of a batch of `rows` × `length` from [((B, T), bytes)] of two batches."""
    ((b1, t1), kept1), ((b2, t2), kept2) = tried
    first, second = kept1 / (b1 * t1), kept2 / (b2 * t2)
    square = max(0.0, (second - first) / (t2 - t1)) if t2 != t1 else 0.0
    linear = max(second - square * t2, 0.0)
    heap = HEAP if device().type == "cpu" else 1.0
    return int(heap * rows * length * (linear + square * length))


def free() -> int:
    """Bytes this process may still take on its device; on a CPU what is available, the container's limit respected."""
    where = device()
    if where.type == "cuda":
        unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return torch.cuda.mem_get_info(where)[0] + unused
    if where.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = psutil.virtual_memory().available
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        available = min(available, limit - used)
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cgroup(name: str) -> int | None:
    try:
        return int((CGROUP / name).read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


class Peak:
    """with Peak() as memory: …; then `memory.before` and `memory.peak` are bytes in use before and at most within."""

    def __init__(self) -> None:
        self.before = 0
        self.peak = 0

    def __enter__(self) -> Peak:
        if device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        gc.collect()
        hand_back()  # what earlier steps freed would be taken again unseen
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *exception: object) -> None:
        if device().type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            self.peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
        else:
            import resource  # not on Windows

            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, of the whole process


def used() -> int:
    """Bytes this process uses now: on its CUDA card, or of the machine."""
    return torch.cuda.memory_allocated() if device().type == "cuda" else psutil.Process().memory_info().rss


def shown(count: float) -> str:
    """Bytes as text, in MiB."""
    return f"{count / MIB:,.0f} MiB"


def estimate_memory(
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    heaviest: tuple[int, int],
    moments: int = 8,
) -> Estimate:
    """Estimate of a step on `heaviest` (rows, length), tried on two pairs of shorter rows of `rows.train`.

    moments: bytes the optimizer keeps of each trained weight.
    """
    lengths = lengths_of(rows.train)
    order = numpy.argsort(lengths, kind="stable")
    short = order[lengths[order] <= PROBE].tolist() or order[:1].tolist()
    pairs = [[short[0], short[len(short) // 4]], [short[0], short[-1]]]
    tried = [collate([rows.train[number] for number in pair], pad_id_of(tokenizer, 0)) for pair in pairs]
    for batch in tried:
        del batch["where"], batch["tokens"]
    small, larger = tried
    return estimate(net, small, larger, *heaviest, moments)


class StepMemory(NamedTuple):
    """What a step on the heaviest micro batch needs beside the model, what is free (bytes), and what follows."""

    estimate: Estimate
    free: int
    checkpointing: bool  # activations are to be recomputed


def step_memory(
    cfg: SFTConfig,
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    heaviest: tuple[int, int],
) -> StepMemory | None:
    """The StepMemory of `cfg`, `heaviest` the heaviest micro batch (rows, length); None where it cannot be tried."""
    if distributed.shards_weights():
        return None
    moments, kind = OPTIMIZERS[cfg.optim].moments, resolve_dtype(cfg.dtype)
    with _computed_in(net, kind):
        copied = 0 if kind == torch.float32 else kind.itemsize  # what autocast makes of each trained weight
        needs = estimate_memory(net.train(), rows, tokenizer, heaviest, moments + copied)
    available = free()  # now that the copies are gone, which `needs` counts
    too_much = needs.total(False) > SPARE * available
    asked = cfg.gradient_checkpointing
    return StepMemory(needs, available, too_much if asked == "auto" else asked == "true")


@contextlib.contextmanager
def _computed_in(net: torch.nn.Module, kind: torch.dtype) -> Iterator[None]:
    """Within, what is trained, in fp32, lies in the dtype that autocast will compute with."""
    whole = {parameter: parameter.data for parameter in net.parameters() if parameter.requires_grad}
    try:
        for parameter, values in whole.items():
            parameter.data = values.to(kind)
        yield
    finally:
        for parameter, values in whole.items():
            parameter.data = values


def needs_checkpointing(
    cfg: SFTConfig,
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    sampler: LengthGroupedSampler,
) -> bool:
    """Whether activations are to be recomputed: what the knob says, or what the memory says, which is printed."""
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "true"
    found = step_memory(cfg, net, rows, tokenizer, sampler.shape(sampler.by_weight(cfg.micro_batch_size, 1)[-1]))
    if found is None:
        print("内存 memory: 参数分片 the weights are sharded and cannot be tried: gradient_checkpointing on (auto)")
        return True
    print(
        f"内存 memory: 最重的一步约需 the heaviest step needs about {shown(found.estimate.total(False))} beside "
        f"the model ({shown(found.estimate.total(True))} recomputing), 可用 free {shown(found.free)}: "
        f"gradient_checkpointing {'on' if found.checkpointing else 'off'} (auto)"
    )
    return found.checkpointing
