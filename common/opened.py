"""Files opened to read their bytes: local ones, those of stores and of the web, packed ones, members of archives."""

from __future__ import annotations

import codecs
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
from typing import BinaryIO, cast

import fsspec
from fsspec.compression import compr
from fsspec.utils import infer_compression

from common.errors import UserError

DATA = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet)(?:\.(?:gz|bz2|xz|lzma|zst))?$", re.IGNORECASE)
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # about rows of other files
PACKED = r"\.(?:zip|tar|tgz|tar\.(?:gz|bz2|xz))"
ARCHIVE = re.compile(rf"{PACKED}$", re.IGNORECASE)
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
HEAD = 512  # bytes that tell a file of another kind
OTHERS = [  # how a file begins that has no rows to read, and what is said of it
    (rb"ARRO|\xff{4}", "Arrow 文件 an Arrow file is not read; save it as Parquet or as JSON lines"),
    (
        rb"\x80[\2-\5]",
        "pickle 文件 a pickle file is not read, as it could run code; "
        "in pandas: read_pickle(…).to_json('my.json', orient='records')",
    ),
    (rb"%PDF", "PDF 文件 a PDF file is not read; write what it says as rows of JSON lines"),
    (rb"\xd0\xcf\x11\xe0", "旧版 Excel 或 Word an old Excel or Word file is not read; save it as CSV in UTF-8"),
    (rb".{5}\0\0\0\{", "safetensors 权重 a file of weights, not of rows; a base is given by --path_model_pretrain"),
    (rb"version https://git-lfs", "Git LFS 指针 a Git LFS pointer, not the data itself; fetch it: git lfs pull"),
    (
        rb"\s*<(?i:!doctype|html|head|\?xml)",
        "网页 an HTML or XML page, not data; was a page for logging in saved? Download the file again",
    ),
    (rb"\x1f\x8b", "gzip 压缩 compressed; let its name end with .gz, or .tar.gz where several files are in it"),
    (rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "压缩文件 compressed; let its name end with .bz2, .xz or .zst"),
    (rb"7z\xbc\xaf|Rar!", "压缩包 a 7z or RAR archive is not read; unpack it"),
    (rb".{257}ustar", "tar 包 a tar archive; give it as a file whose name ends with .tar or .tar.gz"),
    (rb"[^\0]{0,15}\0", "二进制文件 a binary file; write its rows as JSON lines or as CSV"),
]
COMMENT = ("//", "#")
COMMENT_LINE = "注释行 a comment line; delete the lines that begin with // or #"


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
            raise not_opened(path, problem) from None
        try:
            yield file
        except (OSError, ValueError, ImportError, *BROKEN) as problem:
            raise not_opened(path, problem) from None


def not_opened(path: str, problem: Exception) -> UserError:
    """What is raised where a file cannot be opened."""
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
        names = names_in(".zip", file)
        if len(names) > 1:
            raise UserError(f"{path}: 有 {len(names)} 个文件 holds {len(names)} files: {some_of(names)}; unpack it")
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


def names_in(path: str, file: BinaryIO) -> list[str]:
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
    if found and is_data(found[2]) and not os.path.isdir(found[1]):
        return found[1], found[2]
    return path, ""


def is_data(name: str) -> bool:
    """Whether a file of this name, folders before it included, holds rows."""
    parts = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
    return bool(DATA.search(name)) and not hidden and parts[-1] not in NOT_ROWS


def some_of(names: Sequence[str]) -> str:
    """The names in a line, the first of them where they are many."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" … (+{more})" if more > 0 else "")


def said_of(file: BinaryIO, head: bytes) -> str:
    """What is said of a file that begins with `head` and has no rows to read; "" of others."""
    said = _said_of_zip(file) if head.startswith(b"PK\3\4") else ""
    return said or next((said for start, said in OTHERS if re.match(start, head, re.DOTALL)), "")


def _said_of_zip(file: BinaryIO) -> str:
    """What is said of a zip that is read as a file: a file of an office program, or a zip inside a zip."""
    try:
        said = office_file(zipfile.ZipFile(file).namelist())
    except zipfile.BadZipFile:
        said = ""
    return said or "xlsx 或 zip an Excel file or a zip; save it as CSV in UTF-8, or let its name end with .zip"


def encoding_of(raw: bytes) -> str:
    """What is said of bytes that are not UTF-8: which encoding they may be in."""
    for name in ("gb18030", "big5"):
        try:
            codecs.getincrementaldecoder(name)().decode(raw)  # the last character may be cut off
            return f"不是 UTF-8，像是 {name} not UTF-8, looks like {name}; convert it: iconv -f {name} -t UTF-8"
        except UnicodeDecodeError:
            continue
    return f"不是 UTF-8 not UTF-8: {raw[:40]!r}"
