"""A rehearsal: the heaviest step of a run, tried before the run, with its time and memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from common.errors import UserError
from common.model.frozen_layers import lean
from common.model.loss import supervised
from common.training import batches, memory, packing, trainer
from common.training.arguments import arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    from common.config import SFTConfig
    from common.data.dataset import TrainingData

PASSES = 3  # passes over the data in which the heaviest micro batch is looked for
TIMED = 3  # steps on ordinary micro batches; the first of them is tried once before, untimed


def rehearse(
    net: PreTrainedModel | PeftModel, rows: TrainingData, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Train `net` on some ordinary micro batches of the run, then on the heaviest it will make.

    Returns {step: {where, rows, length (ids), seconds, total_steps, run_seconds (estimated)}, memory: {peak, measured,
    free, estimate, gradient_checkpointing}}, bytes; measured and estimate are without what was loaded before. The first
    step of each is not timed. run_seconds is what the ordinary ones say, which stand for light and heavy ones alike.
    Raises UserError as `fit` does. Leaves no files, and weights that mean nothing.
    """
    with supervised(net.train(), cfg.label_smoothing_factor), lean(net):
        return _rehearse(net, rows, cfg, tokenizer)


def _rehearse(
    net: PreTrainedModel | PeftModel, rows: TrainingData, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    data, lengths = packing.training_data(net, rows.train, cfg)
    plan, sampler = trainer.make_plan(cfg, len(data)), batches.sampler_of(lengths, cfg)
    micro = sampler.by_weight(cfg.micro_batch_size, min(-(-plan["total_steps"] // plan["steps_per_epoch"]), PASSES))
    heaviest, ordinary = micro[-1], spread(micro)
    step = memory.step_memory(cfg, net, rows, tokenizer, sampler.shape(heaviest))
    if step is None:
        raise UserError(
            "--check: 参数分片时不能试 cannot be tried where the weights are sharded; run it as one process"
        )
    usual = _seconds_a_step(net, cfg, tokenizer, data, [ordinary[0], *ordinary], step.checkpointing)
    with memory.Peak() as used:
        seconds = _seconds_a_step(net, cfg, tokenizer, data, [heaviest] * 2, step.checkpointing)
    runs = plan["total_steps"] * plan["accumulation"] * usual
    where = batches.collate(data.__getitems__(heaviest), pad_id=0)["where"]
    shape = {"where": where, "rows": len(where), "length": sampler.shape(heaviest)[1]}
    taken = {"peak": used.peak, "measured": used.peak - used.before, "free": step.free}
    taken |= {"estimate": step.estimate.total(step.checkpointing), "gradient_checkpointing": step.checkpointing}
    times = {"seconds": seconds, "total_steps": plan["total_steps"], "run_seconds": runs}
    return {"step": shape | times, "memory": taken}


def spread(micro: list[list[int]]) -> list[list[int]]:
    """TIMED of the micro batches, which are sorted by weight: the middle of each third, those of a full batch."""
    full = [numbers for numbers in micro if len(numbers) == len(micro[-1])]
    return [full[(2 * part + 1) * len(full) // (2 * TIMED)] for part in range(TIMED)]


def _seconds_a_step(
    net: PreTrainedModel | PeftModel,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    micro: list[list[int]],
    checkpointing: bool,
) -> float:
    """Mean seconds of a step over all of the micro batches (equally many rows of `data` each) except the first."""
    watch, steps = StopWatch(), len(micro)
    plan = {"accumulation": 1, "warmup_steps": 0, "total_steps": steps, "steps_per_epoch": steps}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(replace(cfg, model_save_dir=folder, max_steps=steps), plan, False, checkpointing)
        args.per_device_train_batch_size = len(micro[0])  # the last micro batch of an epoch may be smaller
        args.save_strategy = "no"
        trainer.make_trainer(net, args, data, [], sum(micro, []), [watch], tokenizer).train()
    return sum(watch.seconds[1:]) / len(watch.seconds[1:])


class StopWatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self.started)
