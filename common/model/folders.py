"""Whether a base is a model's folder at all, asked before anything of it is loaded; hub ids are left to the hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateSyntaxError, UndefinedError

from common.config import ROOT
from common.errors import UserError
from common.model.weights import CHOICES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.conversation.family import Family

WINDOWS = re.compile(r"^[A-Za-z]:[\\/]|\\")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
SHOWN = 5  # names of files in an error
# of pictures and sound: a tokenizer may have them where the model, of text alone, has no row for them
UNUSED = {"<image_soft_token>", "<audio_soft_token>"}


def check_folder(path: str | Path, enough: tuple[str, ...] = ("config.json",)) -> None:
    """UserError where `path` is neither a hub id nor a folder with one of the files `enough`, its JSON files whole."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return _check_hub_id(str(path), folder.is_file())
    if (folder / "adapter_config.json").is_file() and not any((folder / name).is_file() for name in CHOICES):
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "…"
        raise UserError(
            f"{path}: 是适配器，不是基座模型 is an adapter, not a base model: give its base, --path_model_pretrain "
            f"{base}; predict.py, evaluation.py, post_api.py and export.py take this folder as --model_save_dir"
        )
    if not any((folder / name).is_file() for name in enough):
        raise UserError(f"{path}: 没有 there is no config.json, so it is not a model's folder; {_way_out(folder)}")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)


def _check_hub_id(path: str, is_file: bool) -> None:
    if is_file:
        raise UserError(
            f"{path}: 是文件，不是文件夹 is a file, not a folder: --path_model_pretrain is the folder it is in"
        )
    if WINDOWS.search(path):
        raise UserError(
            f"{path}: 文件夹不存在 no such folder (a path of Windows; below WSL C:\\ is /mnt/c/); "
            "check --path_model_pretrain"
        )
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: 文件夹不存在 no such folder; check --path_model_pretrain")


def _way_out(folder: Path) -> str:
    """Where a model is in a folder that is none, or what is there instead."""
    below = [file.parent for pattern in ("*", "snapshots/*") for file in sorted(folder.glob(f"{pattern}/config.json"))]
    if below:
        return f"下面有 there is one below: --path_model_pretrain {below[0]}"
    names = sorted(file.name for file in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"那里有 it holds {', '.join(names[:SHOWN]) or 'nothing'}{more}; download the model's whole folder"


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; UserError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{file}: 不是 JSON is not JSON: {problem}; download the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: 不是 JSON 对象 is not a JSON object; download the file again")
    return found


def check_tokenizer(path: str | Path) -> None:
    """UserError where tokenizer.json in the folder `path` is not JSON, or not that of a tokenizer.

    For a tokenizer that could not be loaded: the file may be large, and another kind of tokenizer does not read it.
    """
    file = Path(path).expanduser() / "tokenizer.json"
    if not file.is_file():
        return
    found = read_object(file)
    parts = {"model": dict, "added_tokens": list}
    lacking = [name for name, kind in parts.items() if not isinstance(found.get(name), kind)]
    if lacking:
        raise UserError(
            f"{path}: 无法加载分词器 tokenizer cannot be loaded: {file}: 缺少或损坏 missing or damaged: "
            f"{', '.join(lacking)}; download the file again"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, path: str | Path) -> None:
    """UserError where the tokenizer of `path` has ids beyond the `rows` of the model's embedding."""
    if max(len(tokenizer), *tokenizer.added_tokens_decoder, 0) < rows:
        return
    beyond = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= rows and token not in UNUSED}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{path}: 分词器的编号超出词嵌入 the tokenizer has ids that the embedding lacks: {len(beyond)}, e.g. "
            f"{beyond[first]!r} is {first}, config.json says vocab_size {rows}: restore the tokenizer's files, or save "
            "the model after resize_token_embeddings"
        )


def check_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """UserError where the chat template in the folder `path` is no valid Jinja; what it refuses to show is its own."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except (TemplateSyntaxError, UndefinedError) as problem:
        line = f" in line {problem.lineno}" if isinstance(problem, TemplateSyntaxError) else ""
        raise UserError(
            f"{path}: 聊天模板有错 the chat template is broken{line}: {problem.message}; restore "
            "chat_template.jinja or tokenizer_config.json, or remove the template (the family's own is used then)"
        ) from None
    except Exception:  # raise_exception in a template, or an error of a tokenizer that has none
        return


def check_family(
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    config: dict[str, Any],
    prompt: Family,
    template: str | None = None,
) -> None:
    """UserError where the model of `path` is one for other recipes, or its tokenizer lacks a token of the template.

    config: what its config.json says; of a model type that no recipe names, or that speaks another template than its
    own family's, the tokenizer alone decides. tokenizer: None where it cannot be loaded. template: the chat template
    that the folder has itself.
    """
    kinds = _kinds_of(config, template)
    other = None if set(kinds) & {None, *prompt.MODEL_TYPES} else _family_of(kinds[0])
    if other and (tokenizer is None or not _lacking(tokenizer, other)):
        raise UserError(
            f"{path}: 是别的家族的模型 is a {config['model_type']} model, of another family: its recipes are in "
            f"{other.RECIPES}, such as python {other.RECIPES}/train.py"
        )
    if tokenizer is not None and (lacking := _lacking(tokenizer, prompt)):
        raise UserError(f"{path}: {lacking}; is it a model of this family?")


def _kinds_of(config: dict[str, Any], template: str | None) -> Sequence[str | None]:
    """What the model may be, as MODEL_TYPES name it, the likeliest first; None where config.json does not say.

    Where families share a `model_type`, the `kinds` of the one that has it as its name tells them apart.
    """
    model_type = config.get("model_type")
    tell = getattr(_family_of(model_type), "kinds", None)
    return tell(config, template) if tell else (model_type,)


def _family_of(model_type: str | None) -> Family | None:
    """The prompt module of this project that names `model_type`, found by its place; None where none does."""
    for file in sorted(ROOT.glob("*_sft/prompt*.py")):
        module: Any = importlib.import_module(f"{file.parent.name}.{file.stem}")
        if model_type in module.MODEL_TYPES:
            return module
    return None


def _lacking(tokenizer: PreTrainedTokenizerBase, prompt: Family) -> str:
    """Why the tokenizer cannot render the family's template, or ""."""
    try:
        prompt.stop_ids(tokenizer, "chat")
    except ValueError as problem:
        return str(problem)
    return ""
