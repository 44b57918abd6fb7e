"""run_manifest.json: data, base, tokenizer, template and options of a run; what uses the run is compared with it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import distributed
from common.config import ROOT
from common.conversation import render
from common.data import cache
from common.errors import UserError
from common.model import loading, weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.data.dataset import TrainingData

AROUND = 12  # characters shown before and after a difference
MANIFEST = "run_manifest.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets")


def describe(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family, rows: TrainingData) -> dict[str, Any]:
    """The manifest of a run about to start: all that decides what it learns, and what `check_fits` compares later."""
    return {
        "state": "training",
        "config": knobs_of(cfg),
        "recipe": cfg.recipe,
        **matching(cfg.base, cfg.prompt_style, tokenizer, prompt),
        "data": rows.sources,
        "processes": distributed.describe(cfg),
        "counts": {"train": len(rows.train), "validation": len(rows.validation), "rejected": len(rows.rejected)},
        "versions": {n: importlib.metadata.version(n) for n in (*PACKAGES, *(["bitsandbytes"] if cfg.bits else []))},
        "git_commit": _git_commit(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def knobs_of(cfg: SFTConfig) -> dict[str, Any]:
    """A manifest's `config`: every knob with its value."""
    return {name: value for name, value in asdict(cfg).items() if name not in ("given", "recipe")}


def matching(base: str, style: str, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> dict[str, Any]:
    """The part of a manifest that its users must match: base (a path or hub id), tokenizer, template and stop ids."""
    template = render.template_text(tokenizer, prompt, style)
    return {
        "base": {"path": base, "sha256": loading.base_hash(base)},
        "tokenizer_sha256": cache.tokenizer_hash(tokenizer),
        "template": {"style": style, "text": template, "sha256": hashlib.sha256(template.encode()).hexdigest()},
        "stop_ids": prompt.stop_ids(tokenizer, style),
    }


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None where there is none; UserError where it is damaged."""
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    if not _is_whole(manifest):
        raise UserError(f"{file}: 文件损坏 is damaged; train again or restore it")
    return manifest


def _is_whole(manifest: object) -> bool:
    """Whether what was read is an object with the parts that all its users take from it."""
    if not isinstance(manifest, dict):
        return False
    base, config, template = (manifest.get(name, {}) for name in ("base", "config", "template"))
    return all(isinstance(part, dict) for part in (base, config, template)) and "path" in base


def check_fits(manifest: dict[str, Any], base: str, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> None:
    """UserError where base (a path), tokenizer or template are not what the run in `manifest` was trained with.

    A base whose files are damaged is told as that, not as another base.
    """
    weights.check_model(base)
    template = render.template_text(tokenizer, prompt, manifest["template"]["style"])
    base_now, ids_now = loading.base_hash(base), cache.tokenizer_hash(tokenizer)
    pairs = [
        ("基座模型 base model", manifest["base"]["sha256"], base_now, "give the base trained with"),
        ("分词器 tokenizer", manifest["tokenizer_sha256"], ids_now, "restore the base's tokenizer files"),
        ("提示模板 prompt template", manifest["template"]["text"], template, "restore prompt.py"),
    ]
    for what, trained, now, remedy in pairs:
        if trained != now:
            trained, now = differing_parts(trained, now)
            raise UserError(
                f"{what} 与训练时不同 is not the one trained with: trained {trained}, now {now}; "
                f"{remedy}, or train again"
            )


def differing_parts(trained: str, now: str) -> list[str]:
    """Where two texts differ, as two short quotations with a few characters around."""
    same = len(os.path.commonprefix([trained, now]))
    ends = len(os.path.commonprefix([trained[same:][::-1], now[same:][::-1]]))
    quoted = []
    for text in (trained, now):
        start, end = max(0, same - AROUND), len(text) - ends
        part = text[start : min(end + AROUND, start + 5 * AROUND)]
        quoted.append(f"{'…' if start else ''}{part!r}{'…' if start + len(part) < len(text) else ''}")
    return quoted


def _git_commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
