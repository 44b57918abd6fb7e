"""A folder exported by an earlier version, mended: what older readers need is put into it, its weights stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from common.errors import UserError
from common.export import older
from common.model.folders import check_folder, read_object

if TYPE_CHECKING:
    from common.config import ExportFlags, SFTConfig
    from common.conversation.family import Family


def mend(cfg: SFTConfig, flags: ExportFlags, prompt: Family) -> None:
    """Write into the folder --repair what `older` names and it lacks, and print each thing mended or not to be mended.

    UserError where it is no export, where another flag goes with it, or where something cannot be mended; what can
    is mended then too.
    """
    others = [f"--{name}" for name in ("output_dir", "verify", "checkpoint") if getattr(flags, name)]
    others += ["--format"] * (flags.format != "safetensors") + [f"--{name}" for name in sorted(cfg.given)]
    if others:
        raise UserError(
            f"--repair 与 {others[0]} 不能同用 cannot go together: it mends the folder it names; leave it out"
        )
    folder = Path(flags.repair)
    if not folder.is_dir():
        raise UserError(f"--repair {folder}: 文件夹不存在 no such folder")
    check_folder(folder)
    if not (folder / "export.json").is_file():
        raise UserError(f"--repair {folder}: 不是导出的文件夹 is no exported folder: it has no export.json")
    mended = [f"{older.CONFIG}: {name}" for name in older.add_rope(folder)]
    mended += [f"{name}: chat_template" for name in older.add_template(folder)]
    had, lacking = (folder / older.PIECES).is_file(), _lacking(folder, prompt)
    mended += [older.PIECES] * (not had and (folder / older.PIECES).is_file()) + _mend_modelfile(folder)
    for one in mended:
        print(f"  已补 mended: {one}")
    for one in lacking:
        print(f"  不能补 cannot be mended: {one}")
    print(f"{folder}: " + (f"已补 {len(mended)} 处 mended" if mended else "没有可补的 nothing to mend"))


def _lacking(folder: Path, prompt: Family) -> list[str]:
    """What the folder lacks and cannot be given, after tokenizer.model is copied where its base has it."""
    base = read_object(folder / "export.json").get("base") or {}
    path = base.get("path", "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lacking = [] if tokenizer.chat_template else [f"{older.TEMPLATE}: 两处都没有 it is in neither place; export again"]
    why = older.add_pieces(folder, path, tokenizer) if path else "export.json 没有记下基座 names no base"
    engines = prompt.ENGINES.get(read_object(folder / older.CONFIG).get("model_type", ""), {})
    needing = ", ".join(engine for engine, needed in engines.items() if needed == older.PIECES)
    return [*lacking, *([f"{older.PIECES} ({needing}): {why}"] if why and needing else [])]


def _mend_modelfile(folder: Path) -> list[str]:
    """Let a Modelfile name the file to be made beside it: Ollama's own converter reads the folder wrongly."""
    file = folder / "Modelfile"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    new = re.sub(r"\AFROM \.\n", f"FROM ./{folder.name}.gguf\n", text)
    if new == text:
        return []
    file.write_text(new, encoding="utf-8")
    return [f"Modelfile: FROM ./{folder.name}.gguf"]
