"""What a value of --data_path names: a file, the files of a folder, of a pattern or of an archive, or a URL."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

from fsspec.core import url_to_fs

from common.errors import UserError
from common.opened import ARCHIVE, WEB, is_data, names_in, not_opened, office_file, opened, some_of

PATTERN = re.compile(r"[*?\[]")


class Listing(NamedTuple):
    """What a path stands for: `files`, each as if given by name, and the names beside them that are no data files."""

    files: list[str]
    left_out: list[str]


def split_sample(spec: str) -> tuple[str, int | None]:
    """`path#N` as (path, N); N is None where it is not given."""
    path, mark, count = spec.rpartition("#")
    if mark and count.isdigit():
        if int(count) == 0:
            raise UserError(f"{spec}: 抽样行数应大于 0 the number of rows after # must be above 0")
        return path, int(count)
    return spec, None


def files_of(specs: Iterable[str], knob: str = "data_path") -> list[tuple[str, int | None]]:
    """[(file, N)] of all files that `specs`, values of `knob`, name as path or path#N; N, or None, is that of each."""
    split = [split_sample(spec) for spec in specs]
    return [(file, wanted) for path, wanted in split for file in listing(path, knob).files]


def show_files(specs: Iterable[str], knob: str = "data_path", out: TextIO | None = None) -> None:
    """Print a line for each of `specs` that is not one file: its files, and what beside them is left out."""
    for spec in specs:
        path, wanted = split_sample(spec)
        files, left_out = listing(path, knob)
        if files == [path]:
            continue
        folder = PATTERN.split(f"{path.rstrip('/')}/", maxsplit=1)[0].rpartition("/")[0]
        said = some_of([file.removeprefix(f"{folder}/") for file in files])
        each = f", 各抽 {wanted} 行 {wanted} rows of each" if wanted else ""
        others = f"; 不读 left out: {some_of(left_out)}" if left_out else ""
        print(f"数据 {spec}: {len(files)} 个文件 files{each}: {said}{others}", file=out)


def listing(path: str, knob: str = "data_path") -> Listing:
    """The Listing of one path, sorted by name. A file is listed as it is, whether it can be read or not.

    Of a folder (not of the folders inside it), of a pattern that ends with * and of an archive the files are told by
    their ending; of other patterns, such as 'my/*.txt', all files are taken. Nothing is asked of http and https.
    UserError where there is no file.
    """
    if path.startswith(WEB):
        return Listing([path], [])
    try:
        files, name = url_to_fs(path)
        if files.isdir(name):
            found, told = files.ls(name, detail=True), False
        elif PATTERN.search(name) and not files.exists(name):
            found, told = list(files.glob(name, detail=True).values()), not name.endswith("*")
        else:
            return _members(path) if _is_archive(path) else Listing([path], [])
    except UserError:
        raise
    except Exception as problem:  # the stores' own errors share no base class
        raise not_opened(path, problem) from None
    if not found:
        raise UserError(f"{path}: 没有文件 there is no file; check --{knob}")
    listed = Listing([], [])
    for entry in sorted(found, key=lambda entry: entry["name"]):
        _list_entry(listed, _full_name(path, files, entry["name"]), entry["type"] == "directory", told)
    if not listed.files:
        raise UserError(f"{path}: 没有数据文件 no data file in it{_why(path, listed.left_out)}; check --{knob}")
    return listed


def _full_name(path: str, files: Any, name: str) -> str:
    """An entry of `files`, the file system of `path`, as a user would give it."""
    outer, chained, inner = path.partition("::")
    if chained:
        return f"{outer.partition('://')[0]}://{name}::{inner}"
    return str(files.unstrip_protocol(name)) if "://" in path else name


def _list_entry(listed: Listing, path: str, is_folder: bool, told: bool) -> None:
    """Add what is at `path` to `listed`; told: the user has said that it is data."""
    name = path.partition("::")[0].rstrip("/").rpartition("/")[2]
    if is_folder:
        listed.left_out.append(f"{name}/")
    elif _is_archive(path):
        inside = _members(path)
        listed.files.extend(inside.files)
        listed.left_out.extend(f"{name}/{left}" for left in inside.left_out)
    elif told or is_data(name):
        listed.files.append(path)
    else:
        listed.left_out.append(name)


def _is_archive(path: str) -> bool:
    return "::" not in path and bool(ARCHIVE.search(path))


def _why(path: str, left_out: list[str]) -> str:
    """What else there is to say of a folder without data files."""
    if any(name.endswith(".arrow") for name in left_out):
        return ": datasets 的 save_to_disk it is of save_to_disk; load_from_disk(…).to_json('my.jsonl') makes one"
    inside = f"; 子文件夹 of folders inside: '{path.rstrip('/')}/**/*.jsonl'"
    return f": {some_of(left_out)}{inside if any(name.endswith('/') for name in left_out) else ''}"


def _members(path: str) -> Listing:
    """The Listing of an archive; a zip of one file is that file."""
    with opened(path) as file:
        names = sorted(names_in(path, file))
    office = office_file(names)
    if office:
        raise UserError(f"{path}: {office}")
    if len(names) == 1 and path.lower().endswith(".zip"):
        return Listing([path], [])
    files = [f"{path}/{name}" for name in names if is_data(name)]
    if not files:
        raise UserError(f"{path}: 没有数据文件 no data file in it: {some_of(names)}")
    return Listing(files, [name for name in names if not is_data(name)])
