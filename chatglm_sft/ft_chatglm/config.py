"""ChatGLM's knobs. Shared ones are in common/config.py; here is what ChatGLM does differently, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.config import DATA, SFTConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(SFTConfig):
    """chatglm-6b (the first one, 130,528 embedding rows)."""

    repo_id: str = "THUDM/chatglm-6b"  # hub id, used where given and path_model_pretrain is not
    model_save_dir: str = str(HERE / "model_sft")  # folder for the adapter, checkpoints, logs and pictures
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"  # a prompt sees itself: flash attention has no mask
    prompt_style: Literal["chat"] = "chat"  # the original's own: bare question, or numbered rounds with history
    data_path: tuple[str, ...] = (str(DATA / "entity_train.jsonl"),)  # files or URLs to train on; path#N samples N
    eval_data_path: tuple[str, ...] = (str(DATA / "entity_heldout.jsonl"),)  # held-out rows scored after training
    loss_on: Literal["answer", "last"] = "answer"  # every answer, or the last; a prompt sees itself, so it is no target
    learning_rate: float = 1e-4  # query_key_value is one matrix for q, k and v: half of what Gemma's three take
    lora_r: int = 8  # rank
    lora_alpha: int = 32  # scale is lora_alpha / lora_r
    target_modules: tuple[str, ...] = ("query_key_value",)  # linear layers to adapt, or all-linear
    port: int = 8033  # and its port

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
