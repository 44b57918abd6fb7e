"""Whether files can be read and folders written to: asked first, before a tokenizer, a base or data are loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import distributed
from common.errors import UserError
from common.inputs import files_of, show_files
from common.knobs import OPTIMIZERS
from common.opened import split_member

if TYPE_CHECKING:
    from common.config import SFTConfig, TrainFlags

PLAIN = (".jsonl", ".json", ".csv", ".tsv", ".txt")
PLACEHOLDER = re.compile(
    rb"\{\{(?i:name|author)\}\}|(?:<|\\u003c)(?:NAME|AUTHOR)(?:>|\\u003e)"
)  # turns.PLACEHOLDER's bytes


def check_training(cfg: SFTConfig, flags: TrainFlags) -> None:
    """UserError where train.py has no base, cannot read its data, or not write its cache or what it leaves.

    URLs are not tried. --print_targets reads no data and writes nothing; --check lists unreadable files in its
    report, and leaves no run.
    """
    check_base(cfg.base, cfg)
    _check_package(cfg.optim)
    if not flags.print_targets:
        distributed.first(lambda: _check_training(cfg, flags.check))


def check_base(base: str, cfg: SFTConfig) -> None:
    """UserError where no base model is given, to recipes that ship none."""
    if not base:
        raise UserError(
            "--path_model_pretrain: 没有给出基座模型 no base model is given, and none is shipped with these recipes: "
            f"give a folder or a hub id, such as --path_model_pretrain {cfg.repo_id}"
        )


def _check_package(optim: str) -> None:
    """UserError where the package that an optimizer comes from is not installed."""
    optimizer = OPTIMIZERS[optim]
    if optimizer.package and not importlib.util.find_spec(optimizer.package):
        raise UserError(f"--optim {optim}: 没有安装 needs {optimizer.package}: pip install {optimizer.install}")


def _check_training(cfg: SFTConfig, rehearsal: bool) -> None:
    _check_placeholders(cfg)
    if not rehearsal:
        check_readable(cfg.data_path, "data_path")
        check_readable(cfg.eval_data_path if cfg.eval_rows else (), "eval_data_path")
        check_writable(cfg.model_save_dir, "model_save_dir")
    check_writable(cfg.cache_dir, "cache_dir")


def show_base(cfg: SFTConfig, flags: TrainFlags) -> None:
    """Print which base train.py starts from, as its first line, then the files that folders and patterns name.

    They go to stderr where stdout is for JSON alone.
    """
    out = sys.stderr if flags.json else sys.stdout
    toy = cfg.path_model_pretrain == "embedded"
    note = (
        " (随附的小模型，只供试用 the small one shipped here, for a try; yours: --path_model_pretrain)" if toy else ""
    )
    print(f"基座 base: {cfg.base}{note}", file=out)
    knobs = () if flags.print_targets else ("data_path", "eval_data_path") if cfg.eval_rows else ("data_path",)
    for knob in knobs:
        with contextlib.suppress(UserError):  # told by check_training, or in the report of --check
            show_files(getattr(cfg, knob), knob, out)


def _check_placeholders(cfg: SFTConfig) -> None:
    """UserError where a name or author is given, and no row of the data has a place for one."""
    given = sorted(cfg.given & {"model_name", "model_author"})
    if not given or any(_may_hold(path, PLACEHOLDER) for path, _ in files_of(cfg.data_path)):
        return
    raise UserError(
        f"--{given[0]} {getattr(cfg, given[0])[0]}: 数据里没有占位符 no row of --data_path holds a placeholder, "
        "{{name}} or {{author}}, that it would fill; the base model is --path_model_pretrain"
    )


def _may_hold(path: str, pattern: re.Pattern[bytes]) -> bool:
    """Whether a file holds the pattern; True where its bytes do not show it: a URL, packed or unreadable."""
    if not path.endswith(PLAIN):
        return True
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return pattern.search(content) is not None
    except (OSError, ValueError):  # the latter for an empty file
        return True


def check_scoring(cfg: SFTConfig) -> None:
    """UserError where evaluation.py could not write its results; all rows to score are read before a model is."""
    distributed.first(lambda: check_writable(cfg.model_save_dir, "model_save_dir"))


def check_readable(specs: Sequence[str], knob: str) -> None:
    """UserError where a file among `specs` (path or path#N), values of `knob`, is missing or cannot be opened."""
    for path in (split_member(path)[0] for path, _ in files_of(specs, knob)):
        if "://" in path:
            continue
        try:
            open(path, "rb").close()
        except FileNotFoundError:
            raise UserError(f"{path}: 文件不存在 no such file; check --{knob}") from None
        except OSError as problem:
            raise UserError(f"{path}: 无法打开 cannot be opened: {problem.strerror}; check --{knob}") from None


def check_writable(folder: str | Path, knob: str) -> None:
    """UserError where `folder`, the value of `knob`, cannot be made or written to; nothing is left there."""
    path = Path(folder).expanduser()
    try:
        there = next(part for part in [path, *path.absolute().parents] if part.exists())
        if not there.is_dir():
            raise UserError(f"{path}: {there} 是文件，不是文件夹 is a file, not a folder; give another --{knob}")
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as problem:
        raise UserError(f"{path}: 无法写入 cannot be written: {problem.strerror}; give another --{knob}") from None
