"""Qwen's knobs. Shared ones are in common/config.py; here is what Qwen does differently, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.config import SFTConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(SFTConfig):
    """Qwen1.5 from 0.5B to 72B, Qwen2, Qwen2.5, and Qwen3 to 3.8."""

    repo_id: str = "Qwen/Qwen1.5-0.5B-Chat"  # hub id, used where given and path_model_pretrain is not
    model_save_dir: str = str(HERE / "model_sft")  # folder for the adapter, checkpoints, logs and pictures
    prompt_style: Literal["chat", "log", "plain"] = "chat"  # chat: official template; log: as in the first logs
    loss_on: Literal["all", "answer", "last"] = "all"  # questions too: small sets teach the domain's words as well
    learning_rate: float = 5e-5  # as qwen1.5-sft; higher rates forget the chat tuning
    lora_r: int = 8  # rank
    lora_alpha: int = 16  # scale is lora_alpha / lora_r
    lora_dropout: float = 0.1  # on the adapter's input
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # linear layers to adapt, or all-linear
    port: int = 8036  # and its port

    EMBEDDED_DIR: ClassVar[Path] = HERE.parent / "embedded"
    # the small model is 1,000 times narrower: it needs larger steps, all layers, and takes every epoch in seconds;
    # its loss is on answers only, because the questions of its task are lists in no order
    EMBEDDED: ClassVar[dict] = {
        "loss_on": "answer",
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
