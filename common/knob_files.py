"""Files of knobs: --config's, and the recipes of configs/recipes/, values for a task and a size (train.py --recipe).

A recipe's values stand between those of config.py and the user's own: they give way as config.py's do.
"""

from __future__ import annotations

import difflib
import json
import sys
import typing
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from common.config import ROOT, Names, SFTConfig
from common.knobs import ALIASES, BELONGS, HABITS, STEPS
from common.launch import rank

CLOSE = 0.8  # how alike a flag and the one suggested are, of 1: no suggestion is better than a wrong one
RECIPES = ROOT / "configs" / "recipes"
KEPT = frozenset(["tuning"])  # of a recipe, as if the user had set it: an adapter to start from does not change it

Fail = Callable[[str], NoReturn]  # ends the program with one line


def read_file(flag: str, path: str, kinds: dict[str, Any], error: Fail) -> dict[str, Any]:
    """Knobs from the YAML or JSON file that `flag` names, their types, of `kinds`, checked as flags' are."""
    written: dict[str, Any] = {}  # what stands in a YAML file as a value
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith((".yaml", ".yml")):
            import yaml

            loaded = yaml.safe_load(text)
            node = yaml.compose(text, yaml.SafeLoader)
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            written = _once((key.value, value.value) for key, value in pairs)
        else:
            loaded = json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError) as problem:
        error(f"{flag} {path}: 无法读取 cannot be read: {problem}")
    except Exception as problem:  # yaml.YAMLError, whose module is only imported for YAML
        if type(problem).__module__.partition(".")[0] != "yaml":
            raise
        error(f"{flag} {path}: 不是有效的 YAML not valid YAML: {problem}")
    if not isinstance(loaded, dict):
        error(f"{flag} {path}: 应为键值表 must be a mapping of knobs to values")
    values = {}
    for key, value in loaded.items():
        name = ALIASES[key] if is_alias(key, kinds) else key
        if name not in kinds:
            error(f"{flag} {path}: 未知参数 unknown knob {key}{nearest(str(key), kinds)}")
        if name in values:
            error(f"{flag} {path}: {key} 就是 is {name}, 已经给出 which is given too; remove one")
        if kinds[name] is str and type(value) is int:
            value = written.get(key, str(value))  # YAML reads 0612 in base 8, and 2026_11 without the _
        try:
            values[name] = _typed(value, kinds[name])
        except TypeError as problem:
            error(f"{flag} {path}: {key}: {problem}")
    return values


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A mapping of pairs; ValueError where a key occurs twice, of which the last value alone would be taken."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if str(key) in found:
            raise ValueError(f"{key} 出现两次 occurs twice; remove one")
        found[str(key)] = value
    return found


def _typed(value: Any, kind: Any) -> Any:
    """`value` from a file as a knob of type `kind`; an int is a good float, and 1e-4 in YAML is a string.

    Raises TypeError, whose text ends a line.
    """
    origin = typing.get_origin(kind)
    if origin is tuple or kind == Names:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items) if kind == Names else split(items)
        kind = tuple
    elif origin is Literal:
        value = str(value).lower() if isinstance(value, bool) else value  # YAML reads true as a boolean
        if value in typing.get_args(kind):
            return value
        kind = "|".join(map(str, typing.get_args(kind)))
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise TypeError(f"{value!r} 类型不符 is not {getattr(kind, '__name__', kind)}")


def split(values: Iterable[str]) -> tuple[str, ...]:
    """The parts of a list written with blanks or commas."""
    return tuple(part for value in values for part in value.split(",") if part)


def is_alias(name: str, knobs: Collection[str]) -> bool:
    """Whether `name` is another spelling of a knob in the recipe that has these, and not a knob itself."""
    return name in ALIASES and name not in knobs


def nearest(flag: str, knobs: Collection[str]) -> str:
    """What an unknown flag may have been meant to be, as the end of a line."""
    name = flag.split("=")[0].lstrip("-")
    habit = HABITS.get(name.replace("-", "_"))
    if habit:
        return f"; 这里是 here: {habit}"
    known = [*knobs, STEPS, *(alias for alias in ALIASES if is_alias(alias, knobs))]
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=CLOSE)
    return f"; 是否想写 did you mean --{near[0]} ?" if near else "; --help 列出全部参数 lists all"


def recipe_file(name: str, error: Fail) -> str:
    """The YAML file of a recipe; `error` gets one line where there is none of this name."""
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name in names:
        return str(RECIPES / f"{name}.yaml")
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"是否想写 did you mean {near[0]} ? " if near else ""
    error(
        f"--recipe {name}: 没有这个配方 no such recipe; {meant}现有 there are: {' '.join(names)}; "
        "自己的文件 a file of your own: --config"
    )


def show_unused(recipe: dict[str, Any], config: SFTConfig, as_json: bool) -> None:
    """Print one line for each reason why knobs of `recipe` do not act in `config`; on stderr with `as_json`."""
    ours = [name for name in recipe if name not in config.given]
    useless = [name for name in ours if config.tuning not in BELONGS.get(name, (config.tuning,))]
    embedded = config.EMBEDDED if config.path_model_pretrain == "embedded" else {}
    other = [name for name in ours if name in embedded and embedded[name] != recipe[name] and name not in useless]
    reasons = {
        "随附的小模型自有其值 the embedded base has values of its own": other,
        f"对 --tuning {config.tuning} 不起作用 no effect with it": useless,
    }
    for reason, names in reasons.items():
        if names and rank() == 0:
            out = sys.stderr if as_json else sys.stdout
            print(f"配方 recipe {config.recipe}: 未采用 left out: {' '.join(names)} ({reason})", file=out)
