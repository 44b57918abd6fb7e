"""Our knobs in today's names of transformers, the one place that maps them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from common import distributed
from common.device import device, resolve_dtype
from common.knobs import OPTIMIZERS
from common.versions import name_taken

if TYPE_CHECKING:
    from common.config import SFTConfig


def arguments(cfg: SFTConfig, plan: dict[str, int], validate: bool, checkpointing: bool) -> TrainingArguments:
    """The TrainingArguments of a run.

    validate: score validation rows too. checkpointing: recompute activations.
    """
    on_cpu = device().type == "cpu"
    args = TrainingArguments(
        output_dir=cfg.model_save_dir,
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=plan["accumulation"],
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate,
        **_schedule(cfg, plan),
        warmup_steps=plan["warmup_steps"],
        **_optimizer(cfg),
        neftune_noise_alpha=cfg.neftune_noise_alpha or None,
        max_grad_norm=cfg.max_grad_norm,
        **{name_taken(TrainingArguments, "activation_checkpointing", "gradient_checkpointing"): checkpointing},
        bf16=resolve_dtype(cfg.dtype) == torch.bfloat16,
        fp16=resolve_dtype(cfg.dtype) == torch.float16,
        deepspeed=cfg.deepspeed or None,
        ddp_find_unused_parameters=False,  # there are none, and looking for them takes time
        use_cpu=on_cpu,
        dataloader_pin_memory=device().type == "cuda",
        logging_steps=cfg.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would print 0.0 for NaN
        save_steps=cfg.save_steps,
        save_total_limit=cfg.save_total_limit,
        eval_strategy="steps" if validate else "no",
        eval_steps=cfg.save_steps,
        metric_for_best_model="token_loss" if validate else None,  # its checkpoint is never deleted
        greater_is_better=False,
        load_best_model_at_end=validate and cfg.early_stopping_patience > 0,
        seed=cfg.seed,
        data_seed=cfg.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=list(cfg.report_to) or "none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several cards are used by torchrun, one process each, never by DataParallel
    if on_cpu and distributed.strategy(cfg) == "FSDP2":  # accelerate knows FSDP on cards only, and would copy the model
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def _optimizer(cfg: SFTConfig) -> dict[str, Any]:
    """The optimizer as transformers' arguments."""
    return {
        "optim": cfg.optim,
        "optim_target_modules": "all-linear" if OPTIMIZERS[cfg.optim].projects else None,
        "weight_decay": cfg.weight_decay,
        "adam_beta1": cfg.adam_beta1,
        "adam_beta2": cfg.adam_beta2,
    }


def _schedule(cfg: SFTConfig, plan: dict[str, int]) -> dict[str, Any]:
    """The learning rate's course as transformers' two arguments."""
    name: str = cfg.lr_scheduler_type
    if name == "constant" and plan["warmup_steps"]:
        name = "constant_with_warmup"
    shapes: dict[str, dict[str, float]] = {
        "cosine_with_restarts": {"num_cycles": math.ceil(plan["total_steps"] / plan["steps_per_epoch"])},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": max(1, plan["total_steps"] // 10)},
    }
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": shapes.get(name, {})}
