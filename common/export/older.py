"""What readers older than transformers 5 need in a model's folder, beside what it writes.

Found by running them: mlx-lm 0.32 and Ollama's converter take a theta of their own where config.json has only
`rope_parameters`; some read the chat template from tokenizer_config.json alone; keras-hub and llama.cpp's converter
want tokenizer.model of some families.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig
from transformers.utils import cached_file

from common import files
from common.errors import UserError
from common.model.folders import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, TOKENIZER, TEMPLATE, PIECES = (
    "config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
)
SCALINGS = ("linear", "dynamic", "yarn", "longrope", "llama3")  # kinds of `rope_scaling` that older readers know


def add_rope(folder: Path) -> list[str]:
    """Write into config.json what `rope_parameters` says by its older names too; the names that were not there.

    UserError where transformers would read other positions from it than before; the file is then as it was.
    """
    config = read_object(folder / CONFIG)
    new = {name: value for name, value in older_names(config).items() if config.get(name) != value}
    if not new:
        return []
    before = _positions(folder)
    files.write_json(folder / CONFIG, config | new)
    if _positions(folder) != before:
        files.write_json(folder / CONFIG, config)
        raise UserError(f"{folder / CONFIG}: 位置编码会改变 its positions would change with {', '.join(new)}")
    return list(new)


def older_names(config: dict[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` of a config.json says, under the names that were used before transformers 5."""
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    if "rope_theta" not in whole:
        return {}
    scaling = {name: value for name, value in whole.items() if name != "rope_theta"}
    found = {"rope_theta": whole["rope_theta"]}
    if "partial_rotary_factor" in scaling:
        found["partial_rotary_factor"] = scaling["partial_rotary_factor"]
    if scaling.get("rope_type") in SCALINGS:
        found["rope_scaling"] = scaling
    if "sliding_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        if period := sliding_period(config):
            found["sliding_window_pattern"] = period
    return found


def sliding_period(config: dict[str, Any], other: str = "sliding_attention") -> int:
    """n where every n-th layer sees the whole text and the others are `other`; 0 where `layer_types` are otherwise."""
    kinds = config.get("layer_types") or []
    windows = [kind == other for kind in kinds]
    for period in range(2, len(kinds) + 2):
        if windows == [bool((number + 1) % period) for number in range(len(kinds))]:
            return period
    return 0


def add_template(folder: Path) -> list[str]:
    """Write the chat template to each of its two places, from the one where it is; the names of files written."""
    file, config = folder / TEMPLATE, read_object(folder / TOKENIZER)
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not template:
        return []
    written = []
    if not file.is_file():
        file.write_text(template, encoding="utf-8")
        written.append(TEMPLATE)
    if config.get("chat_template") != template:
        files.write_json(folder / TOKENIZER, config | {"chat_template": template})
        written.append(TOKENIZER)
    return written


def add_pieces(folder: Path, base: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Copy the base's tokenizer.model beside tokenizer.json; why not, or "" where it is there now."""
    if (folder / PIECES).is_file():
        return ""
    found = _file_of(base, PIECES)
    if found is None:
        return f"{base} 里没有 has no {PIECES}"
    pieces = SentencePieceProcessor(model_file=found)
    names = [pieces.id_to_piece(number) for number in range(pieces.get_piece_size())]
    if names != tokenizer.convert_ids_to_tokens(list(range(len(names)))):
        return f"{base} 的 {PIECES} 词表不同 holds another vocabulary than its tokenizer"
    shutil.copyfile(found, folder / PIECES)
    return ""


def _file_of(base: str, name: str) -> str | None:
    """The path of a file of a folder or hub id; None where it has none, or the hub cannot be reached."""
    quiet = ("missing_entries", "gated_repo", "connection_errors")
    options = {f"_raise_exceptions_for_{problem}": False for problem in quiet}
    if Path(base).is_dir():
        return str(Path(base) / name) if (Path(base) / name).is_file() else None
    try:
        return cached_file(base, name, **options)
    except OSError:  # neither a folder nor the name of a repository
        return None


def _positions(folder: Path) -> Any:
    """How transformers reads the positions from a folder's config.json."""
    config = AutoConfig.from_pretrained(folder)
    return config.rope_parameters, getattr(config, "layer_types", None)
