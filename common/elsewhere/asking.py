"""Another engine asked about a folder of safetensors, in a process of its own, where its fault ends nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

CHILD = Path(__file__).with_name("engine_child.py")
LLAMA_SERVER = Path(__file__).with_name("llama_server.py")
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
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        words = [python, str(CHILD), engine, str(folder), scratch]
        try:
            done = subprocess.run(
                words, input=json.dumps(questions._asdict()), capture_output=True, encoding="utf-8", errors="replace"
            )
        except OSError as problem:
            raise UserError(f"{engine}: {python} 不能运行 cannot be run: {problem.strerror}; {REMEDY}") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise UserError(f"{engine} 不能回答 cannot answer from {folder}: {said[-1][:300]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"versions"')]  # an engine may print too
    if not lines:
        raise UserError(f"{engine}: {python} 没有回答 gave no answer, is it a Python? {REMEDY}")
    return Found(**json.loads(lines[-1]))
