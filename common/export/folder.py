"""Where an export goes, and how it is written: beside its place, read back and compared, and only then put there."""

from __future__ import annotations

import copy
import importlib.util
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
from common.export import merging, older, proof
from common.export.proof import say
from common.inference.remote import LONGEST
from common.model.layers import causal_of
from common.model.loading import load_whole, pad_id_of
from common.runs.checkpoints import step_of
from common.runs.places import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.config import ExportFlags, SFTConfig
    from common.conversation.family import Family
    from common.export.proof import Expected, Tuned

SHARD = "5GB"
ENDINGS = {"safetensors": "merged", "gguf": "gguf", "gguf-lora": "lora_gguf"}  # of the folder, by --format

WRITTEN = {
    "safetensors": "完整模型 whole model",
    "gguf": "完整模型的文件 whole model as a file",
    "gguf-lora": "适配器的文件 adapter as a file",
}


def new_folder(cfg: SFTConfig, flags: ExportFlags) -> Path:
    """Where the export goes; UserError where something is there already, or flags do not go together."""
    _check_flags(cfg, flags)
    folder = place_of(cfg.model_save_dir, flags.output_dir, flags.format)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: 已经存在 already exists and is not overwritten; give another --output_dir")
    check_writable(folder.parent, "output_dir")
    return folder


def place_of(run: str, output_dir: str, kind: str) -> Path:
    """The folder `output_dir`, or where an export of the `run` in --format `kind` goes unless it is given."""
    exported = Path(run)
    if step_of(exported) is not None:  # not among the checkpoints, but beside the run
        exported = exported.parent.with_name(f"{exported.parent.name}_{exported.name}")
    return Path(output_dir or f"{exported}_{ENDINGS[kind]}")


def write(
    whole: PreTrainedModel, expected: Expected, folder: Path, cfg: SFTConfig, flags: ExportFlags, prompt: Family
) -> None:
    """Write `whole` as --format says, read it back, compare it, and only then put it in place at `folder`.

    UserError where what was read back answers otherwise; nothing is left then.
    """
    record = {"run": cfg.model_save_dir, "base": expected.tuned.manifest["base"]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / folder.name
        if flags.format == "safetensors":
            kind = str(_dtype(cfg, expected.tuned.manifest))
            verdict = _write_safetensors(whole, expected, draft, folder, cfg, prompt)
        else:
            kind, draft = gguf_type(flags), _empty(draft)
            say(f"写入 writing: {folder / folder.name}.gguf, in {kind}")
            verdict = _write_gguf(whole, expected, draft, cfg, flags, prompt)
        files.write_json(draft / "export.json", record | {"dtype": kind, "check": verdict})
        os.rename(draft, folder)
    print(f"读回 read back: {verdict}")
    print(f"完成 done: {WRITTEN[flags.format]} ({kind.removeprefix('torch.')}) in {folder}")


def gguf_type(flags: ExportFlags) -> str:
    """--gguf_type, or what it stands for: an adapter is small, and kept whole."""
    auto = "f32" if flags.format == "gguf-lora" else "f16"
    return auto if flags.gguf_type == "auto" else flags.gguf_type


def check_format(tuned: Tuned, cfg: SFTConfig, flags: ExportFlags, prompt: Family) -> None:
    """UserError where the model cannot be written as --format says; asked before anything is computed."""
    if flags.format == "safetensors":
        return
    from common.export import gguf_adapter, gguf_file

    causal = causal_of(tuned.net)
    config = copy.copy(causal.config)
    config.tie_word_embeddings = config.tie_word_embeddings and not merging.unties(causal)
    if flags.format == "gguf":
        return gguf_file.check_all(config, tuned, prompt)
    gguf_adapter.check(tuned, Path(cfg.model_save_dir), gguf_file.check(config, prompt))


def _check_flags(cfg: SFTConfig, flags: ExportFlags) -> None:
    """UserError where a flag would do nothing, or the package for GGUF is not there."""
    if flags.format == "safetensors":
        if flags.gguf_type != "auto":
            raise UserError(f"--gguf_type {flags.gguf_type} 只用于 belongs to --format gguf; add that, or leave it out")
        return
    if "dtype" in cfg.given:
        raise UserError(f"--dtype 对 --format {flags.format} 不起作用 has no effect with it; use --gguf_type")
    if flags.format == "gguf-lora" and flags.gguf_type == "q8_0":
        raise UserError("--gguf_type q8_0: 适配器不能 not of an adapter, whose rows are too short; use f16 or f32")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f'--format {flags.format} 需要 needs gguf: pip install "gguf>=0.19,<0.20"')


