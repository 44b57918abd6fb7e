"""Checkpoints that are whole: their files are what was written."""

import json
import re
import shutil
from pathlib import Path

from common.files import file_hash, write_json

WHOLE = "whole.json"
NAME = re.compile(r"checkpoint-(\d+)")


def mark_whole(checkpoint: str | Path) -> None:
    """Record the sha256 of a checkpoint's files: one without this record was cut off while being written."""
    write_json(Path(checkpoint) / WHOLE, _hashes(checkpoint))


def step_of(folder: str | Path) -> int | None:
    """The step of a checkpoint's folder, None where its name is not checkpoint-N."""
    name = NAME.fullmatch(Path(folder).name)
    return int(name[1]) if name else None


def by_step(folder: str | Path) -> dict[int, Path]:
    """{step: checkpoint} of a run's folder, whole or not, the oldest first."""
    found = [(step_of(path), path) for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    return dict(sorted((step, path) for step, path in found if step is not None))


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint whose files are what was written, or None; those cut off or damaged are removed."""
    for checkpoint in reversed(by_step(folder).values()):
        if is_whole(checkpoint):
            return checkpoint
        print(f"删除不完整的检查点 removing a checkpoint that was cut off or damaged: {checkpoint}")
        shutil.rmtree(checkpoint)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has the record of its files, and they are what it says."""
    try:
        written, found = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8")), _hashes(checkpoint)
    except (OSError, ValueError):
        return False
    return all(found.get(name) == value for name, value in written.items())


def _hashes(checkpoint: str | Path) -> dict[str, str]:
    """{file: sha256 in hex} of a checkpoint's files, those in its folders too, the record of them left out."""
    files = sorted(file for file in Path(checkpoint).rglob("*") if file.is_file())
    relative = {file.relative_to(checkpoint).as_posix(): file for file in files}
    return {name: file_hash(str(file)) for name, file in relative.items() if not name.startswith(WHOLE)}
