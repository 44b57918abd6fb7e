"""Folders that answer as a run does and are none: a run's checkpoint, or an adapter that another tool trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.model.folders import read_object
from common.runs.checkpoints import is_whole, step_of
from common.runs.manifest import knobs_of, matching, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family


def find_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of the run in `folder`, or of the run whose checkpoint it is, or None; UserError where damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is not None or step_of(folder) is None:
        return manifest
    manifest = read_manifest(folder.parent)
    if manifest is None:
        return None
    config = manifest["config"] | {"model_save_dir": str(folder)}
    return manifest | {"state": "finished", "config": config, "checkpoint": folder.name}


def adapter_base(folder: str | Path) -> str | None:
    """The base that the adapter of another tool in `folder` names, "" where it names none; None: no such adapter."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or find_manifest(folder) is not None:
        return None
    return read_object(file).get("base_model_name_or_path") or ""


def describe_adapter(cfg: SFTConfig, base: str, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> dict[str, Any]:
    """What the manifest of a run would say of the adapter in `cfg.model_save_dir`, which another tool trained."""
    config = {**knobs_of(cfg), "path_model_pretrain": base}
    told = matching(base, cfg.prompt_style, tokenizer, prompt)
    return {"state": "finished", "config": config, **told, "data": [], "foreign": True}


def accept(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Say in one line on stderr what `folder` is where it is no finished run's own; nothing to do for such a run.

    UserError where the checkpoint was cut off, or belongs to a base that its run has split.
    """
    folder, base = Path(folder), manifest["base"]["path"]
    if "checkpoint" in manifest:
        if not is_whole(folder):
            raise UserError(
                f"{folder}: 不是完整的检查点 not a whole checkpoint; give another, or the run {folder.parent}"
            )
        line = f"训练中的检查点 a checkpoint of the run in {folder.parent}, base {base}"
    elif "foreign" in manifest:
        style = manifest["template"]["style"]
        line = f"其他工具训练的适配器 an adapter of another tool, base {base}, prompt_style {style}"
    else:
        return
    refuse_split(folder)
    print(f"{folder}: {line}", file=sys.stderr)


def refuse_split(folder: Path) -> None:
    """UserError where the adapter in `folder` is none over the base as its files hold it."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return  # a checkpoint of a whole model
    if str(read_object(file).get("init_lora_weights")).startswith("pissa"):
        raise UserError(
            f"{folder}: PiSSA 的检查点要配被拆分的基座 a PiSSA adapter as it is while training: it "
            "belongs to a split base; give the finished run, which is plain LoRA"
        )
