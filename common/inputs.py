"""What a value of --data_path names: a file, the files of a folder, of a pattern or of an archive, or a URL."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

import fsspec
from fsspec.compression import compr
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression

from common.errors import UserError

DATA = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet)(?:\.(?:gz|bz2|xz|lzma|zst))?$", re.IGNORECASE)
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # about rows of other files
PACKED = r"\.(?:zip|tar|tgz|tar\.(?:gz|bz2|xz))"
ARCHIVE = re.compile(rf"{PACKED}$", re.IGNORECASE)
PATTERN = re.compile(r"[*?\[]")
MEMBER = re.compile(rf"(.+?{PACKED})/(.+)", re.IGNORECASE)
WEB = ("http://", "https://")
SECONDS = 60  # a server may take to answer
SHOWN = 20  # names in a line
BROKEN = (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError)  # a packed file
OFFICE = {
    "xl/": "Excel 文件 an Excel file is not read; save it as CSV in UTF-8",
    "word/": "Word 文件 a Word file is not read; save its rows as CSV in UTF-8 or as JSON lines",
    "ppt/": "PowerPoint 文件 a PowerPoint file is not read; write its rows as JSON lines",
}


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
        said = _names([file.removeprefix(f"{folder}/") for file in files])
        each = f", 各抽 {wanted} 行 {wanted} rows of each" if wanted else ""
        others = f"; 不读 left out: {_names(left_out)}" if left_out else ""
        print(f"数据 {spec}: {len(files)} 个文件 files{each}: {said}{others}", file=out)


def _names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" … (+{more})" if more > 0 else "")


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
        raise _not_opened(path, problem) from None
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
    elif told or _is_data(name):
        listed.files.append(path)
    else:
        listed.left_out.append(name)


def _is_archive(path: str) -> bool:
    return "::" not in path and bool(ARCHIVE.search(path))


def _is_data(name: str) -> bool:
    """Whether a file of this name, folders before it included, holds rows."""
    parts = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
    return bool(DATA.search(name)) and not hidden and parts[-1] not in NOT_ROWS


def _why(path: str, left_out: list[str]) -> str:
    """What else there is to say of a folder without data files."""
    if any(name.endswith(".arrow") for name in left_out):
        return ": datasets 的 save_to_disk it is of save_to_disk; load_from_disk(…).to_json('my.jsonl') makes one"
    inside = f"; 子文件夹 of folders inside: '{path.rstrip('/')}/**/*.jsonl'"
    return f": {_names(left_out)}{inside if any(name.endswith('/') for name in left_out) else ''}"


def _members(path: str) -> Listing:
    """The Listing of an archive; a zip of one file is that file."""
    with opened(path) as file:
        names = sorted(_names_in(path, file))
    office = office_file(names)
    if office:
        raise UserError(f"{path}: {office}")
    if len(names) == 1 and path.lower().endswith(".zip"):
        return Listing([path], [])
    files = [f"{path}/{name}" for name in names if _is_data(name)]
    if not files:
        raise UserError(f"{path}: 没有数据文件 no data file in it: {_names(names)}")
    return Listing(files, [name for name in names if not _is_data(name)])


def _names_in(path: str, file: BinaryIO) -> list[str]:
    """The names of the files in an archive, which is open as `file`."""
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as packed:
            return [name for name in packed.namelist() if not name.endswith("/")]
    with tarfile.open(fileobj=file) as packed_tar:
        return [member.name for member in packed_tar if member.isfile()]


def office_file(names: Iterable[str]) -> str:
    """What is to be said of a zip whose files have these names, if it is a file of an office program; else ""."""
    return next((said for name in names for folder, said in OFFICE.items() if name.startswith(folder)), "")


def split_member(path: str) -> tuple[str, str]:
    """`my.zip/a.jsonl` as (archive, member); member is "" for any other file."""
    found = None if "::" in path or path.startswith(WEB) else MEMBER.fullmatch(path)
    if found and _is_data(found[2]) and not os.path.isdir(found[1]):
        return found[1], found[2]
    return path, ""


@contextmanager
def opened(path: str, unpack: bool = False) -> Iterator[BinaryIO]:
    """A file that `listing` names, to read its bytes from; it can seek.

    unpack: with a compression that the end of its name tells undone. UserError where it cannot be opened or, later,
    read.
    """
    with ExitStack() as stack:
        try:
            file = _open(path, unpack, stack)
        except FileNotFoundError:
            raise UserError(f"{path}: 文件不存在 no such file; check --data_path") from None
        except UserError:
            raise
        except Exception as problem:  # the stores' own errors share no base class
            raise _not_opened(path, problem) from None
        try:
            yield file
        except (OSError, ValueError, ImportError, *BROKEN) as problem:
            raise _not_opened(path, problem) from None


def _not_opened(path: str, problem: Exception) -> UserError:
    return UserError(f"{path}: 无法打开 cannot be opened: {' '.join(str(problem).split())}")


def _open(path: str, unpack: bool, stack: ExitStack) -> BinaryIO:
    archive, member = split_member(path)
    if member:
        file = _open_member(archive, member, stack)
    elif path.startswith(WEB):
        file = _download(path, stack)
    else:
        file = stack.enter_context(fsspec.open(path, "rb"))
    name = path.partition("?" if path.startswith(WEB) else "::")[0]
    packed = infer_compression(name) if unpack else None
    if packed is None:
        return file
    if packed == "zip":
        names = _names_in(".zip", file)
        if len(names) > 1:
            raise UserError(f"{path}: 有 {len(names)} 个文件 holds {len(names)} files: {_names(names)}; unpack it")
        file.seek(0)
    return cast(BinaryIO, stack.enter_context(compr[packed](file, mode="rb")))


def _open_member(archive: str, member: str, stack: ExitStack) -> BinaryIO:
    file = stack.enter_context(fsspec.open(archive, "rb"))
    if archive.lower().endswith(".zip"):
        return cast(BinaryIO, stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(member)))
    found = stack.enter_context(tarfile.open(fileobj=file)).extractfile(member)
    return cast(BinaryIO, found)


def _download(url: str, stack: ExitStack) -> BinaryIO:
    """A file of the web, fetched into one that is gone when it is closed: what reads it goes back to its start."""
    file = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            shutil.copyfileobj(answer, file)
            if answer.length:  # http.client ends where the server does
                raise OSError(f"下载中断 the download was cut off {answer.length} bytes before its end")
    except urllib.error.HTTPError as refused:  # an open answer as well
        with refused:
            raise OSError(str(refused)) from None
    file.seek(0)
    return file
