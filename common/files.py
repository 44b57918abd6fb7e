"""Files that are whole or not there: JSON, JSON lines, and the hashes that tell them apart.

JSON lines: one object a line, UTF-8, lines ended by \\n alone (texts may hold other line separators).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.inputs import opened


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as JSON so that `path` is either the old file or the whole new one."""
    draft = Path(f"{path}.part")
    draft.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file, in order; a last line cut off by a kill is left out."""
    return list(stream_jsonl(path))


def stream_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_jsonl` returns, one object at a time."""
    with Path(path).open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file's content by `records`, which may be many: it is either the old file or the whole new one."""
    draft = Path(f"{path}.part")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(line_of, records))
    os.replace(draft, path)


def line_of(record: dict[str, Any]) -> str:
    """One line of a file, its end included."""
    text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def share_weights(folder: str | Path) -> None:
    """Let those read the weights just saved in `folder` who may read its config, as the umask says.

    safetensors writes its files for their owner alone, but a server is often another user.
    """
    mode = next(Path(folder).glob("*config.json")).stat().st_mode
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(mode)


def file_hash(path: str) -> str:
    """sha256 of a file's bytes, hex; UserError where it cannot be opened."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
