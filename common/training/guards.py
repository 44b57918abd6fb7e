"""What stops a training that would spoil what is saved, or train nothing; and a word when the loss does not fall."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers import TrainerCallback

from common import distributed
from common.errors import UserError
from common.runs import checkpoints

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

PARTNERS = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}  # {factor: the one that starts at zero}
PARTNER = re.compile("|".join(PARTNERS))
STALL, FALL, RISE = 10, 0.02, 0.1  # logged losses in a window; what counts as fallen, and as risen again, as shares


class Guard(TrainerCallback):
    """Stops before a step that would spoil what is saved, or that would train nothing."""

    def __init__(self, folder: Path, net: torch.nn.Module) -> None:
        self.folder = folder  # of the checkpoints
        self.losses: list[torch.Tensor] = []  # of the step under way, one a micro batch
        self.where: list[str] = []  # its rows
        self.norm: torch.Tensor | float = math.nan  # its gradient norm, which the trainer sets before the check
        self.gradients: Gradients | None = Gradients(net)  # None once the first step was looked at

    def saw(self, loss: torch.Tensor, where: list[str]) -> None:
        """Remember a micro batch of the step under way."""
        self.losses.append(loss.detach())
        self.where += where

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        numbers = torch.stack([torch.as_tensor(value).float().cpu() for value in [*self.losses, self.norm]])
        bad = not numbers.isfinite().all() or numbers[-1] < 0  # DeepSpeed's norm is -1 where it is not finite
        if distributed.largest(int(bad)):
            self._stop_non_finite(state.global_step + 1)
        if self.gradients:
            self.gradients.check()
            self.gradients = None
        self.losses = []
        self.where = []

    def _stop_non_finite(self, step: int) -> None:
        """UserError naming the rows of the processes whose loss is not finite; of all, where only the norm is not."""
        found = distributed.gather(([round(float(loss), 4) for loss in self.losses], self.where))
        bad = [(losses, rows) for losses, rows in found if not numpy.isfinite(losses).all()] or found
        rows = [row for _, rows in bad for row in rows if row]

        def say() -> None:
            raise UserError(
                f"第 {step} 步的损失或梯度不是有限数 non-finite loss or gradient at step {step}; "
                f"losses {[loss for losses, _ in bad for loss in losses]}; rows {', '.join(rows[:8])}; "
                "remedy: --dtype float32 or bfloat16, a lower --learning_rate, look at these rows; "
                f"最近的检查点 last good checkpoint: {checkpoints.last_whole_checkpoint(self.folder) or 'none'}"
            )

        distributed.first(say)


class Gradients:
    """Which trainable tensors of `net` got a gradient that is not zero in the first step, whoever keeps it.

    Hooks note gradients as they are computed: DeepSpeed has taken them away when `check` is called. FSDP2 calls no
    hooks; there `check` finds the gradients still on the parameters.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net
        self.reached: set[str] = set()  # names of tensors that got a gradient
        trained = self._trained(net)
        partners = {name: trained.get(PARTNER.sub(lambda found: PARTNERS[found[0]], name)) for name in trained}
        self.waiting = {  # one factor of a LoRA layer gets no gradient in the first step: the other is still zero
            name
            for name, partner in partners.items()
            if partner is not None and partner is not trained[name] and not partner.any()
        }
        rows = {name for name in trained if "trainable_tokens_delta" in name}
        self.waiting |= rows  # a step may have none of their tokens
        self.hooks = [p.register_hook(self._hook(name)) for name, p in trained.items()]

    @staticmethod
    def _trained(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in net.named_parameters() if p.requires_grad}

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def see(gradient: torch.Tensor) -> None:
            if gradient.any():
                self.reached.add(name)

        return see

    def check(self) -> None:
        """UserError naming the tensors that no process saw a gradient for."""
        trained = self._trained(self.net)  # FSDP2 has put others in the place of those at the start
        for name, parameter in trained.items():
            gradient = parameter.grad
            if gradient is not None and getattr(gradient, "_local_tensor", gradient).any():
                self.reached.add(name)
        for hook in self.hooks:
            hook.remove()
        reached = self.waiting.union(*distributed.gather(self.reached))
        dead = [name for name in trained if name not in reached]
        if dead:
            raise UserError(
                f"{len(dead)} 个可训练参数没有梯度 trainable tensors got no gradient in the first step, "
                f"e.g. {dead[0]}: they would never learn; is the adapter cut off from the loss "
                "(checkpointing over a frozen base)?"
            )


class StallWatch(TrainerCallback):
    """Says, once, that the loss does not fall, or rises again, and why that usually is."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.told = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs or self.told or not state.is_world_process_zero:
            return
        self.losses.append(logs["loss"])
        if len(self.losses) < 2 * STALL:
            return
        first, last = (sum(part) / STALL for part in (self.losses[:STALL], self.losses[-STALL:]))
        best = min(sum(self.losses[n : n + STALL]) / STALL for n in range(len(self.losses) - STALL + 1))
        if last > (1 - FALL) * first or last > (1 + RISE) * best:
            self.told = True
            print(
                f"\n第 {state.global_step} 步，损失没有下降 the loss is not falling: at first {first:.4f}, "
                f"best {best:.4f}, last {last:.4f} (means of {STALL} logged losses); likely causes: --learning_rate "
                f"(now {logs['learning_rate']:.1e}) too small or too large, answers that do not follow from questions, "
                "too few --target_modules or too small a --lora_r, data the base already knows"
            )
