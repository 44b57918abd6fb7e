"""The command line: defaults < config.py < recipe < file < flags; a wrong flag, type or value is one line, exit 2."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, overload

from common.config import ANSWERING, LORA, ROOT, Names, SFTConfig
from common.knob_files import KEPT, Fail, is_alias, nearest, read_file, recipe_file, show_unused, split
from common.knobs import ALIASES, BELONGS, DORA_8, NO_THOUGHT, OPTIMIZERS, PATH_LISTS, PATHS, RANGES, STEPS
from common.launch import let_first_speak, world_size

STEPS_ARE = "batch_size = micro_batch_size × steps × processes"
WHOLE_RATE = 0.1  # of the learning rate, where the user set none: all weights take smaller steps than an adapter does

Config = TypeVar("Config", bound=SFTConfig)  # a family's
Flags = TypeVar("Flags")  # a recipe's, such as TrainFlags
Knobs = dict[str, tuple[Field, Any]]  # by name: field and type, of the config and of the flags


@overload
def parse(config_class: type[Config], flags_class: None = None, argv: Sequence[str] | None = None) -> Config: ...


@overload
def parse(
    config_class: type[Config], flags_class: type[Flags], argv: Sequence[str] | None = None
) -> tuple[Config, Flags]: ...


def parse(config_class: Any, flags_class: Any = None, argv: Sequence[str] | None = None) -> Any:
    """Read `argv` (default: the command line) into `config_class`, and into `flags_class` where one is given.

    Returns the config, or (config, flags). `config.given` holds the names the user set in a file or by a flag.
    A wrong flag, type or value prints one line and exits with code 2.
    """
    classes = [config_class] + ([flags_class] if flags_class else [])
    knobs = {f.name: (f, _types(cls)[f.name]) for cls in classes for f in fields(cls) if not f.metadata.get("hidden")}
    parser = _parser(classes, knobs)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"无法识别的参数 unrecognized argument {unknown[0]}{nearest(unknown[0], knobs)}")
    kinds = {name: kind for name, (_, kind) in knobs.items()} | {STEPS: int}
    values = read_file("--config", args.config, kinds, parser.error) if args.config else {}
    values |= {name: value for name, value in vars(args).items() if name in (*knobs, STEPS) and value is not None}
    _check_values(values, parser.error)
    own = {f.name: kinds[f.name] for f in fields(config_class) if f.name in kinds and f.name != "recipe"}
    recipe = _read_recipe(values["recipe"], own, parser.error) if "recipe" in values else {}
    config = _build(config_class, values, recipe, parser.error)
    _check_tuning(config, flags_class in ANSWERING, parser.error)
    config = _fit_batches(config, parser.error)
    show_unused(recipe, config, values.get("json", False))
    if flags_class is None:
        return config
    return config, flags_class(**{k: _absolute(k, v) for k, v in values.items() if k in _types(flags_class)})


def _types(cls: type) -> dict[str, Any]:
    """{name: type} of a dataclass's fields."""
    return typing.get_type_hints(cls)


def _build(cls: type[Config], values: dict[str, Any], recipe: dict[str, Any], error: Fail) -> Config:
    """The config with the user's `values` over a recipe's, and what follows where the user left it open."""
    steps = values.get(STEPS)
    if steps and "batch_size" in values:
        error(f"--{STEPS} {steps} 与 --batch_size 不能同用 cannot go together: leave one out, {STEPS_ARE}")
    values = {k: v for k, v in values.items() if k in _types(cls)}
    if "repo_id" in values and "path_model_pretrain" not in values:
        values["path_model_pretrain"] = values["repo_id"]
    given = frozenset(values) | (recipe.keys() & KEPT)
    if "data_path" in given and "eval_data_path" not in given:
        values["eval_data_path"] = ()  # the shipped held-out rows say nothing about other data
    for package in values.get("report_to", ()):
        if not importlib.util.find_spec(package):
            error(f"--report_to {package}: 没有安装 the package is not installed; remedy: pip install {package}")
    values = recipe | {k: _absolute(k, v) for k, v in values.items()}
    values |= {name: (tuple(values[name]) * 2)[:2] for name in ("model_name", "model_author") if name in values}
    config = cls(**values, given=given)
    if config.path_model_pretrain == "embedded":
        config = replace(config, **{k: v for k, v in cls.EMBEDDED.items() if k not in given})
    if steps:
        batch = config.micro_batch_size * steps * world_size()
        config = replace(config, batch_size=batch, given=given | {"micro_batch_size", "batch_size"})
    if config.tuning not in LORA and "learning_rate" not in given:
        config = replace(config, learning_rate=config.learning_rate * WHOLE_RATE)
    return config


