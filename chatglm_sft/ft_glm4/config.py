"""GLM-4's knobs. Shared ones are in common/config.py; here is what GLM-4 does differently, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import SFTConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(SFTConfig):
    """GLM-4-9B-0414, glm-4-9b-chat-hf, glm-edge 1.5B and 4B, GLM-4.5-Air, GLM-4.7."""

    path_model_pretrain: str = ""  # base model: a folder or a hub id; none is shipped for these recipes
    repo_id: str = "THUDM/GLM-4-9B-0414"  # hub id, used where given and path_model_pretrain is not
    model_save_dir: str = str(HERE / "model_sft")  # folder for the adapter, checkpoints, logs and pictures
    prompt_style: Literal["chat"] = "chat"  # the official template
    learning_rate: float = 2e-4  # THUDM's finetune_demo takes 5e-4 for thousands of steps; a small set wants less
    lora_r: int = 8  # rank, as THUDM's finetune_demo
    lora_alpha: int = 32  # scale is lora_alpha / lora_r
    lora_dropout: float = 0.1  # on the adapter's input
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # linear layers to adapt, or all-linear
    port: int = 8034  # and its port
