"""ChatGLM3's knobs. Shared ones are in common/config.py; here is what ChatGLM3 does differently, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import SFTConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(SFTConfig):
    """chatglm3-6b, chatglm3-6b-base."""

    path_model_pretrain: str = ""  # base model: a folder or a hub id; none is shipped for these recipes
    repo_id: str = "THUDM/chatglm3-6b"  # hub id, used where given and path_model_pretrain is not
    model_save_dir: str = str(HERE / "model_sft")  # folder for the adapter, checkpoints, logs and pictures
    prompt_style: Literal["chat"] = "chat"  # the original's own, without tools
    learning_rate: float = 1e-4  # query_key_value is one matrix for q, k and v: half of what Gemma's three take
    lora_r: int = 8  # rank, as THUDM's finetune_demo
    lora_alpha: int = 32  # scale is lora_alpha / lora_r
    lora_dropout: float = 0.1  # on the adapter's input
    target_modules: tuple[str, ...] = ("query_key_value",)  # linear layers to adapt, or all-linear
    port: int = 8035  # and its port
