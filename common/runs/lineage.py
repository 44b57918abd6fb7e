"""A run that starts from an adapter: what it takes over, and where that came from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed, files
from common.config import LORA, SFTConfig
from common.errors import UserError
from common.knobs import DORA_8, NO_THOUGHT
from common.model import loading
from common.model.adapter import config_of, modules_of
from common.model.weights import adapter_file, check_adapter
from common.runs import adopted
from common.runs.chosen import chosen_folder
from common.runs.manifest import check_fits

if TYPE_CHECKING:
    from common.config import TrainFlags
    from common.conversation.family import Family

SHAPE = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}  # ours: peft's
MODULES = ("target_modules", "modules_to_save")  # which are the same is known once the base is there
HABITS = ("tuning", "quantization_bit", "prompt_style", "thinking")  # of the earlier run, where the user sets none
FLAG = "--adapter_name_or_path"

Config = TypeVar("Config", bound=SFTConfig)  # a family's


def inherit(cfg: Config, flags: TrainFlags) -> tuple[Config, Path | None]:
    """(`cfg` with what the adapter of --adapter_name_or_path decides, its folder); (`cfg`, None) without that flag.

    Rank, scale, variant and modules are the adapter's own; tuning, prompt style and thinking are those of its run where
    the user set none. UserError where the user asks for another rank, scale or variant, where the base is another one,
    or where there is no LoRA adapter to start from.
    """
    if not flags.adapter_name_or_path:
        return cfg, None
    _check_asked(cfg, flags.adapter_name_or_path)
    folder = Path(distributed.share(distributed.first(lambda: str(_found(flags.adapter_name_or_path)))))
    manifest = adopted.find_manifest(folder)
    _check_base(cfg, folder, manifest)
    taken = _taken(cfg, folder, manifest)
    if taken["use_dora"] and replace(cfg, **taken).bits == 8:
        raise UserError(f"{FLAG} {folder}: {DORA_8}")
    style = taken.get("prompt_style", cfg.prompt_style)
    if taken.get("thinking", cfg.thinking) == "keep" and style != "chat":
        raise UserError(f"{FLAG} {folder}: {NO_THOUGHT.format(style)}")
    words = {knob: " ".join(value) if isinstance(value, tuple) else value for knob, value in taken.items()}
    told = ", ".join(f"{knob} {value}" for knob, value in words.items() if value)
    print(f"起点 start: {folder}: {told}", file=sys.stderr if flags.json else sys.stdout)
    return replace(cfg, **taken), folder


def generations(parent: Path, base: str, prompt: Family) -> list[dict[str, Any]]:
    """The manifest's `lineage`: [{folder, sha256 of the adapter, data as in a manifest}], the one in `parent` last.

    UserError where base, tokenizer or template are not those that the run in `parent` was trained with.
    """
    manifest = adopted.find_manifest(parent) or {}
    if manifest:
        mode = manifest["config"].get("thinking", "auto")  # the new run's may be another
        check_fits(manifest, base, loading.load_tokenizer(base, prompt, mode), prompt)
    own = {
        "folder": str(parent),
        "sha256": files.file_hash(str(adapter_file(parent))),
        "data": manifest.get("data", []),
    }
    return [*manifest.get("lineage", []), own]


def _check_asked(cfg: SFTConfig, folder: str) -> None:
    """UserError where the flag does not go with the others."""
    if cfg.tuning not in LORA:
        raise UserError(
            f"{FLAG} 与 --tuning {cfg.tuning} 不能同用 cannot go together: an adapter is trained on as lora or qlora; "
            "export.py merges it into a base, which can be tuned otherwise"
        )
    if cfg.use_pissa:
        raise UserError(f"{FLAG} 与 --use_pissa 不能同用 cannot go together: each of them says where LoRA starts")
    if Path(folder).resolve().is_relative_to(Path(cfg.model_save_dir).resolve()):
        raise UserError(
            f"{FLAG} {folder}: 就在 is in --model_save_dir, where the new run is written; give another --model_save_dir"
        )


def _found(given: str) -> Path:
    """The folder of the adapter that `given` means, which is there and whole; UserError where it is none."""
    if not Path(given).is_dir():
        raise UserError(f"{given}: 文件夹不存在 no such folder; check {FLAG}")
    folder = chosen_folder(given)
    manifest = adopted.find_manifest(folder)
    if manifest and manifest["config"].get("tuning", "lora") not in LORA:
        raise UserError(f"{folder}: 完整模型 a whole model, not an adapter; give it as --path_model_pretrain")
    check_adapter(folder)
    if manifest:
        adopted.accept(folder, manifest)
    else:
        adopted.refuse_split(folder)
    return folder


def _check_base(cfg: SFTConfig, folder: Path, manifest: dict[str, Any] | None) -> None:
    """UserError where this run's base is not the adapter's; that of another tool may be any base the user gives."""
    if manifest is None:
        theirs = adopted.adapter_base(folder) or "…"
        if theirs == cfg.base or "path_model_pretrain" in cfg.given:
            return
    else:
        theirs, digest = manifest["base"]["path"], manifest["base"]["sha256"]
        if loading.base_hash(cfg.base) == digest and (digest or theirs == cfg.base):
            return
        if theirs == cfg.base:
            raise UserError(
                f"{FLAG} {folder}: 基座的文件变了 the files of its base {theirs} have changed; restore them"
            )
    raise UserError(
        f"{FLAG} {folder}: 基座不同 its base is {theirs}, this run's is {cfg.base}; give --path_model_pretrain {theirs}"
    )


def _taken(cfg: SFTConfig, folder: Path, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """{knob: the adapter's value, or its run's where the user set none}; UserError where the user set another shape."""
    config = config_of(folder)
    taken = {knob: getattr(config, name) for knob, name in SHAPE.items()}
    for knob, value in taken.items():
        if knob in cfg.given and getattr(cfg, knob) != value:
            raise UserError(
                f"--{knob} {getattr(cfg, knob)}: 适配器的是 the adapter in {folder} has {value}; leave the flag out, "
                f"or train without {FLAG}"
            )
    for knob in (knob for knob in MODULES if knob not in cfg.given):
        taken[knob] = modules_of(config, knob)
    theirs = manifest["config"] if manifest else {}
    habits = [knob for knob in HABITS if knob in theirs and knob not in cfg.given]
    return taken | {knob: theirs[knob] for knob in habits if knob != "quantization_bit" or theirs["tuning"] == "qlora"}