def _write_gguf(
    whole: PreTrainedModel, expected: Expected, draft: Path, cfg: SFTConfig, flags: ExportFlags, prompt: Family
) -> str:
    """The GGUF file of the model or the adapter, with what goes beside it; the verdict in words."""
    from common.export import gguf_adapter, gguf_file, llama_cpp

    tuned, file, kind = expected.tuned, draft / f"{draft.name}.gguf", gguf_type(flags)
    _set_template(tuned, prompt)
    if flags.format == "gguf-lora":
        if tuned.tokenizer.chat_template:
            (draft / older.TEMPLATE).write_text(tuned.tokenizer.chat_template, encoding="utf-8")
        return gguf_adapter.write(tuned, Path(cfg.model_save_dir), file, kind, prompt)
    verdict = gguf_file.write(whole, expected, file, kind, prompt)
    write_modelfile(draft, tuned, prompt)
    if not llama_cpp.installed():
        return f"{verdict}; 没有问 llama.cpp was not asked: pip install {llama_cpp.PACKAGE}"
    say("提问 asking: llama.cpp")
    return f"{verdict}; llama.cpp: {llama_cpp.prove(file, expected, proof.TOLERANCE[gguf_file.DTYPES[kind]])}"


def _write_safetensors(
    whole: PreTrainedModel, expected: Expected, draft: Path, folder: Path, cfg: SFTConfig, prompt: Family
) -> str:
    """The folder that transformers loads, reloaded and compared; the verdict in words."""
    dtype = _dtype(cfg, expected.tuned.manifest)
    say(f"写入 writing: {folder}, in {str(dtype).removeprefix('torch.')}")
    save(whole.to(dtype), expected.tuned, draft, prompt)
    say("重新加载 reloading: 与训练后的模型比较 and comparing with the tuned model")
    reloaded = load_whole(draft, dtype=dtype).to(device()).eval()
    reloaded.generation_config = GenerationConfig()  # as for the model it is compared with
    return proof.compare(reloaded, expected, dtype)


def save(net: PreTrainedModel, tuned: Tuned, draft: Path, prompt: Family) -> None:
    """Weights, config, generation config, tokenizer with the run's chat template, and the Modelfile, into `draft`.

    What older readers need is there too: see `older`.
    """
    tokenizer, penalty = tuned.tokenizer, tuned.penalty
    net.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tuned.stop_ids,
        pad_token_id=pad_id_of(tokenizer, tuned.stop_ids[0]),
        repetition_penalty=penalty if penalty != 1 else None,
    )
    net.save_pretrained(draft, max_shard_size=SHARD)
    files.share_weights(draft)
    _set_template(tuned, prompt)
    tokenizer.save_pretrained(draft)
    older.add_rope(draft)
    older.add_template(draft)
    older.add_pieces(draft, tuned.manifest["base"]["path"], tokenizer)
    write_modelfile(draft, tuned, prompt)


def _set_template(tuned: Tuned, prompt: Family) -> None:
    """Give the tokenizer the chat template of the run's style; a line says where none can express it."""
    style = tuned.manifest["template"]["style"]
    tuned.tokenizer.chat_template = templates.chat_template(tuned.tokenizer, prompt, style)
    if tuned.tokenizer.chat_template is None:
        print(f"没有聊天模板 no chat template is written: none can express prompt_style {style}")


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def write_modelfile(draft: Path, tuned: Tuned, prompt: Family) -> None:
    """Ollama's Modelfile, which wants the model as NAME.gguf beside it, where the family's models run there."""
    if not any("ollama" in engines for engines in prompt.ENGINES.values()):
        return
    style = tuned.manifest["template"]["style"]
    text = templates.modelfile(tuned.tokenizer, prompt, style, f"./{draft.name}.gguf")
    if text:
        text += f"PARAMETER repeat_penalty {tuned.penalty}\n"  # also 1: Ollama has another one of its own
        text += f"PARAMETER repeat_last_n {LONGEST}\n" * (tuned.penalty != 1)  # else of the last 64 ids only
        (draft / "Modelfile").write_text(text, encoding="utf-8")


def _dtype(cfg: SFTConfig, manifest: dict[str, Any]) -> torch.dtype:
    """The torch dtype to write: --dtype, or that of the base model's own files."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    return AutoConfig.from_pretrained(manifest["base"]["path"]).dtype or torch.float32
