"""JSON lines: one object a line, UTF-8, lines ended by \\n alone (texts may hold other line separators)."""

import json
import os
from pathlib import Path


def read(path):
    """The objects of a file, in order; a last line cut off by a kill is left out."""
    return list(stream(path))


def stream(path):
    """Yield what `read` returns, one object at a time."""
    with Path(path).open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def write(path, records):
    """Replace the file's content by `records`, which may be many: it is either the old file or the whole new one."""
    draft = Path(f"{path}.part")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(line_of, records))
    os.replace(draft, path)


def line_of(record):
    """One line of a file, its end included."""
    text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()
