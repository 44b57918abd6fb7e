"""JSON lines: one object a line, UTF-8, lines ended by \\n alone (texts may hold other line separators)."""

import json
import os
from pathlib import Path


def read(path):
    """The objects of a file, in order; a last line cut off by a kill is left out."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def write(path, records):
    """Replace the file's content by `records`: it is either the old file or the whole new one."""
    draft = Path(f"{path}.part")
    draft.write_text("".join(map(line_of, records)), encoding="utf-8", newline="\n")
    os.replace(draft, path)


def line_of(record):
    """One line of a file, its end included."""
    text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()
