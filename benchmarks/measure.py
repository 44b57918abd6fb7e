"""What the benchmarks share: a fresh process's time and memory, the machine's name, a table."""

import configparser
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from datetime import date
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
VENVS = ROOT / ".venv-engines"  # where the environments are made of what cannot live beside the rest


def run(command, python=sys.executable, **environment):
    """(what the process printed last as JSON or None, seconds, peak MiB of it and its children) of a fresh process.

    Memory is the proportional set size, so that a page shared by several processes, or mapped from a file, counts once.
    A failed process raises SystemExit with what it printed.
    """
    started, peak = time.monotonic(), 0
    with subprocess.Popen(
        [python, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _python_path(), **environment},
    ) as process:
        lines = _read_in_background(process.stdout)
        while process.poll() is None:
            looked = time.monotonic()
            peak = max(peak, tree_memory(process.pid))
            time.sleep(max(0.2, 50 * (time.monotonic() - looked)))  # a look halts the process for as long as it takes
    seconds = time.monotonic() - started
    printed = "".join(lines())
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{printed[-4000:]}")
    return _last_json(printed), seconds, peak / MIB


def pinned(script):
    """{name: what pip installs for it}, of the file beside a benchmark that is called as it."""
    parser = configparser.ConfigParser(allow_no_value=True, delimiters=("\0",))
    parser.read(Path(script).with_suffix(".txt"))
    return {name: list(parser[name]) for name in parser.sections()}


def python_of(name, script, venvs):
    """The Python that has `name` as `pinned` says; its environment is made at the first time, or SystemExit."""
    python = venvs / name / "bin/python"
    if not python.exists():
        venv.create(venvs / name, with_pip=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned(script)[name]])
        if done.returncode:
            shutil.rmtree(venvs / name)
            raise SystemExit(f"{name}: pip could not install it")
    return str(python)


def tree_memory(pid):
    """Bytes (proportional set size) of a process and its children now."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        pass
    return total


def machine():
    """One line on the machine, the date and the packages that matter."""
    import torch
    import transformers

    memory = psutil.virtual_memory().total / (1 << 30)
    return (
        f"{date.today()}, {_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def table(header, rows):
    """A Markdown table as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _read_in_background(stream):
    from threading import Thread

    found = []
    reader = Thread(target=lambda: found.extend(stream), daemon=True)
    reader.start()

    def lines():
        reader.join()
        return found

    return lines


def _last_json(printed):
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def _python_path():
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()
