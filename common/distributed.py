"""Processes that train together: the first one speaks and writes, all see its errors, all stop together."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from common.errors import UserError
from common.launch import rank, world_size

if TYPE_CHECKING:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from common.config import SFTConfig

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=24)  # the others may wait so long while the first reads and tokenises
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by DeepSpeed's names
# our own gloo group: unlike the training's it waits for PATIENCE, and its messages stay off the GPU
_own: dict[str, Any] = {}


def join(cfg: SFTConfig) -> None:
    """Form the group that torchrun, accelerate or deepspeed started; nothing to do for a process on its own.

    Raises UserError where --deepspeed is asked for without a launcher, or without DeepSpeed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed guesses and warns on the console
    if cfg.deepspeed:
        _prepare_deepspeed(cfg)
    if strategy(cfg) == "FSDP2" and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP: 请用第 2 版 use version 2: configs/accelerate/fsdp2.yaml")
    if "RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _own["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    if strategy(cfg) == "ZeRO-3":
        _zero3(cfg.deepspeed, cfg.micro_batch_size, cfg.dtype)


def part() -> None:
    """Leave the group, in all processes; from now on each is on its own."""
    if together():
        dist.barrier(_own.pop("group"))
        dist.destroy_process_group()
    if importlib.util.find_spec("deepspeed"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else a model loaded from now on would still be sharded


def together() -> bool:
    """Whether there is a group to talk to."""
    return "group" in _own


def strategy(cfg: SFTConfig) -> str:
    """How the work is shared: "" (one process), "DDP", "FSDP2", "ZeRO-1", "ZeRO-2" or "ZeRO-3"."""
    if cfg.deepspeed:
        return f"ZeRO-{_json(cfg.deepspeed).get('zero_optimization', {}).get('stage', 0)}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":  # accelerate launch sets it
        return "FSDP2"
    return "DDP" if world_size() > 1 else ""


def describe(cfg: SFTConfig) -> str:
    """Number of processes and how they share the work, for console and manifest: "1", "2 DDP", "4 ZeRO-3"."""
    return f"{world_size()} {strategy(cfg)}".strip()


def shards_weights() -> bool:
    """Whether each process will hold only a part of the weights, so that none should put all of them on its card."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_deepspeed_zero3_enabled()


def is_sharded(net: torch.nn.Module) -> bool:
    """Whether this process holds only parts of `net`'s parameters."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in net.parameters())


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of `parameter` on the CPU, put together from all processes, which call this at the same time."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.detach().full_tensor().cpu()
    return parameter.detach().cpu()


def first(work: Callable[[], T]) -> T | None:
    """What `work()` returns in the first process, None in the others, which wait; its UserError is raised in all."""
    if not together():
        return work()
    value: T | None = None
    error: UserError | None = None
    if rank() == 0:
        try:
            value = work()
        except UserError as problem:
            error = problem
    error = share(error)
    if error:
        error.everywhere = True
        raise error
    return value


def in_turn(work: Callable[[], T]) -> T:
    """What `work()` returns, in all; the first process works before the others, which find what it left in a cache."""
    value = first(work)
    if together() and rank():
        return work()
    return cast("T", value)


def share(value: Any) -> Any:
    """The first process's `value`, in all processes."""
    box = [value]
    if together():
        dist.broadcast_object_list(box, 0, _own["group"])
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all processes in their order, in all of them."""
    if not together():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, _own["group"])
    return found


def largest(number: int) -> int:
    """The largest of the processes' whole numbers, in all of them."""
    if not together():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX, _own["group"])
    return int(box)


def wait() -> None:
    """Wait until all processes have called this."""
    if together():
        dist.barrier(_own["group"])


def _prepare_deepspeed(cfg: SFTConfig) -> None:
    """UserError where DeepSpeed is not installed, no launcher started this process, or two optimizers are named."""
    if "optim" in cfg.given and "optimizer" in _json(cfg.deepspeed):
        raise UserError(
            f"--optim {cfg.optim}: {cfg.deepspeed} 里已有 names an optimizer too, which would win; take one of them out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: 没有安装 DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    if "RANK" not in os.environ:
        raise UserError(
            "--deepspeed: 请用 torchrun 启动 start it by torchrun: "
            f"torchrun --nproc_per_node 2 train.py --deepspeed {cfg.deepspeed}"
        )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and gloo does the same
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed uses old names of functions


def _json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as problem:
        raise UserError(f"--deepspeed {path}: 无法读取 cannot be read: {problem}") from None


@functools.cache  # transformers keeps a weak reference only: the cache keeps the object alive
def _zero3(path: str, micro_batch_size: int, dtype: str) -> HfDeepSpeedConfig:
    """Tell transformers to load a model in shards from now on."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from common.device import resolve_dtype

    plan = _json(path) | {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": 1}
    plan |= {name: {"enabled": resolve_dtype(dtype) == kind} for name, kind in PRECISIONS.items()}
    plan.pop("train_batch_size", None)
    return HfDeepSpeedConfig(plan)
