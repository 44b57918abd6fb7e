"""Which weights of a run are used: those it ended with, or a checkpoint's."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed, files
from common.config import SFTConfig
from common.errors import UserError
from common.runs.adopted import find_manifest
from common.runs.checkpoints import by_step, is_whole
from common.runs.manifest import read_manifest

if TYPE_CHECKING:
    from common.config import EvaluationFlags, ExportFlags, PredictFlags, ServeFlags

Config = TypeVar("Config", bound=SFTConfig)  # a family's


def choose(cfg: Config, flags: PredictFlags | EvaluationFlags | ServeFlags | ExportFlags) -> Config:
    """`cfg` with the folder that answers as `model_save_dir`: the run's own, or the checkpoint of `flags.checkpoint`.

    The repetition penalty is the run's too, where the user gave none, also for a server that is asked as it is: its
    answers were scored with it.

    Errors and the line on stderr: `chosen_folder`. UserError too where a flag asks for no run at all.
    """
    other = _other_than_run(flags)
    if other and flags.checkpoint:
        raise UserError(
            f"--checkpoint {flags.checkpoint} 对 {other} 不起作用 has no effect with {other}; leave one out"
        )
    if other and other != "--base_url":
        return cfg
    folder = cfg.model_save_dir
    if not other:
        folder = distributed.share(distributed.first(lambda: str(chosen_folder(cfg.model_save_dir, flags.checkpoint))))
    run = find_manifest(folder) if "repetition_penalty" not in cfg.given else None
    penalty = (run or {}).get("config", {}).get("repetition_penalty", cfg.repetition_penalty)
    return replace(cfg, model_save_dir=folder, repetition_penalty=penalty)


def chosen_folder(folder: str | Path, wanted: str = "") -> Path:
    """The folder whose weights are meant: that of a finished run, or of a checkpoint, which a line on stderr names.

    wanted: "best" (the lowest validation loss), "last" (the newest whole one), a step's number, or "": what a finished
    run ended with, and of one that was stopped or is still training the newest whole checkpoint. Nothing is removed.
    A `folder` that is no run's is returned as it is. UserError where there is no such checkpoint.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None and wanted:
        raise UserError(f"--checkpoint {wanted}: {folder} 里没有训练 is no run's folder; check --model_save_dir")
    if manifest is None or (manifest["state"] == "finished" and not wanted):
        return folder
    checkpoint, why = _checkpoint(folder, wanted)
    if manifest["state"] != "finished":
        why += "; 训练没有完成 the run is not finished"
    print(f"{checkpoint}: {why}", file=sys.stderr)
    return checkpoint


def _other_than_run(flags: Any) -> str:
    """The flag by which what is asked needs no weights of the run, "" where it does."""
    alone = {
        "--base": getattr(flags, "base", False) and not getattr(flags, "compare", False),
        "--base_url": getattr(flags, "base_url", ""),
        "--print_prompt": getattr(flags, "print_prompt", ""),
    }
    return next((flag for flag, given in alone.items() if given), "")


def _checkpoint(folder: Path, wanted: str) -> tuple[Path, str]:
    """(a checkpoint of the run in `folder`, in words which one it is)."""
    found = by_step(folder)
    if wanted == "best":
        return _best(folder, found)
    if wanted in ("", "last"):
        newest = next((path for path in reversed(found.values()) if is_whole(path)), None)
        if newest is None:
            what = f"--checkpoint {wanted}: " if wanted else "训练没有完成 the run is not finished, and "
            raise UserError(
                f"{folder}: {what}没有完整的检查点 has no whole checkpoint; train.py resumes an unfinished run"
            )
        return newest, "最近的完整检查点 the newest whole checkpoint"
    if int(wanted) not in found:
        raise UserError(f"--checkpoint {wanted}: {folder} 里没有 has none of that step; there are: {_listed(found)}")
    return found[int(wanted)], "所选的检查点 the checkpoint asked for"


def _best(folder: Path, found: dict[int, Path]) -> tuple[Path, str]:
    """The checkpoint among `found` with the lowest validation loss, the earliest of equal ones, and how low it is."""
    losses = _validation_losses(folder / "trainer_log.jsonl")
    scored = [step for step in losses if step in found]
    if not scored:
        raise UserError(
            f"--checkpoint best: {folder} 没有验证损失 has no checkpoint with a validation loss (train.py computes one "
            f"with --val_set_size above 0); give last, or a step: {_listed(found)}"
        )
    step, lowest = (min(steps, key=lambda step: losses[step]) for steps in (scored, losses))
    told = f"验证损失最低的检查点 the checkpoint of the lowest validation loss, {losses[step]:.4f}"
    if step != lowest:
        told += f", 第 {lowest} 步的已不在 that of step {lowest} ({losses[lowest]:.4f}) is gone"
    return found[step], told


def _validation_losses(log: Path) -> dict[int, float]:
    """{step: validation loss} of a run's log, those that are no numbers left out."""
    records = files.read_jsonl(log) if log.is_file() else []
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    return {step: loss for step, loss in losses.items() if math.isfinite(loss)}


def _listed(found: dict[int, Path]) -> str:
    return " ".join(map(str, found)) or "没有 none"
