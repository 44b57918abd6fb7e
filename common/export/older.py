"""What readers older than transformers 5 look for in a folder, beside what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from common.errors import UserError
from common.files import write_json

CONFIG, TOKENIZER, SENTENCEPIECE = "config.json", "tokenizer_config.json", "tokenizer.model"


def repair(folder: str) -> None:
    """Complete a folder that export.py wrote earlier, and say what was added; UserError where it is none of those."""
    place = Path(folder)
    try:
        base = json.loads((place / "export.json").read_text(encoding="utf-8"))["base"]["path"]
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(f"{folder}: 不是 export.py 写的 not a folder of export.py, it has no export.json") from problem
    added = complete(place, base)
    print(f"{folder}: 补上 added {', '.join(added)}" if added else f"{folder}: 不缺什么 nothing is missing")
    if not (place / SENTENCEPIECE).exists():
        print(f"  没有 no {SENTENCEPIECE}: 基座没有，或词表不同 the base {base} has none, or another vocabulary")


def complete(folder: Path, base: str) -> list[str]:
    """Add to the folder what older readers look for, and tell what was missing.

    Keys of the rotary embedding and of the layers' pattern in config.json, the chat template in tokenizer_config.json,
    and tokenizer.model of the base model (a folder or hub id), where it has one for the same vocabulary.
    """
    added = _add_keys(folder / CONFIG, older_keys(json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
    template = folder / "chat_template.jinja"
    if template.exists():
        added += _add_keys(folder / TOKENIZER, {"chat_template": template.read_text(encoding="utf-8")})
    source = _sentencepiece_of(base)
    if source and not (folder / SENTENCEPIECE).exists() and _same_vocabulary(folder, base):
        shutil.copyfile(source, folder / SENTENCEPIECE)
        added.append(SENTENCEPIECE)
    return added


def older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys at the top of a config.json that say what `rope_parameters` and `layer_types` say.

    rope_theta, rope_scaling (where it is not the default one), rope_local_base_freq of the layers that see a window,
    sliding_window_pattern (each n-th layer sees all) where the pattern is regular.
    """
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    keys = {"rope_theta": full["rope_theta"]} if "rope_theta" in full else {}
    if full.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {name: value for name, value in full.items() if name != "rope_theta"}
    if "sliding_attention" in rope:
        keys["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        layers = config["layer_types"]
        every = layers.index("full_attention") + 1 if "full_attention" in layers else 0
        if every and all((kind == "full_attention") == (n % every == 0) for n, kind in enumerate(layers, 1)):
            keys["sliding_window_pattern"] = every
    return keys


def _add_keys(path: Path, keys: dict[str, Any]) -> list[str]:
    """Add to a JSON file the keys that it lacks, and tell them as file:key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in keys if content.get(name) is None]
    if missing:
        write_json(path, content | {name: keys[name] for name in missing})
    return [f"{path.name}:{name}" for name in missing]


def _sentencepiece_of(base: str) -> str | None:
    """The path of a checkpoint's tokenizer.model, or None; nothing is downloaded but it."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    return cached_file(base, SENTENCEPIECE, **quiet)


def _same_vocabulary(folder: Path, base: str) -> bool:
    return AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
