"""Gemma's knobs. Shared ones are in common/config.py; here is what Gemma does differently, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.config import SFTConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(SFTConfig):
    """gemma-2b and -7b, gemma-1.1, gemma-2, gemma-3 and gemma-4 (of models of images or sound the text model)."""

    repo_id: str = "google/gemma-2b-it"  # hub id, used where given and path_model_pretrain is not
    model_save_dir: str = str(HERE / "model_sft")  # folder for the adapter, checkpoints, logs and pictures
    prompt_style: Literal["chat", "log", "plain"] = "chat"  # chat: official template; log, plain: bos + text
    loss_on: Literal["all", "answer", "last"] = "answer"  # all ids, every answer, or the last answer
    learning_rate: float = 2e-4  # gemma_pytorch trains LoRA at 2e-4; at 1e-3 the loss diverges
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # linear layers to adapt, or all-linear
    port: int = 8044  # and its port

    EMBEDDED_DIR: ClassVar[Path] = HERE.parent / "embedded"
    # the small model is 1,000 times narrower: it needs larger steps, all layers, and takes every epoch in seconds
    EMBEDDED: ClassVar[dict] = {
        "learning_rate": 4e-3,
        "epochs": 2,
        "micro_batch_size": 16,
        "batch_size": 16,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": ("all-linear",),
        "logging_steps": 10,
        "eval_rows": 200,
    }