def _check_tuning(config: SFTConfig, answering: bool, error: Fail) -> None:
    """Knobs that would do nothing, or cannot go together, are errors. answering: any run may answer quantised."""
    for name in sorted((config.given & BELONGS.keys()) - ({"quantization_bit"} if answering else set())):
        if config.tuning not in BELONGS[name]:
            error(
                f"--{name} 对 --tuning {config.tuning} 不起作用 has no effect with it: "
                f"it belongs to --tuning {' or '.join(BELONGS[name])}"
            )
    optimizer = OPTIMIZERS[config.optim]
    for name in sorted(config.given.intersection(optimizer.ignores)):
        error(f"--{name} 对 --optim {config.optim} 不起作用 has no effect with it: leave it out")
    if optimizer.projects and config.tuning in LORA:
        error(
            f"--optim {config.optim} 对 --tuning {config.tuning} 不起作用 saves nothing with it: it keeps less of "
            "whole matrices, trained by --tuning full or freeze"
        )
    if config.use_pissa and config.bits:
        error("--use_pissa 需要未量化的基座 splits the base's weights, which qlora has quantised: use --tuning lora")
    if config.use_dora and config.bits == 8:
        error(DORA_8)
    if config.thinking == "keep" and config.prompt_style != "chat":
        error(NO_THOUGHT.format(config.prompt_style))
    if config.use_pissa and config.use_dora:
        error("--use_pissa 与 --use_dora 不能同用 cannot go together: DoRA's magnitudes would be of the split base")


def _fit_batches(config: Config, error: Fail) -> Config:
    """Whole micro batches in a batch: what the user left open gives way, what the user set is an error.

    The micro batch gives way first: then several processes learn what one would.
    """
    micro = config.micro_batch_size * world_size()
    whole = micro * -(-config.batch_size // micro)
    if config.batch_size == whole:
        return config
    if "micro_batch_size" not in config.given and config.batch_size % world_size() == 0:
        share = config.batch_size // world_size()
        largest = max(n for n in range(1, config.micro_batch_size + 1) if share % n == 0)
        return replace(config, micro_batch_size=largest)
    if "batch_size" not in config.given:
        return replace(config, batch_size=whole)
    error(
        f"--batch_size {config.batch_size} 不是 --micro_batch_size × 进程数 = {micro} 的倍数 "
        f"is not a multiple of micro_batch_size × processes; use {whole}"
    )


def _absolute(name: str, value: Any, folder: str | Path = "") -> Any:
    """Paths are relative to `folder`, by default where the command is called; hub ids and URLs stay."""
    if name in PATH_LISTS:
        return tuple(v if "://" in v else os.path.abspath(os.path.join(folder, os.path.expanduser(v))) for v in value)
    if name == "path_model_pretrain" and value != "embedded" and os.path.isdir(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    if name in PATHS and value:
        return os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    return value


def _parser(classes: list[type], knobs: Knobs) -> _Parser:
    doc = inspect.getdoc(sys.modules["__main__"]) or ""
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=True
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with knobs; flags win over it")
    parser.add_argument(f"--{STEPS}", type=int, metavar="N", help=f"instead of batch_size: {STEPS_ARE}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    help_texts = {name: text for cls in classes for name, text in _comments(cls).items()}
    spellings = {name: [f"--{name}"] for name in knobs}
    for alias, name in ALIASES.items():
        if name in spellings and is_alias(alias, knobs):
            spellings[name].append(f"--{alias}")
    for name, (knob, kind) in knobs.items():
        default = "" if knob.default in ("", ()) else f" [{as_text(knob.default)}]"
        parser.add_argument(
            *spellings[name],
            dest=name,
            default=None,
            help=(help_texts.get(name, "") + default).replace("%", "%%"),
            **_argument(kind),
        )
    return parser


def _argument(kind: Any) -> dict[str, Any]:
    """argparse's keywords for a knob of type `kind`."""
    if kind == Names:
        return {"nargs": "+", "metavar": "TEXT", "type": str}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "action": _Listed, "metavar": "X"}
    if typing.get_origin(kind) is Literal:
        bare = {"nargs": "?", "const": "true"} if "true" in typing.get_args(kind) else {}
        return {"choices": typing.get_args(kind), "type": type(typing.get_args(kind)[0]), **bare}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


class _Listed(argparse.Action):
    """Lists may be written with blanks or commas: `--target_modules q_proj,k_proj` or `q_proj k_proj`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, split(values))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        let_first_speak()
        print(f"{Path(sys.argv[0]).name}: 参数错误 error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} 应为 true 或 false must be true or false")
    return values[text.lower()]


def as_text(value: Any) -> str:
    """A value as help texts and errors give it; paths of this project are relative to it."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, value))
    text = str(value)
    return os.path.relpath(text, ROOT) if text.startswith(str(ROOT)) else text


def _check_values(values: dict[str, Any], error: Fail) -> None:
    for name, value in values.items():
        if name in RANGES and not RANGES[name].allows(value):
            error(f"--{name} {as_text(value)} 超出范围 out of range: must be {RANGES[name].words}")


def _read_recipe(name: str, kinds: dict[str, Any], error: Fail) -> dict[str, Any]:
    """The knobs of a recipe; its paths are relative to the project."""
    recipe = read_file("--recipe", recipe_file(name, error), kinds, error)
    recipe = {knob: _absolute(knob, value, ROOT) for knob, value in recipe.items()}
    _check_values(recipe, error)
    return recipe


def _comments(cls: type) -> dict[str, str]:
    """Each field's trailing comment in the class source and its parents': {name: text}."""
    found = {}
    for parent in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            match = re.match(r"    (\w+): .*?  # (.+)$", line)
            if match:
                found[match[1]] = match[2]
    return found
