"""Where an export goes, and how it is written: beside its place, reloaded and compared, and only then put there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from common import files
from common.conversation import templates
from common.device import device
from common.errors import UserError
from common.export import older, proof
from common.export.proof import say
from common.model.loading import load_whole, pad_id_of
from common.runs.checkpoints import step_of
from common.runs.places import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.config import ExportFlags, SFTConfig
    from common.conversation.family import Family
    from common.export.proof import Expected, Tuned

SHARD = "5GB"


def new_folder(cfg: SFTConfig, flags: ExportFlags) -> Path:
    """Where the model goes; UserError where something is there already, or nothing can be written there."""
    exported = Path(cfg.model_save_dir)
    if step_of(exported) is not None:  # not among the checkpoints, but beside the run
        exported = exported.parent.with_name(f"{exported.parent.name}_{exported.name}")
    folder = Path(flags.output_dir or f"{exported}_merged")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: 已经存在 already exists and is not overwritten; give another --output_dir")
    check_writable(folder.parent, "output_dir")
    return folder


def write(whole: PreTrainedModel, expected: Expected, folder: Path, cfg: SFTConfig, prompt: Family) -> None:
    """Write `whole` in the dtype asked for, reload it, compare it, and only then put it in place at `folder`.

    UserError where the reloaded model answers otherwise; nothing is left then.
    """
    tuned, dtype = expected.tuned, _dtype(cfg, expected.tuned.manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / folder.name
        say(f"写入 writing: {folder}, in {str(dtype).removeprefix('torch.')}")
        save(whole.to(dtype), tuned, draft, prompt)
        say("重新加载 reloading: 与训练后的模型比较 and comparing with the tuned model")
        reloaded = load_whole(draft, dtype=dtype).to(device()).eval()
        reloaded.generation_config = GenerationConfig()  # as for the model it is compared with
        verdict = proof.compare(reloaded, expected, dtype)
        record = {"run": cfg.model_save_dir, "base": tuned.manifest["base"], "dtype": str(dtype), "check": verdict}
        files.write_json(draft / "export.json", record)
        os.rename(draft, folder)
    print(f"重新加载 reloaded: {verdict}")
    print(f"完成 done: 完整模型 whole model ({str(dtype).removeprefix('torch.')}) in {folder}")


def save(net: PreTrainedModel, tuned: Tuned, draft: Path, prompt: Family) -> None:
    """Weights, config, generation config, tokenizer with the run's chat template, and the Modelfile, into `draft`.

    What older readers need is there too: see `older`.
    """
    tokenizer, style = tuned.tokenizer, tuned.manifest["template"]["style"]
    net.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tuned.stop_ids,
        pad_token_id=pad_id_of(tokenizer, tuned.stop_ids[0]),
        **_penalty(tuned.manifest),
    )
    net.save_pretrained(draft, max_shard_size=SHARD)
    files.share_weights(draft)
    tokenizer.chat_template = templates.chat_template(tokenizer, prompt, style)
    if tokenizer.chat_template is None:
        print(f"没有聊天模板 no chat template is written: none can express prompt_style {style}")
    tokenizer.save_pretrained(draft)
    older.add_rope(draft)
    older.add_template(draft)
    older.add_pieces(draft, tuned.manifest["base"]["path"], tokenizer)
    write_modelfile(draft, tuned, prompt)


def write_modelfile(draft: Path, tuned: Tuned, prompt: Family) -> None:
    """Ollama's Modelfile, which wants the model as NAME.gguf beside it, where the family's models run there."""
    if not any("ollama" in engines for engines in prompt.ENGINES.values()):
        return
    style = tuned.manifest["template"]["style"]
    text = templates.modelfile(tuned.tokenizer, prompt, style, f"./{draft.name}.gguf")
    if text:
        (draft / "Modelfile").write_text(text, encoding="utf-8")


def _penalty(manifest: dict[str, Any]) -> dict[str, float]:
    """The run's own repetition penalty, as a GenerationConfig takes it; {} for none."""
    penalty = manifest["config"].get("repetition_penalty", 1.0)
    return {"repetition_penalty": penalty} if penalty != 1 else {}


def _dtype(cfg: SFTConfig, manifest: dict[str, Any]) -> torch.dtype:
    """The torch dtype to write: --dtype, or that of the base model's own files."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    return AutoConfig.from_pretrained(manifest["base"]["path"]).dtype or torch.float32
