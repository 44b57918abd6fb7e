"""Training: transformers' Trainer with the chunked loss, batches of like length, and guards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, Trainer, TrainingArguments

from common import distributed, files
from common.errors import UserError
from common.launch import world_size
from common.model.adapter import saved_alone
from common.model.frozen_layers import lean
from common.model.layers import causal_of, parameter_counts
from common.model.loading import pad_id_of
from common.model.loss import router_weight, show_routers, supervised
from common.runs import run
from common.training import packing, tuning
from common.training.arguments import arguments
from common.training.batches import RowsAndBlanks, collate, sampler_of
from common.training.callbacks import (
    EarlyStop,
    NothingLeftError,
    Recorder,
    StopOnSignal,
    StoppedError,
    WholeCheckpoints,
)
from common.training.guards import Guard, StallWatch
from common.training.memory import needs_checkpointing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainerState,
    )
    from transformers.trainer_utils import EvalLoopOutput

    from common.config import SFTConfig
    from common.data.dataset import TrainingData
    from common.training.samples import Samples


OPTIONS = ("lr", "weight_decay", "betas")  # of an optimizer's group, as the knobs say them


def fit(
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None = None,
    samples: Samples | None = None,
) -> dict[str, Any]:
    """Train `net` on `rows` (dataset.TrainingData) as `cfg` says, from `checkpoint` where one is given.

    samples: answers some rows at each validation.

    Returns {train_loss (nats a supervised token), train_runtime (seconds), tokens, steps, padding (share of a batch),
    …}. With `cfg.early_stopping_patience` the net ends as it was at its best validation loss, without it as it is after
    the last step. Its layers compute as they did before. Raises UserError on a non-finite loss or gradient, or one that
    does not reach the adapter; StoppedError on SIGTERM or Ctrl-C.
    """
    if cfg.early_stopping_patience and not len(rows.validation):
        raise UserError("--early_stopping_patience 需要验证数据 needs validation rows: --val_set_size above 0")
    start = tuning.start_of(net, cfg)
    with supervised(net, cfg.label_smoothing_factor), lean(net):
        results = _fit(net, rows, cfg, tokenizer, checkpoint, samples)
    trained, total = parameter_counts(net)
    tuning.settle(net, cfg, start)
    return results | {"trainable_params": trained, "all_params": total}


def _fit(
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    samples: Samples | None,
) -> dict[str, Any]:
    """Train `net`, whose forward returns the loss: what `fit` returns, without the numbers of parameters."""
    data, lengths = packing.training_data(net, rows.train, cfg)
    plan, sampler = make_plan(cfg, len(data)), sampler_of(lengths, cfg)
    padding = sampler.padding(cfg.micro_batch_size)
    show_plan(cfg, plan, padding)
    show_routers(net)
    checkpointing = needs_checkpointing(cfg, net, rows, tokenizer, sampler)
    folder = Path(cfg.model_save_dir)
    recorder, stopper = Recorder(folder), StopOnSignal()
    callbacks = [stopper, recorder, StallWatch(), EarlyStop(cfg.early_stopping_patience), WholeCheckpoints()]
    callbacks += [samples] if samples else []
    args = arguments(cfg, plan, bool(len(rows.validation)), checkpointing)
    trainer = make_trainer(net, args, data, rows.validation, sampler, callbacks, tokenizer)
    trainer.samples = samples
    with run.told_when_full(folder), contextlib.closing(recorder):
        _train(trainer, stopper, checkpoint)
    if stopper.received:
        raise StoppedError(stopper.received, folder)
    return recorder.summary() | _best(trainer.state, cfg) | {"padding": round(padding, 4)}


def _train(trainer: SupervisedTrainer, stopper: StopOnSignal, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NothingLeftError:  # its weights are loaded; the Trainer would make one step more
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    except RuntimeError:
        if stopper.received and distributed.together():  # the launcher ends this process: another one has failed
            raise SystemExit(128 + stopper.received) from None
        raise
    finally:
        stopper.release()


def _best(state: TrainerState, cfg: SFTConfig) -> dict[str, Any]:
    """{best_step, best_eval_loss, adapter_of_step} of a finished training; {} where nothing was validated."""
    if state.best_global_step is None:
        return {}
    saved = state.best_global_step if cfg.early_stopping_patience else state.global_step
    return {"best_step": state.best_global_step, "best_eval_loss": state.best_metric, "adapter_of_step": saved}


def make_trainer(
    net: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    train: Any,
    validation: Any,
    sampler: Iterable[int],
    callbacks: list[TrainerCallback],
    tokenizer: PreTrainedTokenizerBase,
) -> SupervisedTrainer:
    """The SupervisedTrainer over `train` in the sampler's order, its Guard before the other callbacks."""
    pad_id = pad_id_of(tokenizer, 0)  # any id will do: padding is masked by length, never by id
    guard = Guard(Path(args.output_dir), net)
    trainer = SupervisedTrainer(
        sampler,
        guard,
        model=net,
        args=args,
        data_collator=lambda batch: collate(batch, pad_id),
        train_dataset=RowsAndBlanks(train),
        eval_dataset=validation.with_format("numpy") if len(validation) else None,
        compute_metrics=validation_loss,
        callbacks=[guard, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    _keep_loss_exact(trainer)
    return trainer


def _keep_loss_exact(trainer: SupervisedTrainer) -> None:
    """FSDP2 would hand the loss over as bf16, three digits of it, and add up the processes' gradients in bf16."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin and trainer.args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make_plan(cfg: SFTConfig, rows: int) -> dict[str, int]:
    """Steps of a run over `rows` training rows: {accumulation, steps_per_epoch, total_steps, warmup_steps}."""
    batches = math.ceil(rows / (cfg.micro_batch_size * world_size()))
    accumulation = min(cfg.accumulation, batches)
    steps_per_epoch = math.ceil(batches / accumulation)
    total = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.epochs * steps_per_epoch)
    return {
        "accumulation": accumulation,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total,
        "warmup_steps": int(cfg.warmup_ratio * total),  # rounded down: the first of few steps must not have rate 0
    }


def show_plan(cfg: SFTConfig, plan: dict[str, int], padding: float) -> None:
    """Print what will be trained: batches, steps, padding."""
    split = f"{cfg.micro_batch_size} × {plan['accumulation']} × {distributed.describe(cfg)}"
    print(
        f"计划 plan: 每步 batch {split} 进程 processes, "
        f"每轮 {plan['steps_per_epoch']} 步 steps per epoch, 共 {plan['total_steps']} 步 steps, "
        f"预热 warm-up {plan['warmup_steps']}, 填充 padding {padding:.1%}, 计损失 loss on {cfg.loss_on}"
    )


class SupervisedTrainer(Trainer):
    """The Trainer with our sampler; it counts tokens and tells the guard which rows a loss came from."""

    def __init__(self, sampler: Iterable[int], guard: Guard, **kwargs: Any) -> None:
        self.sampler = sampler
        self.guard = guard
        self.samples: Samples | None = None
        self.tokens = 0  # seen by this process
        self.groups: list[tuple[dict[str, Any], bool]] = []  # of the optimizer: its OPTIONS, whether it has parameters
        self.routers: dict[int, torch.Tensor] = {}  # {step since the last log: what the routers' loss added here}
        super().__init__(**kwargs)
        self.router_weight = router_weight(causal_of(self.model))

    def _get_train_sampler(self, train_dataset: Any = None) -> Iterable[int]:
        return self.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        first = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if first:
            tuning.hasten_rows(optimizer, self.model)
            groups = optimizer.param_groups
            self.groups = [({n: one[n] for n in OPTIONS if n in one}, bool(one["params"])) for one in groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `checkpoint` has; rate, decay and betas are what the options say, which may have changed since."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not hasattr(self.lr_scheduler, "lr_lambdas"):
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        given = [options for options, full in self.groups if full or len(groups) == len(self.groups)]  # DeepSpeed's are
        for group, options in zip(groups, given, strict=False):  # without the empty ones, or of its own JSON file
            group.update(options, initial_lr=options["lr"], lr=options["lr"] * factor)
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [group["lr"] for group in groups]  # for the log

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        where, tokens = inputs.pop("where"), inputs.pop("tokens")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.tokens += tokens
            self.guard.saw(loss, where)
            if outputs.get("aux_loss") is not None:
                step = self.state.global_step
                self.routers[step] = self.routers.get(step, 0.0) + outputs["aux_loss"].detach()
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with saved_alone(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            files.share_weights(output_dir or self.args.output_dir)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.guard.norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nobody reads this count, and it would visit all parameters in every step

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.samples:
            shares = self.samples.take(self.state.global_step)
            output.metrics.update({f"eval_{name}": share for name, share in shares.items()})
        return output

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self.accelerator.reduce(torch.as_tensor(self.tokens, device=self.args.device), "sum")
            logs = {**logs, "tokens": int(tokens)}
            if self.router_weight:
                here = sum(self.routers.values(), torch.zeros((), device=self.args.device)) / max(1, len(self.routers))
                logs |= {"router_loss": float(self.accelerator.reduce(here, "sum"))}
                self.routers = {}
        super().log(logs, start_time)


def validation_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Cross entropy over all supervised tokens of the validation rows, from each row's [sum, count]."""
    sums, counts = numpy.asarray(prediction.predictions).T
    return {"token_loss": float(sums.sum() / counts.sum())}
