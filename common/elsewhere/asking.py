"""Another engine asked about a folder of safetensors, in a process of its own, where its fault ends nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

CHILD = Path(__file__).with_name("engine_child.py")
LLAMA_SERVER = Path(__file__).with_name("llama_server.py")
LIMIT, BYTES_A_SECOND = 600.0, 2e6  # seconds to answer in, and how many bytes of weights give it another
REMEDY = "给出装有该引擎的 Python give the Python that has the engine"


class Engine(NamedTuple):
    """The modules by which an engine is found, and how pip installs it."""

    modules: tuple[str, ...]
    pip: str


ENGINES = {
    "mlx": Engine(("mlx", "mlx_lm"), "mlx-lm"),
    "ctranslate2": Engine(("ctranslate2",), "ctranslate2"),
    "onnx": Engine(("onnxruntime_genai", "onnx_ir"), "onnxruntime-genai onnxruntime onnx_ir"),
    "openvino": Engine(("openvino_genai", "optimum.intel"), "openvino-genai optimum-intel"),
    "keras": Engine(("keras_hub", "jax"), "keras-hub jax"),
}


class Found(NamedTuple):
    """What an engine answers."""

    versions: dict[str, str]  # of its packages
    prompts: list[list[int] | None]  # its ids of the messages; None: it has no chat template, or was given no messages
    answers: list[list[int]]  # greedy ids, up to the first stop id, that one included
    seconds: float  # of all answers; loading and what is prepared at the first is not in it


class Questions(NamedTuple):
    """What an engine is asked."""

    prompts: Sequence[Sequence[int]]
    messages: Sequence[Sequence[dict[str, str]] | None]  # from which each prompt was made; None: not to be compared
    stop_ids: Sequence[int]
    new_tokens: int
    threads: int


def check_installed(engine: str) -> None:
    """UserError with the remedy where a package of `engine`, one of ENGINES, is not there."""
    needed = ENGINES[engine]
    if not all(map(_is_there, needed.modules)):
        raise UserError(f"--verify {engine} 没有安装 is not installed: pip install {needed.pip}")


def _is_there(module: str) -> bool:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return False
    return package == module or importlib.util.find_spec(module) is not None


def ask(engine: str, folder: Path, questions: Questions, python: str = sys.executable) -> Found:
    """What `engine` makes of the model in `folder`, in float32; UserError with its last line where it fails.

    python: an interpreter that has the engine. An engine that has a format of its own gets it in a temporary folder.
    UserError too where it does not answer within `limit_for` the folder.
    """
    limit = limit_for(sum(file.stat().st_size for file in folder.iterdir()))
    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        words = [python, str(CHILD), engine, str(folder), scratch]
        try:
            code, out, said = _run(words, json.dumps(questions._asdict()), limit)
        except OSError as problem:
            raise UserError(f"{engine}: {python} 不能运行 cannot be run: {problem.strerror}; {REMEDY}") from None
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{engine}: {limit:.0f} 秒后仍没有回答 still has no answer from {folder} after {limit:.0f} s, and was "
                "stopped; ask another engine, or try again with fewer processes beside it"
            ) from None
    if code:
        lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
        raise UserError(f"{engine} 不能回答 cannot answer from {folder}: {lines[-1][:300]}")
    lines = [line for line in out.splitlines() if line.startswith('{"versions"')]  # an engine may print too
    if not lines:
        raise UserError(f"{engine}: {python} 没有回答 gave no answer, is it a Python? {REMEDY}")
    return Found(**json.loads(lines[-1]))


def limit_for(size: int) -> float:
    """Seconds within which an engine has to answer about weights of so many bytes: many more than it needs."""
    return LIMIT + size / BYTES_A_SECOND


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that was started in a session of its own, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows
            process.kill()
    process.wait()


def _run(words: Sequence[str], given: str, limit: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command; TimeoutExpired after `limit` seconds. It is ended in any case."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", start_new_session=True
    ) as process:
        try:
            out, said = process.communicate(given, timeout=limit)
        finally:
            stop(process)
    return process.returncode, out, said
